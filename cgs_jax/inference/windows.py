"""Images that are too large for the network at once: overlapping windows, all of one shape.

Neighbours overlap by half. Each counts most at its centre, by a Gaussian: there the network sees
all around (as nnU-Net does, Isensee et al., Nature Methods 2021). Any number of axes will do.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def blend(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    window: Sequence[int],
    batch: int,
) -> np.ndarray:
    """Scores [B, *S, C] of images [B, *S, ...], as weighted means over the windows.

    Args:
      predict: [batch, *window, ...] -> float [batch, *window, C]; it is only asked for this one
        shape.
      window: pixels along each axis of S. Beyond the image a window is 0.
      batch: windows that are predicted together, of all images.
    """
    shape, total = images.shape[1 : 1 + len(window)], None
    images = _as_large(images, 1, window)
    own = placed(images.shape[1 : 1 + len(window)], window)
    parts = (((i, *place), weights) for place, weights in own for i in range(len(images)))
    for place, scores in _weighted(predict, images, parts, batch):
        if total is None:
            total = np.zeros((*images.shape[: 1 + len(window)], scores.shape[-1]), scores.dtype)
        total[place] += scores
    return total[:, *(slice(n) for n in shape)]


def slices(
    predict: Callable[[np.ndarray], np.ndarray],
    volume: np.ndarray,
    window: Sequence[int],
    batch: int,
) -> Iterator[np.ndarray]:
    """Scores [H, W, C] of one slice of a volume [D, H, W, ...] after the other, as `blend` makes
    them. No more are held than a window is deep: those of all slices and classes may be larger than
    the memory."""
    depth, height, width = volume.shape[:3]
    volume, held, first = _as_large(volume, 0, window), None, 0
    parts = placed(volume.shape[:3], window)
    for (deep, *place), scores in _weighted(predict, volume, parts, batch):
        if held is None:
            held = np.zeros((window[0], *volume.shape[1:3], scores.shape[-1]), scores.dtype)
        done = deep.start - first  # no later window reaches these
        if done:
            yield from held[:done, :height, :width]
            held = np.concatenate([held[done:], np.zeros_like(held[:done])])
            first += done
        held[:, *place] += scores
    yield from held[: depth - first, :height, :width]


def _as_large(images, leading, window):
    """Images whose axes after the `leading` ones are at least as long as those of a window."""
    lacking = [max(w - n, 0) for w, n in zip(window, images.shape[leading:], strict=False)]
    padding = np.zeros((images.ndim, 2), int)
    padding[leading : leading + len(window), 1] = lacking
    return np.pad(images, padding)


def _weighted(predict, images, parts, batch):
    """Of each of `parts`, an iterator over pairs of a place in `images` and weights, the place and
    its weighted scores, predicted `batch` together."""
    while some := list(itertools.islice(parts, batch)):
        stack = np.stack([images[place] for place, _ in some])
        stack = np.pad(stack, [(0, batch - len(some)), *[(0, 0)] * (stack.ndim - 1)])
        for (place, weights), scores in zip(some, np.asarray(predict(stack)), strict=False):
            yield place, weights[..., None].astype(scores.dtype) * scores


def placed(
    shape: Sequence[int], window: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Where the windows of an image of `shape`, at least as large, lie, and the weights [*window]
    of their pixels. At every pixel the weights of all windows sum to 1."""
    along = [list(_along(n, w)) for n, w in zip(shape, window, strict=True)]
    for parts in itertools.product(*along):
        places, weights = zip(*parts, strict=True)
        yield places, functools.reduce(np.multiply, np.ix_(*weights))


def _along(size, window):
    """Places and weights [window] of the windows along one axis, evenly spread."""
    steps = -(-2 * (size - window) // window)  # of half a window at most
    starts = np.linspace(0, size - window, steps + 1).round().astype(int)
    gaussian = np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / (window / 8)) ** 2)
    total = np.zeros(size)
    for start in starts:
        total[start : start + window] += gaussian
    for start in starts:
        place = slice(int(start), int(start) + window)
        yield place, gaussian / total[place]
