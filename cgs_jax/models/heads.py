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
        y, bias = Conv(self.num_classes, 3, pack, name="conv")(features)
        return packed.unpack_pixels(packed.affine(y, None, bias, pack), pack)


class Specialists(nn.Module):
    """K heads conv1x1 - batch norm - LeakyReLU - conv3x3, parameters stacked [K, ...].

    Specialist k (0-based) separates background, target k + 1, and remaining targets:
    packed features of F channels -> logits [K, B, H, W, 3].

    The parameters are those of a `nn.vmap`ped head. Only the lowering differs: `vmap` over both
    features and kernels makes XLA emit a grouped convolution, whose gradient is 40 to 60 times
    slower on CPUs. Here
    - the batch statistics of the 1x1 convolutions, linear maps of the features, follow from mean
      and covariance of the features; so batch norm is folded into the kernels, and the hidden maps
      are written once. The features are centred first, or bfloat16 would round mean and all;
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
        mean, var, centre = None, None, jnp.zeros(f)
        if train:
            centre = jnp.mean(x.astype(jnp.float32), (0, 1, 2)).reshape(pack, f).mean(0)
            x = packed.affine(x, None, -centre, pack).astype(x.dtype)
            mean, var = jnp.zeros(()), _linear_variance(x, pack, kernel1)
        offset = jnp.einsum("i,kif->kf", centre, kernel1) + bias1
        factor, summand = BatchNorm(name="bn")(mean, var, offset)
        kernel1 = kernel1 * factor[:, None]
        logits = []
        for some in (slice(i, i + 4) for i in range(0, k, 4)):
            n = len(summand[some])
            wide = jnp.moveaxis(kernel1[some], 0, 1).reshape(1, 1, f, n * f)
            h = packed.affine(packed.conv(x, wide, pack), None, summand[some].ravel(), pack)
            h = nn.leaky_relu(h, 0.01).astype(x.dtype)
            blocks = jnp.einsum("kyxfc,kl->yxkflc", kernel2[some], jnp.eye(n))
            y = packed.conv(h, blocks.reshape(3, 3, n * f, n * 3), pack)
            y = packed.unpack_pixels(packed.affine(y, None, bias2[some].ravel(), pack), pack)
            logits.append(jnp.moveaxis(y.reshape(*y.shape[:-1], n, 3), -2, 0))
        return jnp.concatenate(logits)


def _linear_variance(x, pack, kernel):
    """Variance [K, F] of `x @ kernel[k]` over all pixels of a map without mean."""
    f = kernel.shape[1]
    products = jnp.einsum("bhwi,bhwj->ij", x, x, preferred_element_type=jnp.float32)
    covariance = jnp.einsum("pipj->ij", products.reshape(pack, f, pack, f)) / (x.size // f)
    var = jnp.einsum("kif,ij,kjf->kf", kernel, covariance, kernel)
    return jnp.maximum(var, 0)
