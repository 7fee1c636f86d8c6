"""Generalist and specialist heads on a shared feature map (Wang et al., IEEE TMI 2025)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models.unet import conv_init

stacked_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


class Generalist(nn.Module):
    """One convolution to all classes: [B, H, W, F] -> logits [B, H, W, num_classes]."""

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        return nn.Conv(self.num_classes, (3, 3), kernel_init=conv_init, name="conv")(features)


class Specialists(nn.Module):
    """K heads conv1x1 - batch norm - LeakyReLU - conv3x3, parameters stacked [K, ...].

    Specialist k (0-based) separates background, target k + 1, and remaining targets:
    [B, H, W, F] -> logits [K, B, H, W, 3].

    The parameters are those of a `nn.vmap`ped head. Only the lowering differs: `vmap` over both
    features and kernels makes XLA emit a grouped convolution, whose gradient is 40 to 60 times
    slower on CPUs. All heads read the same map, so their 1x1 convolutions are one wide one, their
    batch norms one wide batch norm, and the small last convolutions stand side by side.
    """

    num_targets: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        k, f = self.num_targets, x.shape[-1]
        kernel1 = self.param("conv1_kernel", stacked_init, (k, 1, 1, f, f))
        bias1 = self.param("conv1_bias", nn.initializers.zeros, (k, f))
        kernel2 = self.param("conv2_kernel", stacked_init, (k, 3, 3, f, 3))
        bias2 = self.param("conv2_bias", nn.initializers.zeros, (k, 3))
        x = conv(x, jnp.moveaxis(kernel1, 0, 3).reshape(1, 1, f, k * f)) + bias1.reshape(-1)
        x = x.reshape(*x.shape[:-1], k, f)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis=(-2, -1), name="bn")
        x = nn.leaky_relu(norm(x), 0.01)
        return jnp.stack([conv(x[..., i, :], kernel2[i]) + bias2[i] for i in range(k)])


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Same-padded convolution, NHWC by HWIO."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
