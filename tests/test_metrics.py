"""Volume metrics with numbers known by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from cgs_jax.data.grid import resize, upsampled_labels
from cgs_jax.data.volume import NO_LABEL, Volume, keep_largest
from cgs_jax.inference import predictor
from cgs_jax.inference.predictor import Predictor
from cgs_jax.scoring import metrics, summaries
from steps import tiny


def cube(at, shape=(12, 12, 12), edge=4):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, a + edge) for a in at)] = True
    return mask


def test_identical_cubes():
    scores = metrics.score(cube((2, 2, 2)), cube((2, 2, 2)), (3.0, 1.0, 1.0))
    exact = {"dice": 1, "jaccard": 1, "hd95": 0, "asd": 0, "hd95_mm": 0, "asd_mm": 0, "missed": 0}
    assert scores == exact


def test_shifted_cube():
    """A cube of edge 4 moved by 2: a third of the union is shared."""
    scores = metrics.score(cube((2, 2, 2)), cube((4, 2, 2)), (3.0, 1.0, 1.0))
    assert scores["dice"] == pytest.approx(0.5)
    assert scores["jaccard"] == pytest.approx(1 / 3)
    assert scores["hd95"] == 2
    assert scores["hd95_mm"] == 6


def test_single_voxels_at_known_distance():
    a, b = np.zeros((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    a[1, 1, 1] = b[1, 4, 5] = True
    scores = metrics.score(a, b, (1.0, 2.0, 0.5))
    assert (scores["dice"], scores["hd95"], scores["asd"]) == (0, 5, 5)
    assert scores["asd_mm"] == pytest.approx(np.hypot(6, 2))


def test_asd_is_one_directional():
    """Prediction inside the truth's surface: every predicted voxel is near, not the reverse."""
    truth, pred = np.zeros((1, 1, 10), bool), np.zeros((1, 1, 10), bool)
    truth[..., :] = True
    pred[..., 0] = True
    assert metrics.score(pred, truth)["asd"] == 0
    assert metrics.score(truth, pred)["asd"] == pytest.approx(4.5)


def test_scores_of_labels():
    """Prediction first, spacing along D, H and W, several numbers as one region."""
    label, truth = np.zeros((2, 8, 8, 8), np.uint8)
    label[1, 1, 1], truth[1, 4, 5] = 1, 2
    scores = summaries._score(label, truth, (1, 2), (1.0, 2.0, 0.5), True)
    assert (scores["hd95"], scores["hd95_mm"]) == (5, pytest.approx(np.hypot(6, 2)))
    assert (scores["voxels"], scores["predicted"], scores["missed"]) == (1, 1, 0)
    label, truth = np.zeros((2, 1, 1, 10), np.uint8)
    truth[..., :], label[..., 0] = 1, 1
    assert summaries._score(label, truth, (1,), None, True)["asd"] == 0
    assert summaries._score(0 * label, truth, (1,), None, True)["missed"] == 1
    truth[..., 5:] = NO_LABEL  # what nobody annotated is not wrong
    label[...] = 1
    assert summaries._score(label, truth, (1,), None, False)["dice"] == 1


def test_spacing_is_that_of_the_scan():
    """Voxels that are 5 apart along the last axis, of .5 mm."""
    truth, guess = np.zeros((2, 2, 16, 16), np.uint8)
    truth[0, 3, 3], guess[0, 3, 8] = 1, 1
    volume = Volume(guess[None].astype(np.uint16), truth, (3.0, 2.0, 0.5))
    prepared = SimpleNamespace(
        volume=lambda case: volume,
        scored=lambda case: {"a": (1,)},
        by_task=lambda cases: {"": list(cases)},
    )
    found = Predictor(one_hot, CONFIG)
    (results,) = summaries.evaluate(found, prepared, ["x"], True, predictor.LITERATURE)
    assert results["x"]["a"]["hd95_mm"] == 2.5


def test_absent_organs():
    empty, full = np.zeros((4, 4, 4), bool), cube((0, 0, 0), (4, 4, 4), 2)
    both = metrics.score(empty, empty, (1, 1, 1))
    assert all(np.isnan(v) for v in both.values())
    for pred, truth in ((empty, full), (full, empty)):
        scores = metrics.score(pred, truth)
        missed = scores.pop("missed")
        assert missed == 1 if truth.any() else np.isnan(missed)
        assert scores == {"dice": 0, "jaccard": 0, "hd95": 50, "asd": 10}


