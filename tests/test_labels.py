"""Labels as their users number them: gaps, voxels that nobody annotated, and regions."""

import json
import weakref

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from cgs_jax import predict
from cgs_jax.data import cache, completion, patches, streams, tasks
from cgs_jax.data.layouts import nnunet as nnunet_layout
from cgs_jax.data.nifti import read_nifti
from cgs_jax.data.volume import NO_LABEL
from cgs_jax.inference.predictor import Scoring
from cgs_jax.methods import base, versemi
from cgs_jax.models.network import Outputs
from cgs_jax.runtime import devices
from cgs_jax.runtime.errors import UserError
from cgs_jax.scoring import nnunet_summary, summaries
from cgs_jax.training import train_step
from layouts import STREAMS, nnunet_folder, save
from steps import tiny, tiny_batch

GAPS = {"background": 0, "head": 300, "tail": 7, "ignore": 9}
REGIONS = {"background": 0, "whole": [1, 2, 4], "core": [2, 4], "active": 4}


def folder(tmp_path, labels, values):
    """An nnU-Net folder whose labels 0, 1, ... became `values`."""
    config, root = nnunet_folder(tmp_path, labels)
    for path in (root / "labelsTr").glob("*.nii.gz"):
        stored = np.asarray(nib.load(path).dataobj)
        save(path, np.array(values, np.int16)[stored])
    completion.complete(config.data)
    return config, root


def test_gaps_and_ignored_voxels(tmp_path):
    config, root = folder(tmp_path, GAPS, [0, 300, 9])
    assert config.data.classes == ("tail", "head")  # in the order of their numbers
    assert config.data.numbers == (7, 300)
    assert config.data.ignore == 9
    assert config.data.partial
    prepared = cache.prepare(config)
    case = prepared.splits.labelled[0]
    stored = np.asarray(nib.load(root / "labelsTr" / f"{case}.nii.gz").dataobj)
    own = np.select([stored == 300, stored == 9], [2, NO_LABEL], 0)
    np.testing.assert_array_equal(prepared.volume(case).label, own.transpose(2, 1, 0))
    assert set(np.unique(prepared.labels(prepared.rows([case])))) == {0, 2, NO_LABEL}
    # No window is centred on what nobody annotated.
    config.data.patch_anywhere, config.data.patch_foreground = 0.0, 1.0
    label = np.zeros((64, 64), np.uint8)
    label[50:, 50:], label[5, 5] = NO_LABEL, 1
    corner = patches.corner(
        np.random.RandomState(0), config.data, (64, 64), (16, 16), lambda: patches.places(label)
    )
    assert corner == (0, 0)


def test_slices_that_nobody_annotated_are_unlabelled(tmp_path):
    config, root = folder(tmp_path, GAPS, [0, 300, 7])
    for path in (root / "labelsTr").glob("*.nii.gz"):
        stored = np.asarray(nib.load(path).dataobj).copy()
        stored[..., 1:] = 9
        save(path, stored)
    prepared = cache.prepare(config)
    (labelled,), (rest,) = prepared.sources().values()
    assert len(labelled) == len(prepared.splits.labelled)  # the first slice of each case
    assert (prepared.labels(labelled) != NO_LABEL).all()
    np.testing.assert_array_equal(np.sort([*labelled, *rest]), prepared.rows(prepared.splits.train))
    for path in (root / "labelsTr").glob("*.nii.gz"):
        save(path, np.full((9, 8, 4), 9, np.uint8))
    with pytest.raises(UserError, match="no pixel of a labelled training case is annotated"):
        cache.prepare(config).sources()


def test_partial_labels_name_regions(tmp_path):
    """A region that is annotated is so with all its classes; a case may complete no other."""
    config, root = folder(tmp_path, REGIONS, [0, 2, 4])
    names = [path.name.removesuffix(".nii.gz") for path in (root / "labelsTr").iterdir()]
    listed = root / "partial_labels.json"
    listed.write_text(json.dumps({name: ["core"] for name in names}))
    config.data.partial = nnunet_layout.partial(config.data)
    prepared = cache.prepare(config)
    case = prepared.splits.val[0]
    assert prepared.organs(case) == ("core 2", "active")
    assert set(prepared.scored(case)) == {"core", "active"}
    assert streams.batches(prepared, config, STREAMS)
    config.data.partial = False  # as of a layout that forgets to tell
    with pytest.raises(TypeError, match="the layout needs partial"):
        streams.batches(cache.prepare(config), config, STREAMS)
    config.data.partial = True
    listed.write_text(json.dumps({name: ["whole 1"] for name in names}))
    with pytest.raises(UserError, match="no val case is annotated for all of a whole region"):
        cache.prepare(config)
    listed.write_text(json.dumps({names[0]: ["liver"]}))
    with pytest.raises(UserError, match="'liver'; the organs are: whole 1, core 2, active, whole"):
        cache.prepare(config)


