"""From a scan's own grid to the training grid and back."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.runtime.errors import UserError

LARGEST = 8192  # pixels along an axis
MOST_VOXELS = 2**31
Spacing = tuple[float, float, float] | None  # millimetres along D, H, W of a volume


class Grid(NamedTuple):
    """What slices, or volumes, are resampled to for the network.

    Attributes:
      size: pixels a side of squares, to which slices of any shape are stretched, as the literature
        does; nearest neighbour for images and labels.
      pixel: millimetres of a pixel instead, along both axes, so that all scans are seen at one
        scale; images are interpolated linearly. 0 for squares.
      between: millimetres from slice to slice, of volumes; 0 leaves the slices that there are.
    """

    size: int
    pixel: float = 0
    between: float = 0

    @classmethod
    def of(cls, data: ConfigDict) -> "Grid":
        """Of a data set's options."""
        return cls(data.size, data.spacing, data.slice_spacing)

    @property
    def name(self) -> str:
        slices = f"{self.between:g}x" if self.between else ""
        return slices + (f"{self.pixel:g}mm" if self.pixel else str(self.size))

    def shape(self, shape: tuple[int, int, int], spacing: Spacing) -> tuple[int, int, int]:
        """Of a volume that has `shape` [D, H, W] and `spacing`.

        Raises:
          UserError: the spacing is needed and not known, or makes a volume that can not be.
        """
        targets = self.between, self.pixel, self.pixel
        if any(targets) and spacing is None:
            name = "spacing" if self.pixel else "slice_spacing"
            raise UserError(
                f"data.{name} needs scans that tell their voxel size; leave it out (or, from "
                "Python, give spacing)"
            )
        found = [shape[0], self.size, self.size]
        for axis, target in enumerate(targets):
            if target:
                found[axis] = 1 + round((shape[axis] - 1) * spacing[axis] / target)
        lost = self.pixel and min(found[1:]) == 1 < min(shape[1:])
        if lost or any(targets) and (max(found) > LARGEST or math.prod(found) > MOST_VOXELS):
            was, would = (" x ".join(map(str, x)) for x in (shape, found))
            raise UserError(
                f"a scan of {was} voxels with a voxel size of {spacing} mm would have {would}; "
                "check its header, data.spacing and data.slice_spacing"
            )
        return tuple(found)

    def aspect(self, shape: tuple[int, int]) -> float:
        """Height by width of a pixel of the grid, in pixels of the scan: not 1 where slices are
        stretched to squares."""
        return 1.0 if self.pixel else shape[0] / shape[1]

    def image(self, stack: np.ndarray, spacing: Spacing) -> np.ndarray:
        """uint16 [C, D, H, W] of a volume -> the same on the grid."""
        depth, height, width = self.shape(stack.shape[1:], spacing)
        stack = _along_depth(stack, depth, resize_linear)
        return (resize_linear if self.pixel else resize)(stack, height, width)

    def label(self, label: np.ndarray, spacing: Spacing) -> np.ndarray:
        """Labels [D, H, W] of a volume -> the same on the grid."""
        depth, height, width = self.shape(label.shape, spacing)
        return resize(_along_depth(label, depth, resize), height, width)


def _along_depth(stack, depth, resize):
    """[..., D, H, W] with `depth` slices, made by `resize` as if they were rows."""
    *leading, old, height, width = stack.shape
    if depth == old:
        return stack
    rows = stack.reshape(*leading, old, height * width)
    return resize(rows, depth, height * width).reshape(*leading, depth, height, width)


def resize_linear(stack: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes every slice of [..., H, W] of integers, linearly on corner-aligned grids."""
    found, dtype = stack, stack.dtype
    if height != stack.shape[-2]:
        rows = _neighbours(stack.shape[-2], height)
        found = sum(found[..., at, :] * share[:, None] for at, share in rows)
    if width != stack.shape[-1]:
        columns = _neighbours(stack.shape[-1], width)
        found = sum(found[..., at] * share for at, share in columns)
    return np.rint(found).astype(dtype)


def resize(stack: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes every slice of [..., H, W], nearest neighbour on corner-aligned grids.

    This is `scipy.ndimage.zoom(order=0)`, which the literature uses for images and labels alike.
    """
    rows, columns = map(_nearest, stack.shape[-2:], (height, width))
    return stack[..., rows[:, None], columns]


def _nearest(old, new):
    """Of each of `new` samples the nearest of `old`."""
    return np.floor(_places(old, new) + 0.5).astype(int)


def _places(old, new):
    """Where `new` samples lie among `old` ones, the first and the last on each other."""
    return np.arange(new) * ((old - 1) / max(new - 1, 1))


def upsampled_labels(probs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels uint8 [D, height, width] of scores of classes [D, H, W, C], such as probabilities,
    which are interpolated linearly, on corner-aligned grids too.

    Only where the four pixels around a place have different labels need they be interpolated.
    """
    labels = np.argmax(probs, -1).astype(np.uint8)
    if labels.shape[1:] == (height, width):
        return labels
    rows, columns = (
        _neighbours(old, new) for old, new in zip(probs.shape[1:3], (height, width), strict=True)
    )
    (above, _), (left, _) = rows[0], columns[0]
    padded = np.pad(labels, [(0, 0), (0, 1), (0, 1)], "edge")
    others = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, 1:, 1:]
    mixed_up = functools.reduce(np.logical_or, (labels != other for other in others))
    first, unsure = (x.take(above, 1).take(left, 2) for x in (labels, mixed_up))
    d, y, x = np.nonzero(unsure)
    mixed = sum(
        probs[d, r[y], c[x]] * (share_r[y] * share_c[x])[:, None]
        for (r, share_r), (c, share_c) in itertools.product(rows, columns)
    )
    first[d, y, x] = np.argmax(mixed, -1)
    return first


def slices_of(
    stack: Iterable[np.ndarray], old: int, depth: int, *linear: bool
) -> Iterator[list[np.ndarray]]:
    """The `depth` slices that a stack of `old` slices of numbers is resampled to, on corner-aligned
    grids, each in several ways: interpolated linearly, or as nearest neighbour. Of the stack two
    are held at a time."""
    (below, _), (above, shares) = _neighbours(old, depth)
    nearest, coming, read, before, last = _nearest(old, depth), iter(stack), -1, None, None
    for a, b, share, near in zip(below, above, shares, nearest, strict=True):
        while read < b:
            before, last, read = last, next(coming), read + 1
        lower = last if a == read else before
        mixed = lower * (1 - share) + last * share if share and any(linear) else lower
        yield [mixed if own else lower if near == a else last for own in linear]


def _neighbours(old, new):
    """Of each of `new` samples the two of `old` around it, and the share of each."""
    at = _places(old, new)
    below = np.floor(at).astype(int)
    share = (at - below).astype(np.float32)
    return (below, 1 - share), (np.minimum(below + 1, old - 1), share)
