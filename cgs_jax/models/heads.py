"""Generalist and specialist heads on a shared feature map (Wang et al., IEEE TMI 2025)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models import packed
from cgs_jax.models.unet import BatchNorm, Conv

stacked_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


class Generalist(nn.Module):
    """One convolution to all classes: packed features -> logits [B, H, W, num_classes]."""

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array, pack: int) -> jax.Array:
        return packed.unpack_pixels(Conv(self.num_classes, 3, pack, name="conv")(features), pack)


class Specialists(nn.Module):
    """K heads conv1x1 - batch norm - LeakyReLU - conv3x3, parameters stacked [K, ...].

    Specialist k (0-based) separates background, target k + 1, and remaining targets:
    packed features of F channels -> logits [K, B, H, W, 3].

    The parameters are those of a `nn.vmap`ped head. Only the lowering differs: `vmap` over both
    features and kernels makes XLA emit a grouped convolution, whose gradient is 40 to 60 times
    slower on CPUs. Here
    - the batch statistics of the 1x1 convolutions, linear maps of the features, follow from mean
      and covariance of the features; so batch norm is folded into the kernels, and the hidden maps
      are written once;
    - the last convolutions of up to four heads are one, with a block-diagonal kernel: hardware that
      multiplies tiles does the zeros for nothing, and on CPUs four heads a time cost least.
    """

    num_targets: int

    @nn.compact
    def __call__(self, x: jax.Array, pack: int, train: bool) -> jax.Array:
        k, f = self.num_targets, x.shape[-1] // pack
        kernel1 = self.param("conv1_kernel", stacked_init, (k, 1, 1, f, f))
        bias1 = self.param("conv1_bias", nn.initializers.zeros, (k, f))
        kernel2 = self.param("conv2_kernel", stacked_init, (k, 3, 3, f, 3))
        bias2 = self.param("conv2_bias", nn.initializers.zeros, (k, 3))
        kernel1 = kernel1[:, 0, 0]
        mean, var = _linear_statistics(x, pack, kernel1, bias1) if train else (None, None)
        factor, summand = BatchNorm(name="bn")(mean, var, (k, f))
        kernel1, bias1 = kernel1 * factor[:, None], bias1 * factor + summand
        logits = []
        for some in (slice(i, i + 4) for i in range(0, k, 4)):
            n = len(bias1[some])
            wide = jnp.moveaxis(kernel1[some], 0, 1).reshape(1, 1, f, n * f)
            h = packed.conv(x, wide, pack)
            h = nn.leaky_relu(h + packed.per_channel(bias1[some].ravel(), pack, h.dtype), 0.01)
            blocks = jnp.einsum("kyxfc,kl->yxkflc", kernel2[some], jnp.eye(n))
            y = packed.conv(h, blocks.reshape(3, 3, n * f, n * 3), pack)
            y = packed.unpack_pixels(
                y + packed.per_channel(bias2[some].ravel(), pack, y.dtype), pack
            )
            logits.append(jnp.moveaxis(y.reshape(*y.shape[:-1], n, 3), -2, 0))
        return jnp.concatenate(logits)


def _linear_statistics(x, pack, kernel, bias):
    """Mean and variance [K, F] of `x @ kernel[k] + bias[k]` over all pixels."""
    f = kernel.shape[1]
    products = jnp.einsum("bhwi,bhwj->ij", x, x, preferred_element_type=jnp.float32)
    products = jnp.einsum("pipj->ij", products.reshape(pack, f, pack, f))
    mean = jnp.mean(x.astype(jnp.float32), (0, 1, 2)).reshape(pack, f).mean(0)
    covariance = products / (x.size // f) - jnp.outer(mean, mean)
    var = jnp.einsum("kif,ij,kjf->kf", kernel, covariance, kernel)
    return jnp.einsum("i,kif->kf", mean, kernel) + bias, jnp.maximum(var, 0)
