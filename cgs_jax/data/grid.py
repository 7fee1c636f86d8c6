"""From a scan's own grid to the training grid and back."""

import functools
import itertools

import numpy as np


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