def test_predictions_have_the_numbers_of_the_data_set(tmp_path):
    path = tmp_path / "scan.nii.gz"
    save(path, np.zeros((3, 4, 2), np.float32))
    scan, label = read_nifti(path, "axial"), np.zeros((2, 4, 3), np.uint8)
    label[0], label[1, 0] = 1, 2
    predict.write(scan, predict.numbered(label, (7, 300)), tmp_path / "label.nii.gz")
    written = np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj)
    assert written.dtype == np.uint16
    np.testing.assert_array_equal(written.transpose(2, 1, 0), np.array([0, 7, 300])[label])
    assert predict.numbered(label, ()) is label


class Guess:
    """Says that all which is core is its inactive part."""

    def of(self, _):
        return self

    def labels(self, volumes, *scorings):
        for name, volume in volumes:
            yield name, (np.minimum(volume.label, 2),) * len(scorings)


def test_scored_volumes_do_not_stay_open(tmp_path, monkeypatch):
    """However many there are: a process may open about a thousand files."""
    monkeypatch.setattr("cgs_jax.data.prepared.MAPPED", 2)
    config, _ = folder(tmp_path, REGIONS, [0, 2, 4])
    prepared, opened, at_once = cache.prepare(config), [], []
    cases = [*prepared.splits.labelled, *prepared.splits.val, *prepared.splits.test]
    open_volume = prepared.volume

    def volume(case):
        found = open_volume(case)
        opened.append(weakref.ref(found.label))
        at_once.append(len({id(label()) for label in opened if label() is not None}))
        return found

    monkeypatch.setattr(prepared, "volume", volume)
    (results,) = summaries.evaluate(Guess(), prepared, cases, False, Scoring("linear", False))
    assert list(results) == cases
    assert max(at_once) < 4 < len(cases)


def test_regions(tmp_path):
    """The network has a class for what no other region divides; scores are of the regions."""
    config, _ = folder(tmp_path, REGIONS, [0, 2, 4])
    assert config.data.classes == ("whole 1", "core 2", "active")
    assert config.data.regions == (("whole", (1, 2, 3)), ("core", (2, 3)), ("active", (3,)))
    assert tasks.scored(config.data) == ["whole", "core", "active"]
    prepared = cache.prepare(config)
    case = prepared.splits.val[0]
    truth = prepared.volume(case).label
    (results,) = summaries.evaluate(Guess(), prepared, [case], False, Scoring("linear", False))
    dice = {name: scores["dice"] for name, scores in results[case].items()}
    assert dice == {"whole": 1, "core": 1, "active": 0}
    assert results[case]["core"]["voxels"] == np.isin(truth, (2, 3)).sum()
    summary = summaries.summarise(results, config.data)
    assert list(summary["organs"]) == ["whole", "core", "active"]
    assert summary["mean"]["dice"] == pytest.approx(2 / 3)
    # nnU-Net's own form has the numbers of the files.
    theirs = nnunet_summary.of(results, config.data)
    assert set(theirs["mean"]) == {"(1, 2, 4)", "(2, 4)", "4"}
    assert theirs["foreground_mean"]["Dice"] == pytest.approx(2 / 3)
    (of_case,) = theirs["metric_per_case"]
    count = int((truth == 3).sum())
    missed = {"Dice": 0, "IoU": 0, "TP": 0, "FP": 0, "FN": count, "n_ref": count, "n_pred": 0}
    assert of_case["metrics"]["4"] == missed


def test_what_nobody_annotated_is_not_scored():
    truth = np.array([[[0, 1, NO_LABEL, NO_LABEL]]], np.uint8)
    label = np.array([[[0, 1, 1, 0]]], np.uint8)
    scores = summaries._score(label, truth, (1,), None, True)
    assert scores["dice"] == 1
    assert scores["voxels"] == 1


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ({"background": 0, "head": 1, "ignore": 1}, "other numbers than it, ignore and each"),
        ({"background": 0, "head": [1, 0]}, "other numbers than it, ignore and each"),
        ({"head": 1}, "labels must be background 0"),
        ({"background": 0, "head": 1, "ignore": [2, 3]}, "ignore must be one number"),
        ({"background": 0, "head": "one"}, "must map names to numbers"),
        ({"background": 0, "head": []}, "must map names to numbers"),
        ({"background": 0, "head": 70000}, "from 0 to 65535"),
        (["background", "head"], "must map names to numbers"),
    ],
)
def test_labels_that_can_not_be(tmp_path, labels, problem):
    config, root = nnunet_folder(tmp_path, cases=1)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match=f"dataset.json: .*{problem}"):
        completion.complete(config.data)


