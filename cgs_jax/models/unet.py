"""The 2D UNet of the semi-supervised literature (SSL4MIS family), written for XLA.

Numbers of the network after Wang et al., IEEE TMI 2025 (doi 10.1109/TMI.2025.3557537); U-Net after
Ronneberger et al., arXiv 1505.04597. Module names follow the PyTorch family, so weights map one to
one (`torch_weights.py`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# PyTorch's default for convolutions, which the published numbers were made with.
conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, C].

    Two elementwise maxima: the gradient of a reduce-window maximum is a select-and-scatter, the
    slowest operation of the step on every backend.
    """
    x = jnp.maximum(x[:, 0::2], x[:, 1::2])
    return jnp.maximum(x[:, :, 0::2], x[:, :, 1::2])


def upsample_2x(x: jax.Array, axis: int) -> jax.Array:
    """Doubles `axis` bilinearly with corner-aligned grids (torch's `align_corners=True`).

    Source position of output 2j is j - j/(2n-1), of output 2j+1 it is j + (n-1-j)/(2n-1): both lie
    next to j, so shifted slices and two ramps do it, without gather or matrix.
    """
    n = x.shape[axis]
    ramp = jnp.arange(n, dtype=x.dtype) / (2 * n - 1)
    ramp = ramp.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    before, after = jnp.roll(x, 1, axis), jnp.roll(x, -1, axis)  # what wraps round has weight 0
    even = x + ramp * (before - x)
    odd = x + jnp.flip(ramp, axis) * (after - x)
    shape = x.shape[:axis] + (2 * n,) + x.shape[axis + 1 :]
    return jnp.stack([even, odd], axis + 1).reshape(shape)


class ConvBlock(nn.Module):
    """Twice conv3x3 - batch norm - LeakyReLU, dropout between them.

    Attributes:
      features: output channels.
      dropout: rate between the two convolutions; 0 turns it off.
    """

    features: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in (1, 2):
            x = nn.Conv(self.features, (3, 3), kernel_init=conv_init, name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x)
            x = nn.leaky_relu(x, 0.01)
            if i == 1:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class Backbone(nn.Module):
    """Image -> feature map at full resolution; the heads are apart (`heads.py`).

    Attributes:
      channels: width of each level, finest first; H and W must divide by 2 ** (levels - 1).
      dropout: encoder dropout of each level.
    """

    channels: Sequence[int] = (16, 32, 64, 128, 256)
    dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, 1] in [0, 1] -> [B, H, W, channels[0]]."""
        skips = []
        for i, (width, rate) in enumerate(zip(self.channels, self.dropout, strict=True)):
            x = ConvBlock(width, rate, name=f"down{i}")(max_pool_2x2(x) if i else x, train)
            skips.append(x)
        for i, skip in enumerate(reversed(skips[:-1]), 1):
            width = skip.shape[-1]
            x = nn.Conv(width, (1, 1), kernel_init=conv_init, name=f"up{i}_reduce")(x)
            x = upsample_2x(upsample_2x(x, 1), 2)
            x = ConvBlock(width, name=f"up{i}")(jnp.concatenate([skip, x], -1), train)
        return x
