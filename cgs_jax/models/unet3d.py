"""The UNet of `unet.py` for volumes: the same blocks with kernels of three axes.

Scans are often coarser across slices than within (3D U-Net, Cicek et al., 1606.06650; strides and
kernels by spacing as nnU-Net has them, Isensee et al., Nature Methods 2021).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from cgs_jax.models import packed, unet
from cgs_jax.runtime.errors import UserError

levels, stride, load_weights = unet.levels, unet.stride, unet.load_weights


class Backbone(unet.Backbone):
    """Volume [B, D, H, W, channels] -> feature maps [B, D', H', W', channels], each with its pack,
    1. H and W divide by `stride`, D by `depth_stride`.

    Attributes:
      depth_strides: between each level and the next, 2 where the number of slices is halved, too,
        or 1. A level before a 1 sees each slice alone: its kernels are 1 x 3 x 3. The others are
        those of the UNet for slices.
    """

    depth_strides: Sequence[int] = (2, 2, 2, 2)

    def kernel_size(self, level):
        return (1 if (*self.depth_strides, 2)[level] == 1 else 3, 3, 3)

    def pool(self, x, level, pack):
        """Maxima of 2 x 2 pixels, and of two slices where the depth is halved."""
        slices, back = packed.by_slice(x)
        x = back(super().pool(slices, level, pack))
        return x if self.depth_strides[level] == 1 else jnp.maximum(x[:, 0::2], x[:, 1::2])

    def upsample(self, x, level, pack, packed_twice):
        """Doubles H and W, and D where it was halved, linearly with corner-aligned grids."""
        slices, back = packed.by_slice(x)
        x = back(super().upsample(slices, level, pack, packed_twice))
        if self.depth_strides[level] == 1:
            return x
        b, d, h, w, c = x.shape
        return packed.double_rows(x.reshape(b, d, h * w, c)).reshape(b, 2 * d, h, w, c)


def depth_stride(model: Any) -> int:
    """What the numbers of slices must divide by."""
    return math.prod(model.depth_strides)


def check(model: Any) -> None:
    """Raises UserError where the options of `config.model` can not be."""
    unet.check(model)
    strides = tuple(model.depth_strides)
    if len(strides) != len(model.channels) - 1 or not set(strides) <= {1, 2}:
        raise UserError(
            f"model.depth_strides={strides}: 1 or 2 between the {len(model.channels)} levels of "
            "model.channels, one less than these"
        )
