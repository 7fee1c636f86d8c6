"""Batches: what a step takes of the training data."""

import numpy as np

from cgs_jax.data import cache, streams
from cgs_jax.data.streams import Stream
from layouts import STREAMS, everything, lists


def test_stream_is_a_function_of_seed_and_step(thorax):
    config, _ = thorax
    data = cache.prepare(config)
    whole, rest = (streams.batches(data, config, STREAMS)[start:] for start in (0, 10))
    assert len(whole) == 40
    assert len(rest) == 30
    for i in (0, 7, 29):
        for name in STREAMS:
            np.testing.assert_array_equal(rest[i][name]["image"], whole[i + 10][name]["image"])
    config.seed = 1
    other = streams.batches(data, config, STREAMS)
    assert any(
        (other[i]["labelled"]["image"] != whole[i]["labelled"]["image"]).any() for i in (0, 1)
    )
    loaded = list(streams.prefetched(rest, lambda batch: batch))
    assert len(loaded) == 30
    np.testing.assert_array_equal(loaded[5]["labelled"]["label"], rest[5]["labelled"]["label"])


def test_order_of_the_slices_stays(thorax):
    """It decides the results of every seed, so no change may touch it."""
    config, _ = thorax
    data = cache.prepare(config)
    row = {x.tobytes(): i for i, x in enumerate(everything(data)[0])}
    batches = streams.batches(data, config, STREAMS)
    for step, labelled, unlabelled in (
        (0, [4, 11, 2, 6], [15, 12, 16]),
        (7, [8, 11, 6, 3], [14, 13, 15]),
        (39, [4, 10, 7, 3], [15, 12, 17]),
    ):
        batch = batches[step]
        assert [row[x.tobytes()] for x in batch["labelled"]["image"]] == labelled
        assert [row[x.tobytes()] for x in batch["unlabelled"]["image"]] == unlabelled
        np.testing.assert_array_equal(batch["labelled"]["label"], data.labels(np.array(labelled)))


def test_a_method_may_ask_for_any_streams(thorax):
    config, _ = thorax
    two = {"exemplar": Stream("labelled", True, 1), "images": Stream("labelled", False, 2)}
    batch = streams.batches(cache.prepare(config), config, two)[0]
    shapes = {name: {key: x.shape for key, x in part.items()} for name, part in batch.items()}
    image, label = (16, 16, 1), (16, 16)
    assert shapes == {
        "exemplar": {"image": (1, *image), "aspect": (1,), "label": (1, *label)},
        "images": {"image": (2, *image), "aspect": (2,)},
    }


def test_every_slice_once_an_epoch_and_no_label_in_the_unlabelled_stream(thorax):
    config, _ = thorax
    data = cache.prepare(config)
    images, _ = everything(data)
    batches = streams.batches(data, config, STREAMS)
    assert set(batches[0]["unlabelled"]) == {"image", "aspect"}
    labelled = np.concatenate([batches[i]["labelled"]["image"] for i in range(6)])
    for epoch in (labelled[:12], labelled[12:]):  # 12 slices, 4 a step
        assert {x.tobytes() for x in epoch} == {x.tobytes() for x in images[:12]}
    unlabelled = np.concatenate([batches[i]["unlabelled"]["image"] for i in range(2)])
    assert {x.tobytes() for x in unlabelled} == {x.tobytes() for x in images[12:]}


def test_fewer_labelled_slices_than_the_batch_repeat(thorax):
    config, _ = thorax
    many, one = ({"labelled": Stream("labelled", True, count)} for count in (30, 1))
    batches = streams.batches(cache.prepare(config), config, many)
    assert batches[0]["labelled"]["image"].shape == (30, 16, 16, 1)
    assert len({x.tobytes() for x in batches[0]["labelled"]["image"]}) == 12
    single = streams.batches(cache.prepare(config), config, one)
    assert single[39]["labelled"]["label"].shape == (1, 16, 16)


def test_processes_share_one_global_batch(thorax):
    config, _ = thorax
    data = cache.prepare(config)

    def images(*mine):
        return streams.batches(data, config, STREAMS, *mine)[3]["labelled"]["image"]

    halves = [images(lambda n, i=i: np.array_split(np.arange(n), 2)[i]) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), images())


def test_unlabelled_pool_falls_back_to_the_labelled_images(thorax):
    config, root = thorax
    lists(root.parent / "lists", train=["Patient_01", "Patient_02"])
    data = cache.prepare(config)
    (labelled,), (unlabelled,) = data.sources().values()
    assert labelled.tolist() == unlabelled.tolist() == list(range(12))
