"""Windows of slices or volumes, cut on the host: training at full resolution for the price of a
small image.

Where a window lies is a function of (seed, stream, place in the stream), so it is the same after a
resume and on any number of processes. Validation, test and prediction see whole slices, or with
`data.spacing`, `data.depth` or `config.window` overlapping windows.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.volume import NO_LABEL
from cgs_jax.runtime.errors import UserError

MOST_PLACES = 10_000  # of an organ that windows may be centred on


def shape(data: ConfigDict, step: int, total_steps: int) -> tuple[int, ...]:
    """Pixels along every axis of what a step sees, `window` of `data.patch`, or of what
    `data.grow_to` has from that share of the training on which `data.grow_at` names; `data.size`
    for whole slices."""
    patch = data.patch
    for share, later in zip(data.grow_at, data.grow_to, strict=True):
        if step >= round(share * total_steps):
            patch = later
    return window(data, patch or data.size)


def window(data: ConfigDict, side: int) -> tuple[int, ...]:
    """Pixels along every axis of a window of `side` pixels along H and W; of volumes `data.depth`
    slices come first."""
    return (data.depth, side, side) if data.depth else (side, side)


def check(data: ConfigDict, divisor: int, depth_divisor: int) -> None:
    """Raises UserError where the options of windows can not be; sides must divide by `divisor`, and
    numbers of slices by `depth_divisor`."""
    if data.depth < 0 or data.depth % depth_divisor:
        raise UserError(f"data.depth={data.depth}: 0 or more slices that divide by {depth_divisor}")
    for own in tasks.members(data).values():
        if own.slice_spacing and not data.depth:
            raise UserError("data.slice_spacing is for volumes (model=unet3d); leave it out")
        if own.exemplar and data.depth:
            raise UserError("data.exemplar is a slice; volumes have labelled cases: leave it out")
    if len(data.grow_at) != len(data.grow_to):
        raise UserError("data.grow_at and data.grow_to must have the same length")
    shares = all(isinstance(at, int | float) and 0 <= at <= 1 for at in data.grow_at)
    if not shares or sorted(data.grow_at) != list(data.grow_at):
        raise UserError(f"data.grow_at={data.grow_at}: shares of total_steps in rising order")
    grids = [Grid.of(own) for own in tasks.members(data).values()]
    sizes = {grid.size for grid in grids if not grid.pixel}
    for patch in (data.patch, *data.grow_to):
        if type(patch) is not int or patch % divisor or not 0 <= patch <= min(sizes, default=patch):
            raise UserError(
                f"data.patch or data.grow_to has {patch}: sides of windows divide by {divisor} and "
                f"are at most data.size={min(sizes, default='')}; 0 takes whole slices"
            )
        if not patch and any(grid.pixel for grid in grids):
            raise UserError("with data.spacing slices have many shapes: give data.patch")
        if not patch and sizes != {data.size}:
            raise UserError(
                f"slices of the members have {sorted(sizes)} pixels a side: give data.patch, or "
                "all of them one data.size"
            )
    shares = data.patch_anywhere, data.patch_foreground
    if min(shares) < 0 or sum(shares) > 1:
        raise UserError("data.patch_anywhere and data.patch_foreground are shares of 1")


def cut(
    images: Iterable[np.ndarray], corners: Sequence[tuple[int, ...]] | None, shape: tuple[int, ...]
) -> np.ndarray:
    """Stacks windows [..., *shape] of images [..., *S], whose first pixels are `corners`; whole
    images where those are None. Of memory-mapped images no more is read. Beyond the image a window
    is 0."""
    if corners is None:
        return np.stack(list(images))
    windows = []
    for x, corner in zip(images, corners, strict=True):
        place = (slice(at, at + n) for at, n in zip(corner, shape, strict=True))
        window = x[..., *place]
        lacking = np.subtract(shape, window.shape[-len(shape) :])
        if lacking.any():
            window = np.pad(window, [*[(0, 0)] * (x.ndim - len(shape)), *((0, n) for n in lacking)])
        windows.append(window)
    return np.stack(windows)


def places(label: np.ndarray) -> list[np.ndarray]:
    """Of each organ in a label [*S] pixels of it, [N, axes]: all, or if there are more than
    MOST_PLACES so many, spread evenly over it."""
    pixels = np.flatnonzero((label > 0) & (label < NO_LABEL))
    numbers, found = label.reshape(-1)[pixels], []
    for organ in np.flatnonzero(np.bincount(numbers)):
        own = pixels[numbers == organ]
        if len(own) > MOST_PLACES:
            own = own[np.linspace(0, len(own) - 1, MOST_PLACES).astype(int)]
        found.append(np.stack(np.unravel_index(own, label.shape), -1).astype(np.int32))
    return found


def corner(
    rng: np.random.RandomState,
    data: ConfigDict,
    of: tuple[int, ...],
    shape: tuple[int, ...],
    organs: Callable[[], Sequence[np.ndarray]] | None,
) -> tuple[int, ...]:
    """The place of the first pixel of one window of `shape` in an image whose shape is `of`.

    A share `data.patch_anywhere` of the windows lies anywhere, all places being equally likely; a
    share `data.patch_foreground` is centred, as far as the image allows, on a pixel of an organ,
    each organ of the image being equally likely; the centres of the others are at most
    `data.patch_spread` pixels beside that of the image along H and W, and along D anywhere.
    `organs` looks up `places` of the image; where it is None or finds none, windows that would be
    centred on an organ lie as those others do.
    """
    room = np.maximum(np.subtract(of, shape), 0)
    kind = rng.random_sample()
    if kind < data.patch_anywhere:
        return tuple(rng.randint(0, n + 1) for n in room)
    found = ()
    if organs and kind < data.patch_anywhere + data.patch_foreground:
        found = organs()
    if len(found):
        pixels = found[rng.randint(len(found))]
        first = pixels[rng.randint(len(pixels))] - np.array(shape) // 2
    else:
        first = room // 2
        first[-2:] += rng.randint(-data.patch_spread, data.patch_spread + 1, 2)
        first[:-2] = [rng.randint(0, n + 1) for n in room[:-2]]
    return tuple(np.clip(first, 0, room))
