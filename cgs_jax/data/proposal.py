"""Grid and windows for scans as they are: rules of thumb, which docs/own_data.md explains."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cgs_jax.data.fingerprint import Facts

# pixels a side of what a step sees, by platform
LARGEST = {"cpu": 128, "other": 256}
LARGEST_OF_VOLUMES = {"cpu": (32, 64), "other": (64, 128)}  # slices, and pixels a side
# Where windows are smaller than scans, organs may lie where those near the centre do not reach.
ANYWHERE = {"data.patch_anywhere": 0.5, "data.patch_foreground": 0.4}


def of_scans(
    facts: Mapping[str, Facts],
    stride: int,
    platform: str,
    poolings: int = 0,
    pixel: float = 0,
    depth_strides: Sequence[int] = (),
) -> dict[str, Any]:
    """Fields of the configuration: the grid, what a step sees of it, and how much of it.

    Slices of one shape and pixel are taken as they are, if they are square and not large; all
    others are resampled to their median pixel, and a step sees windows about as large as the median
    slice, at most what the device is fit for. Volumes are resampled to their median voxel, windows
    are about as large as the median scan, and slices are pooled once pixels have become as large as
    they are thick (as nnU-Net does it).

    Args:
      stride: what the sides of windows must divide by.
      platform: 'cpu', or another.
      poolings: how often a backbone for volumes pools them; 0: the network sees slices.
      pixel: millimetres to resample slices to, where that is given.
      depth_strides: how the levels of a backbone for volumes pool slices, where that is given.
    """
    if poolings:
        return _of_volumes(facts, poolings, stride, platform, depth_strides)
    largest = LARGEST.get(platform, LARGEST["other"])
    shapes = np.array([case.shape[1:] for case in facts.values()])
    pixels = np.array([case.spacing[1:] for case in facts.values()])
    side = int(shapes[0, 0])
    alike = not pixel and (shapes == side).all() and np.allclose(pixels, pixels[0], rtol=0.02)
    batch = 6 if platform == "cpu" else 12
    fields = {"batch.labelled": batch, "batch.unlabelled": batch}
    if alike and side % stride == 0 and side <= largest:
        return {"data.size": side} | fields
    extent = np.median(1 + (shapes - 1) * pixels / (pixel or np.median(pixels)), 0).max()
    patch = min(stride * math.ceil(extent / stride), largest)
    fields = {"data.spacing": "median", "data.patch": patch} | fields
    return fields | (ANYWHERE if patch < extent else {})


def for_devices(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same for so many devices that share a batch: as many images more as they need."""
    whole = lambda size: count * math.ceil(size / count)  # noqa: E731
    return {k: whole(v) if k.startswith("batch.") else v for k, v in fields.items()}


def _of_volumes(facts, poolings, stride, platform, depth_strides):
    spacings = np.array([case.spacing for case in facts.values()])
    between, pixel = np.median(spacings[:, 0]), np.median(spacings[:, 1:])
    extents = 1 + (np.array([case.shape for case in facts.values()]) - 1) * spacings
    depth, *sides = np.median(extents / (between, pixel, pixel), 0)
    strides, thick, wide = list(depth_strides), between, pixel
    for _ in range(0 if strides else poolings):
        strides.append(1 if thick > 2 * wide else 2)
        thick, wide = thick * strides[-1], 2 * wide
    most = LARGEST_OF_VOLUMES.get(platform, LARGEST_OF_VOLUMES["other"])
    fields = {"model.depth_strides": tuple(strides)}
    fields |= {"data.spacing": "median", "data.slice_spacing": "median"}
    for name, extent, step, largest in (
        ("data.depth", depth, math.prod(strides), most[0]),
        ("data.patch", max(sides), stride, most[1]),
    ):
        fields[name] = min(step * math.ceil(extent / step), largest)
        fields |= ANYWHERE if fields[name] < extent else {}
    return fields | {"batch.labelled": 2, "batch.unlabelled": 2}
