"""The UNet of `unet.py` for volumes: the same blocks with kernels of three axes.

Scans are often coarser across slices than within (3D U-Net, Cicek et al., 1606.06650; strides and
kernels by spacing as nnU-Net has them, Isensee et al., Nature Methods 2021).
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cgs_jax.models import packed, unet
from cgs_jax.models.unet import Conv, ConvBlock, drop_channels
from cgs_jax.runtime.errors import UserError

levels, stride, load_weights = unet.levels, unet.stride, unet.load_weights


class Backbone(nn.Module):
    """Volume -> feature maps, the last at full resolution.

    Attributes:
      channels: width of each level, finest first.
      dropout: encoder dropout of each level.
      depth_strides: between each level and the next, 2 where the number of slices is halved, too,
        or 1. A level before a 1 sees each slice alone: its kernels are 1 x 3 x 3.
    """

    channels: Sequence[int] = (16, 32, 64, 128)
    dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3)
    depth_strides: Sequence[int] = (2, 2, 2)

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, perturb: bool = False
    ) -> list[tuple[jax.Array, int]]:
        """[B, D, H, W, channels] in [0, 1] -> the bottleneck and the maps of the decoder, each
        [B, D', H', W', channels] and its pack, 1, coarsest first. H and W divide by `stride`, D by
        `depth_stride`.

        `perturb` appends a copy whose encoder maps lose half of their channels on their way to the
        decoder: [2 B, ...] (UniMatch, 2208.09910).
        """
        sizes = [(1 if step == 1 else 3, 3, 3) for step in (*self.depth_strides, 2)]
        skips = []
        for i, (width, rate) in enumerate(zip(self.channels, self.dropout, strict=True)):
            x = _pool(x, self.depth_strides[i - 1]) if i else x
            x = ConvBlock(width, 1, rate, sizes[i], name=f"down{i}")(x, train=train)
            skips.append(x)
        if perturb:
            keys = jax.random.split(self.make_rng("dropout"), len(skips))
            pairs = zip(skips, keys, strict=True)
            skips = [jnp.concatenate([s, drop_channels(s, 1, key)]) for s, key in pairs]
            x = skips[-1]
        maps = [(x, 1)]
        for i, level in enumerate(reversed(range(len(skips) - 1)), 1):
            width = self.channels[level]
            y, bias = Conv(width, 1, 1, name=f"up{i}_reduce")(x)
            x = packed.affine(y, None, bias, 1).astype(x.dtype)
            x = _upsample(x, self.depth_strides[level])
            block = ConvBlock(width, 1, 0.0, sizes[level], name=f"up{i}")
            x = block(skips[level], x, train=train)
            maps.append((x, 1))
        return maps


def _pool(x, depth_stride):
    """Maxima of 2 x 2 pixels, and of two slices where `depth_stride` is 2."""
    slices, back = packed.by_slice(x)
    x = back(packed.max_pool_2x2(slices, 1))
    return x if depth_stride == 1 else jnp.maximum(x[:, 0::2], x[:, 1::2])


def _upsample(x, depth_stride):
    """Doubles H and W, and D where `depth_stride` is 2, linearly with corner-aligned grids."""
    slices, back = packed.by_slice(x)
    x = back(packed.upsample_2x(slices, 1, False))
    if depth_stride == 1:
        return x
    b, d, h, w, c = x.shape
    return packed.double_rows(x.reshape(b, d, h * w, c)).reshape(b, 2 * d, h, w, c)


def depth_stride(model: Any) -> int:
    """What the numbers of slices must divide by."""
    return math.prod(model.depth_strides)


def check(model: Any, size: int) -> None:
    """Raises UserError where the options of `config.model` can not be, or slices of `size`."""
    unet.check(model, size)
    strides = tuple(model.depth_strides)
    if len(strides) != len(model.channels) - 1 or not set(strides) <= {1, 2}:
        raise UserError(
            f"model.depth_strides={strides}: 1 or 2 between the {len(model.channels)} levels of "
            "model.channels, one less than these"
        )