def test_summary_counts_undefined_and_leaves_them_out():
    nan = float("nan")
    results = {
        "a": {"big": {"dice": 0.8}, "small": {"dice": nan}},
        "b": {"big": {"dice": 0.6}, "small": {"dice": 0.4}},
    }
    summary = summaries.summarise(results, tiny().data)
    assert summary["organs"]["big"]["dice"]["mean"] == pytest.approx(0.7)
    assert summary["organs"]["small"]["dice"] == {"mean": 0.4, "std": 0, "undefined": 1}
    assert summary["mean"]["dice"] == pytest.approx(0.55)
    assert "(1 undefined)" in summaries.table(summary)


DATA = {"name": "acdc", "spacing": 0, "size": 16, "classes": ("a", "b", "c"), "channels": 1}
DATA |= {"slice_spacing": 0, "depth": 0}
CONFIG = ConfigDict({"data": DATA, "eval_batch": 4})
CONFIG.update(window=0, upsample="nearest", largest_component=False)


def one_hot(slices):
    """A prediction whose labels are the intensities."""
    return np.eye(4, dtype=np.float32)[slices[..., 0]]


def test_segment_returns_every_volume_on_its_own_grid():
    """Slices of several volumes share batches; each comes back whole, in order, resized."""
    rng = np.random.default_rng(0)
    shapes = [(3, 16, 16), (1, 8, 24), (7, 16, 16), (2, 40, 12)]
    stacks = [rng.integers(0, 4, shape).astype(np.uint16) for shape in shapes]
    batches = []

    def predict(slices):
        batches.append(slices.shape)
        return one_hot(slices)

    named = ((i, Volume(stack[None], None, None)) for i, stack in enumerate(stacks))
    found = Predictor(predict, CONFIG).labels(named, predictor.LITERATURE)
    names, labels = zip(*found, strict=True)
    assert set(batches) == {(4, 16, 16, 1)}
    assert len(batches) == 4  # 13 slices
    assert names == (0, 1, 2, 3)
    for stack, (label,) in zip(stacks, labels, strict=True):
        expected = resize(resize(stack, 16, 16), *stack.shape[1:])
        np.testing.assert_array_equal(label, expected)


def test_resize_is_scipys_nearest_zoom():
    stack = np.random.default_rng(0).integers(0, 9, (2, 13, 37))
    for height, width in ((16, 16), (7, 64), (13, 37)):
        zoom = (1, height / 13, width / 37)
        expected = ndimage.zoom(stack, zoom, order=0)
        np.testing.assert_array_equal(resize(stack, height, width), expected)


def test_probabilities_are_interpolated_as_scipy_does():
    probs = np.random.default_rng(0).dirichlet([1, 1, 1, 1], (2, 16, 16)).astype(np.float32)
    for height, width in ((40, 23), (16, 16), (9, 64)):
        zoom = (1, height / 16, width / 16, 1)
        expected = ndimage.zoom(probs, zoom, order=1).argmax(-1)
        labels = upsampled_labels(probs, height, width)
        assert labels.shape == expected.shape
        assert np.mean(labels != expected) < 0.001  # ties up to rounding
    np.testing.assert_array_equal(upsampled_labels(probs, 16, 16), probs.argmax(-1))


def test_largest_component_of_every_organ():
    """A piece goes on through slices, not over corners."""
    labels = np.zeros((3, 6, 6), np.uint8)
    labels[0, 0, :3] = 1  # three voxels in a slice
    labels[:, 5, 5] = 1  # three, and one more below
    labels[2, 5, 4] = 1
    labels[0, 1, 3] = 1  # touches the first by a corner
    labels[1, 0, 0] = 3
    kept = keep_largest(labels, 3)
    expected = np.zeros_like(labels)
    expected[:, 5, 5] = expected[2, 5, 4] = 1
    expected[1, 0, 0] = 3
    np.testing.assert_array_equal(kept, expected)


def test_scorings_share_a_prediction():
    """Interpolated and cleaned, or not, from scores that are computed once."""
    labels = np.zeros((5, 16, 16), np.uint16)
    labels[:, 2:9, 2:9], labels[4, 13:, 13:] = 2, 2
    calls = []

    def predict(slices):
        calls.append(slices)
        return one_hot(slices)

    stack = resize(labels, 30, 20)
    ways = [
        predictor.LITERATURE,
        predictor.Scoring("linear", False),
        predictor.Scoring("linear", True),
    ]
    found = Predictor(predict, CONFIG).labels([("", Volume(stack[None], None, None))], *ways)
    ((_, (nearest, linear, cleaned)),) = found
    assert len(calls) == 2  # five slices, four a batch
    small = resize(stack, 16, 16)
    np.testing.assert_array_equal(nearest, resize(small, 30, 20))
    np.testing.assert_array_equal(linear, upsampled_labels(one_hot(small[..., None]), 30, 20))
    assert (nearest != linear).any()
    assert (linear[4, -1, -1], linear[4, 8, 8]) == (2, 2)
    assert (cleaned[4, -1, -1], cleaned[4, 8, 8]) == (0, 2)
