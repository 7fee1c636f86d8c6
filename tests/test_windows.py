"""Overlapping windows against the whole image, in two and in three dimensions."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from cgs_jax.data import grid
from cgs_jax.data.volume import Volume
from cgs_jax.inference import windows
from cgs_jax.inference.predictor import Predictor


def says(seen):
    """Class scores that are functions of the pixel."""

    def predict(images):
        seen.add(images.shape)
        x = images.astype(np.float32)
        return np.stack([np.tanh(x / 99), np.cos(x), x**2 / 1000], -1)

    return predict


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((37, 23), (8, 8)),
        ((16, 9), (16, 8)),
        ((7, 30), (8, 10)),  # smaller than the window along an axis
        ((11, 13, 17), (5, 8, 6)),
        ((3, 20, 8), (4, 8, 8)),
    ],
)
def test_windows_equal_the_whole(shape, window):
    images, seen = np.random.default_rng(0).integers(0, 99, (2, *shape)), set()
    scores = windows.blend(says(seen), images, window, 3)
    np.testing.assert_allclose(scores, says(set())(images), rtol=1e-5, atol=1e-6)
    assert scores.dtype == np.float32
    assert seen == {(3, *window)}


@pytest.mark.parametrize(
    ("shape", "window", "batch"),
    [
        ((11, 13, 17), (5, 8, 6), 4),  # 4 x 3 x 5 windows
        ((40, 7, 6), (8, 8, 8), 4),  # 9, of which each covers the slices
        ((40, 7, 6), (8, 8, 8), 100),
        ((3, 20, 8), (4, 8, 8), 3),  # fewer slices than a window
        ((6, 9, 9), (1, 8, 8), 3),  # several windows at one depth
    ],
)
def test_slices_of_volumes_one_after_the_other(shape, window, batch):
    """The very numbers of the volume as a whole, by as many batches. Slices come as soon as no
    other window reaches them, and no more are held than a window is deep."""
    volume, made = np.random.default_rng(0).integers(0, 99, shape), []

    def predict(images):
        made.append(images)
        return says(set())(images)

    expected = windows.blend(predict, volume[None], window, batch)[0]
    batches, deepest = made[:], 0
    made.clear()
    found = []
    for scores in windows.slices(predict, volume, window, batch):
        found.append(scores.copy())
        deepest = max(deepest, len(scores.base))
    assert deepest <= window[0]
    np.testing.assert_array_equal(np.stack(found), expected)
    for a, b in zip(made, batches, strict=True):
        np.testing.assert_array_equal(a, b)
    early = windows.slices(predict, np.zeros((400, 8, 8)), (8, 8, 8), 4)
    made.clear()
    next(early)
    assert len(made) == 1


@pytest.mark.parametrize(("old", "depth"), [(1, 3), (5, 5), (4, 9), (9, 4), (7, 1), (2, 30)])
def test_stacks_are_resampled_as_they_come(old, depth):
    """Against scipy, in both ways at once; of the stack none is asked for long before its turn."""
    stack, asked = np.random.default_rng(0).random((old, 2, 3)), []
    coming = (asked.append(i) or x for i, x in enumerate(stack))
    found = []
    for i, both in enumerate(grid.slices_of(coming, old, depth, True, False)):
        found.append(both)
        assert asked[-1] <= np.floor(i * (old - 1) / max(depth - 1, 1)) + 1
    for which, own in enumerate(zip(*found, strict=True)):
        zoom = (depth / old, 1, 1)
        expected = ndimage.zoom(stack, zoom, order=1 - which) if depth > 1 else stack[:1]
        np.testing.assert_allclose(own, expected, atol=1e-6)
    (alone,) = zip(*grid.slices_of(stack, old, depth, False), strict=True)
    np.testing.assert_array_equal(alone, [nearest for _, nearest in found])


@pytest.mark.parametrize(("shape", "window"), [((37, 24), (8, 24)), ((11, 13, 17), (5, 8, 6))])
def test_weights_sum_to_one(shape, window):
    """Windows follow each other by half of their side at most, and count most at their centre."""
    total, corners = np.zeros(shape), []
    for place, weights in windows.placed(shape, window):
        assert weights.shape == total[place].shape == window
        assert (weights > 0).all()
        total[place] += weights
        corners.append([part.start for part in place])
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    for axis, side in enumerate(window):
        starts = sorted({corner[axis] for corner in corners})
        assert np.diff(starts).max(initial=0) <= -(-side // 2)
    (*_, (_, inner), _, _) = list(windows.placed((40,), (10,)))
    assert inner.argmax() in (4, 5)
    assert inner.max() > 100 * inner.min()


def test_slices_that_fit_are_taken_whole():
    config = ConfigDict(
        {"data": {"name": "acdc", "size": 24, "classes": ("a", "b")}, "eval_batch": 3}
    )
    config.data.update(spacing=0, slice_spacing=0, depth=0)
    config.update(upsample="nearest", largest_component=False, window=0)
    stack, labels = np.random.default_rng(0).integers(0, 99, (4, 30, 20), np.uint16), {}
    volumes = [("", Volume(stack[None], None, None))]
    for side, shapes in ((0, {(3, 24, 24)}), (24, {(3, 24, 24)}), (8, {(3, 8, 8)})):
        config.window, seen = side, set()
        of_pixels = says(seen)
        predictor = Predictor(lambda x, of_pixels=of_pixels: of_pixels(x[..., 0]), config)
        ((_, (labels[side],)),) = predictor.labels(volumes, predictor.scoring)
        assert seen == shapes
    np.testing.assert_array_equal(labels[0], labels[24])
    np.testing.assert_array_equal(labels[0], labels[8])