def test_other_classes_than_numbers(tmp_path):
    config, _ = nnunet_folder(tmp_path, GAPS, cases=1)
    config.data.classes = ("liver",)
    with pytest.raises(UserError, match="data.classes has 1 names, and label files 2 numbers"):
        completion.complete(config.data)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ignore": 1}, "data.ignore=1: a number that no organ has"),
        ({"ignore": -1}, "data.ignore=-1"),
        ({"numbers": (1, 1)}, "organs have numbers of their own"),
        ({"numbers": (0, 1)}, "organs have numbers of their own"),
        ({"regions": (("x", (1, 9)),)}, "names organs besides 1 to 2"),
        ({"regions": ("abc",)}, "'abc' is not"),
        ({"regions": (1,)}, "1 is not"),
        ({"regions": ((1, 2),)}, r"\(1, 2\) is not"),
        ({"regions": (("x", ()),)}, r"\('x', \(\)\) is not"),
        ({"classes": (1, 2)}, r"data.classes=\(1, 2\): names of organs are texts"),
        ({"classes": ("head", "head")}, "has a name twice"),
        ({"classes": ("head", "mean")}, "rename the organ 'mean'"),
        ({"classes": ("low", "head")}, "rename the organ 'low'"),
        ({"regions": (("dice", (1, 2)),)}, "rename the organ 'dice'"),
    ],
)
def test_options_of_labels_that_can_not_be(tmp_path, fields, problem):
    config, _ = nnunet_folder(tmp_path, cases=1)
    config.data.update(fields)
    with pytest.raises(UserError, match=problem):
        completion.complete(config.data)


def test_pixels_that_nobody_annotated_do_not_count():
    """The Dice loss is that of the annotated pixels alone; the cross-entropy is too, but for its
    division by all."""
    rng = np.random.default_rng(0)
    outputs = Outputs(
        jnp.asarray(rng.normal(size=(1, 6, 4, 3))), (jnp.asarray(rng.normal(size=(1, 6, 4, 2, 3))),)
    )
    label = jnp.asarray(rng.integers(0, 3, (1, 6, 4)), jnp.uint8).at[:, 2:].set(0)
    known = jnp.zeros((1, 6, 4, 2), bool).at[:, :2].set(True)
    alone = jax.tree.map(lambda x: x[:, :2], outputs)
    part = jax.jit(lambda: base.supervised_loss(base.Labelled(alone, label[:, :2])))()
    whole = jax.jit(lambda: base.supervised_loss(base.Labelled(outputs, label, None, known)))()
    for name, value in part.items():
        share = 2 / 6 if name.endswith("_ce") else 1
        np.testing.assert_allclose(whole[name], share * value, rtol=1e-5, err_msg=name)


def test_pixels_that_nobody_annotated_get_no_gradient():
    rng = np.random.default_rng(0)
    outputs = Outputs(
        jnp.asarray(rng.normal(size=(1, 4, 4, 3))),
        (jnp.asarray(rng.normal(size=(1, 4, 4, 2, 3))),),
        prompts=jnp.asarray(rng.normal(size=(1, 4, 4, 3, 2))),
    )
    label = jnp.asarray(rng.integers(0, 3, (1, 4, 4)), jnp.uint8).at[:, 1:3, 1:3].set(0)
    known = jnp.ones((1, 4, 4, 2), bool).at[:, 1:3, 1:3].set(False)
    nobody = ~np.asarray(known)[0, ..., 0]

    def of_heads(outputs):
        return sum(base.supervised_loss(base.Labelled(outputs, label, None, known)).values())

    def of_prompts(outputs):
        asked = versemi.Asked(base.Labelled(outputs, label, None, known), (jnp.zeros(1, int),))
        return sum(versemi.task_loss(asked, False).values())

    for loss in (of_heads, of_prompts):
        found = jax.device_get(jax.jit(jax.grad(loss))(outputs))
        gradients = [x[0] for x in jax.tree.leaves(found) if x.any()]
        assert gradients
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            assert not gradient[nobody].any()
            assert gradient[~nobody].any()


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("versemi", "cmems", "bcp")]


@pytest.mark.parametrize("name", ["cgs", *SLOWLY])
def test_a_step_with_pixels_that_nobody_annotated(name):
    """Pixels move with the image; what is pasted or mixed knows of each pixel whose it is."""
    config = tiny(name, **{"data.ignore": 9, "data.partial": True})
    batch = tiny_batch(config)
    batch["labelled"]["label"][:, :6] = NO_LABEL
    for marks in ("annotated", "member"):
        batch["labelled"][marks] = np.ones((2, 1, 1, 2), bool)
    method, mesh = train_step.make_method(config), devices.local_mesh()
    key = jax.random.key(0)
    views = jax.jit(lambda batch: train_step.make_views(method, mesh, batch, key))(batch)
    views = jax.device_get(views)
    annotated, label = views["labelled"]["annotated"], views["labelled"]["label"]
    assert annotated.shape == (2, 16, 16, 2)
    assert 0 < annotated.sum() < annotated.size
    assert label.max() == 2
    assert not (label > 0)[~annotated.any(-1)].any()
    state = train_step.init_state(method, mesh)
    step, supervised = train_step.make_train_step(method, mesh), []
    for _ in range(8):
        state, metrics = step(state, batch, np.uint32(0))
        supervised.append(float(metrics["sup"]))
    assert np.isfinite(supervised).all()
    assert np.mean(supervised[-3:]) < np.mean(supervised[:3])
