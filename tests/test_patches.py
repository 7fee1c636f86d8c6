"""Windows of slices, and statistics of batch norm that are averaged over many of them."""

import zlib

import jax
import numpy as np
import pytest

from cgs_jax import main
from cgs_jax.data import cache, case_lists, patches, streams, tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.prepared import Entry, Prepared
from cgs_jax.data.streams import Stream
from cgs_jax.data.volume import NO_LABEL, Volume
from cgs_jax.runtime import devices, processes
from cgs_jax.training import batch_norm, loop, train_step
from runs import config_of, saved_state
from steps import tiny

STREAMS = {"labelled": Stream("labelled", True, 4), "unlabelled": Stream("unlabelled", False, 3)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Six slices of 16 x 16 pixels, all values different; the label is a function of the image."""
    folder = tmp_path_factory.mktemp("prepared")
    images = np.random.default_rng(0).permutation(6 * 16 * 16).astype(np.uint16)
    folders = {f"c{i}": folder / f"c{i}" for i in range(6)}
    for path, image in zip(folders.values(), images.reshape(6, 1, 1, 16, 16), strict=True):
        cache.write(path, Volume(image, (image[0] % 3).astype(np.uint8), None), Grid(16))
        assert {x.name for x in path.iterdir()} == {"image.npy", "label.npy", "case.json"}
    cases = list(folders)
    task = tasks.find(tiny().data, "")
    entries = {case: Entry(path, task) for case, path in folders.items()}
    return Prepared(entries, case_lists.Splits(cases, [], [], cases[:3]), task.data.classes)


def options(**fields):
    return tiny(**{"data.patch": 8, "data.patch_spread": 2} | fields)


def batches(prepared, config, start=0, *mine):
    return streams.batches(prepared, config, STREAMS, *mine)[start:]


def test_windows_move_with_their_label_and_repeat_on_resume(prepared):
    config = options()
    whole, rest = batches(prepared, config), batches(prepared, config, 10)
    for step in (0, 7, 29):
        again = rest[step]
        jax.tree.map(np.testing.assert_array_equal, again, whole[step + 10])
        assert again["labelled"]["image"].shape == (4, 8, 8, 1)
        assert again["unlabelled"]["image"].shape == (3, 8, 8, 1)
        image, label = (again["labelled"][name] for name in ("image", "label"))
        np.testing.assert_array_equal(image[..., 0] % 3, label)
        assert set(again["unlabelled"]) == {"image", "aspect"}
    slices = prepared.images(np.arange(6))
    places = {tuple(np.argwhere(slices == x[0, 0])[0, 1:3].tolist()) for x in first(whole)}
    assert len(places) > 5  # each image has a place of its own
    config.seed = 1
    other = batches(prepared, config)
    assert any(
        (other[i]["unlabelled"]["image"] != whole[i]["unlabelled"]["image"]).any() for i in (0, 1)
    )


def test_windows_stay_where_they_are(prepared):
    """They decide the results of every seed, so no change may touch them."""
    fields = {"data.patch_foreground": 0.4, "data.grow_at": (0.5,), "data.grow_to": (12,)}
    dataset = batches(prepared, options(seed=3, **fields))
    for step, *sums in (
        (0, 1330388326, 3456720209, 2282846869),
        (7, 3365825371, 1232293957, 1208923234),
        (59, 2083724959, 1301873307, 3961722815),
    ):
        batch = dataset[step]
        of = batch["labelled"]
        arrays = (of["image"], of["label"], batch["unlabelled"]["image"])
        assert [zlib.crc32(x) for x in arrays] == sums


def first(dataset, steps=10):
    return np.concatenate([dataset[i]["unlabelled"]["image"] for i in range(steps)])


def test_processes_cut_the_windows_of_one_global_batch(prepared):
    halves = [
        batches(prepared, options(), 0, lambda n, i=i: np.arange(n)[i::2])[3]["labelled"]["image"]
        for i in (0, 1)
    ]
    whole = batches(prepared, options())[3]["labelled"]["image"]
    np.testing.assert_array_equal(whole[0::2], halves[0])
    np.testing.assert_array_equal(whole[1::2], halves[1])


def corners(label=None, count=2000, **fields):
    data, rng = options(**fields).data, np.random.RandomState(0)
    organs = None if label is None else lambda: patches.places(label)
    return np.array([patches.corner(rng, data, (16, 16), (8, 8), organs) for _ in range(count)])


def test_where_windows_lie():
    """Anywhere: all 81 places, about equally often; else near the centre, or around an organ."""
    places, count = np.unique(corners(**{"data.patch_anywhere": 1.0}), axis=0, return_counts=True)
    assert (len(places), places.min(), places.max()) == (81, 0, 8)
    assert count.max() < 3 * count.min()
    central = corners(**{"data.patch_anywhere": 0.0})
    assert set(central.ravel()) == {2, 3, 4, 5, 6}  # the central window begins at 4
    label = np.zeros((16, 16), np.uint8)
    label[:3], label[13, 13] = 2, 1  # a large organ, and one of a pixel
    fields = {"data.patch_anywhere": 0.0, "data.patch_foreground": 1.0}
    around = corners(label, **fields)
    small = (around == 8).all(1)  # the last place, for the slice ends there
    assert 0.4 < small.mean() < 0.6
    assert (around[~small][:, 0] == 0).all()
    assert set(corners(np.zeros_like(label), **fields).ravel()) == {2, 3, 4, 5, 6}


def test_places_of_organs(monkeypatch):
    """All pixels of each organ, or some that are spread over it."""
    label = np.random.default_rng(0).choice([0, 2, 5, NO_LABEL], (6, 7, 8)).astype(np.uint8)
    two, five = patches.places(label)
    np.testing.assert_array_equal(two, np.argwhere(label == 2))
    np.testing.assert_array_equal(five, np.argwhere(label == 5))
    monkeypatch.setattr(patches, "MOST_PLACES", 9)
    some = patches.places(label)[0]
    assert len(some) == 9
    assert (some[0] == two[0]).all()
    assert (some[-1] == two[-1]).all()
    assert (label[tuple(some.T)] == 2).all()


def test_windows_grow(prepared):
    config = options(**{"data.grow_at": (0.5, 0.9), "data.grow_to": (12, 0), "total_steps": 20})
    sides = [batches(prepared, config)[i]["labelled"]["image"].shape[1] for i in range(20)]
    assert sides == [8] * 10 + [12] * 8 + [16] * 2


def test_precise_statistics(prepared):
    """They are the means over the batches, from whatever running averages one starts."""
    config = options(precise_bn=3, **{"model.dropout": (0.5, 0.5)})
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    state = train_step.init_state(method, mesh)
    state = state.replace(step=state.step + 5)
    params, start = method.inference_variables(state)
    other = method.with_inference_state(state, jax.tree.map(lambda x: x + 3, start))
    dataset = loop.host_batches(method, prepared, mesh)
    precise = batch_norm.make_precise(method, dataset, mesh)
    (_, stats), (_, again) = (method.inference_variables(precise(s)) for s in (state, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), stats, again)
    # The first layer by hand: no dropout comes before it.
    kernel = params["backbone"]["down0"]["conv1"]["kernel"]
    means = []
    for step in (2, 3, 4):
        k_views, _ = train_step.step_keys(np.uint32(config.seed), step)
        views = train_step.make_views(method, mesh, dataset[step], k_views)
        images = [views["labelled"]["image"], views["unlabelled"]["weak"]]
        maps = [
            jax.lax.conv(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME")
            for x in images
        ]
        means.append(np.concatenate(maps).mean((0, 2, 3)))
    bias = params["backbone"]["down0"]["conv1"]["bias"]
    found = stats["batch_stats"]["backbone"]["down0"]["bn1"]["mean"]
    np.testing.assert_allclose(found, np.mean(means, 0) + bias, rtol=1e-4, atol=1e-6)
    plain = train_step.make_method(options())
    assert batch_norm.make_precise(plain, dataset, mesh)(state) is state


SLOWLY = [pytest.param(method, marks=pytest.mark.slow) for method in ("cmems", "versemi")]


@pytest.mark.parametrize("method", ["supervised", *SLOWLY])
def test_runs_with_windows_resume_to_the_bit(scans, tmp_path, monkeypatch, method):
    """Through a change of the side, and with precise statistics; 20 steps equal 10 and 10."""
    fields = {"data.patch": 16, "data.grow_at": (0.5,), "data.grow_to": (24,), "precise_bn": 4}
    fields |= {"total_steps": 20, "eval_every": 5, "pseudo_slices": 0, "test": False}
    if method == "cmems":
        fields["method.predicts"] = "mean"
    config = config_of(scans, method, **fields)
    main.run(config.copy_and_resolve_references(), tmp_path / "whole")
    stops = lambda self, step: setattr(self, "now", step == 7) or self.now  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(processes.Stop, "at", stops)
        assert main.run(config.copy_and_resolve_references(), tmp_path / "parts") is None
    main.run(config.copy_and_resolve_references(), tmp_path / "parts")
    whole, parts = (saved_state(tmp_path / name, config, 20) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
