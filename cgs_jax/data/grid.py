"""From a scan's own grid to the training grid and back."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.runtime.errors import UserError

LARGEST = 8192  # pixels along an axis
Spacing = tuple[float, float, float] | None  # millimetres along D, H, W of a volume


class Grid(NamedTuple):
    """What slices are resampled to for the network.

    Attributes:
      size: pixels a side of squares, to which slices of any shape are stretched, as the literature
        does; nearest neighbour for images and labels.
      pixel: millimetres of a pixel instead, along both axes, so that all scans are seen at one
        scale; images are interpolated linearly. 0 for squares.
    """

    size: int
    pixel: float = 0

    @classmethod
    def of(cls, data: ConfigDict) -> "Grid":
        """Of a data set's options."""
        pixel = data.spacing
        if not isinstance(pixel, int | float) or not 0 <= pixel < np.inf:
            raise UserError(f"data.spacing={pixel}: give millimetres, such as 1.5, or median")
        return cls(data.size, pixel)

    @property
    def name(self) -> str:
        return f"{self.pixel:g}mm" if self.pixel else str(self.size)

    def shape(self, shape: tuple[int, int], spacing: Spacing) -> tuple[int, int]:
        """Of slices that have `shape` in a volume of `spacing`.

        Raises:
          UserError: the spacing is needed and not known, or makes slices that can not be.
        """
        if not self.pixel:
            return self.size, self.size
        if spacing is None:
            raise UserError("data.spacing needs scans that tell their voxel size; leave it out")
        ratios = np.array(spacing[1:]) / self.pixel
        height, width = 1 + np.rint((np.array(shape) - 1) * ratios)
        if max(height, width) > LARGEST:
            raise UserError(
                f"slices of {shape[0]} x {shape[1]} pixels with a voxel size of {spacing} mm would "
                f"have {height:.0f} x {width:.0f} pixels of {self.pixel:g} mm; check the header"
            )
        return int(height), int(width)

    def aspect(self, shape: tuple[int, int]) -> float:
        """Height by width of a pixel of the grid, in pixels of the scan: not 1 where slices are
        stretched to squares."""
        return 1.0 if self.pixel else shape[0] / shape[1]

    def image(self, stack: np.ndarray, spacing: Spacing) -> np.ndarray:
        """uint16 [C, D, H, W] of a volume -> the same on the grid."""
        shape = self.shape(stack.shape[-2:], spacing)
        return (resize_linear if self.pixel else resize)(stack, *shape)

    def label(self, label: np.ndarray, spacing: Spacing) -> np.ndarray:
        """Labels [D, H, W] of a volume -> the same on the grid."""
        return resize(label, *self.shape(label.shape[-2:], spacing))


def resize_linear(stack: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes every slice of [..., H, W] of integers, linearly on corner-aligned grids."""
    rows, columns = (
        _neighbours(old, new) for old, new in zip(stack.shape[-2:], (height, width), strict=True)
    )
    upright = sum(stack[..., at, :] * share[:, None] for at, share in rows)
    return np.rint(sum(upright[..., at] * share for at, share in columns)).astype(stack.dtype)


def resize(stack: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes every slice of [..., H, W], nearest neighbour on corner-aligned grids.

    This is `scipy.ndimage.zoom(order=0)`, which the literature uses for images and labels alike.
    """
    rows, columns = (
        np.floor(_places(old, new) + 0.5).astype(int)
        for old, new in zip(stack.shape[-2:], (height, width), strict=True)
    )
    return stack[..., rows[:, None], columns]


def _places(old, new):
    """Where `new` samples lie among `old` ones, the first and the last on each other."""
    return np.arange(new) * ((old - 1) / max(new - 1, 1))


def upsampled_labels(probs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels uint8 [D, height, width] of scores of classes [D, H, W, C], such as probabilities,
    which are interpolated linearly, on corner-aligned grids too.

    Only where the four pixels around a place have different labels need they be interpolated.
    """
    rows, columns = (
        _neighbours(old, new) for old, new in zip(probs.shape[1:3], (height, width), strict=True)
    )
    around = list(itertools.product(rows, columns))
    labels = np.argmax(probs, -1).astype(np.uint8)
    first, *others = (labels[:, r[:, None], c] for (r, _), (c, _) in around)
    unsure = functools.reduce(np.logical_or, (first != other for other in others))
    d, y, x = np.nonzero(unsure)
    mixed = sum(
        probs[d, r[y], c[x]] * (share_r[y] * share_c[x])[:, None]
        for (r, share_r), (c, share_c) in around
    )
    first[d, y, x] = np.argmax(mixed, -1)
    return first


def _neighbours(old, new):
    """Of each of `new` samples the two of `old` around it, and the share of each."""
    at = _places(old, new)
    below = np.floor(at).astype(int)
    share = (at - below).astype(np.float32)
    return (below, 1 - share), (np.minimum(below + 1, old - 1), share)
