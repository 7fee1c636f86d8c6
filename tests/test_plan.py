"""What is found of scans, and proposed for them."""

import types

import jax
import nibabel as nib
import numpy as np
import pytest

import runs
from cgs_jax import plan
from cgs_jax.data import case_lists, completion, fingerprint, proposal, tasks
from cgs_jax.data.fingerprint import Facts
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from configs import acdc, collection, nnunet
from layouts import lists, nnunet_folder, save


def ct(tmp_path, kind="CT"):
    """Twelve scans in HU: 1,000 below water but for organs of 40 and 60, and one voxel of metal."""
    config, root = nnunet_folder(tmp_path, channel_names={"0": kind})
    for path in (root / "imagesTr").iterdir():
        label = root / "labelsTr" / path.name.replace("_0000", "")
        marks = np.asarray(nib.load(label).dataobj) if label.exists() else np.zeros((9, 8, 4))
        image = np.select([marks == 1, marks == 2], [40.0, 60.0], -1000.0)
        image[0, 0, 0] = 3000
        marks = np.array(marks)
        marks[0, 0, 0] = 1  # of 288 voxels, some 190 of organs
        if label.exists():
            save(label, marks.astype(np.uint8))
        save(path, image.astype(np.float32))
    return config, root


def test_ct_has_the_window_of_its_organs(tmp_path, capsys):
    config, _ = ct(tmp_path / "ct")
    low, high = resolve(config).data.normalise
    assert low == 40
    assert 60 <= high < 100  # without the metal
    assert "normalise: (40.0, " in capsys.readouterr().out
    config, _ = ct(tmp_path / "mr", "T1")
    assert resolve(config).data.normalise == "percentile"
    config, _ = ct(tmp_path / "given")
    config.data.normalise = (-200, 300)
    assert resolve(config).data.normalise == (-200, 300)


def test_slices_across_another_axis_are_told(tmp_path, capsys):
    config, root = ct(tmp_path)
    config.data.spacing, config.data.patch = "median", 16
    resolve(config)
    assert "pixels of slices" not in capsys.readouterr().out
    for path in (*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()):
        save(path, np.asarray(nib.load(path).dataobj), np.diag([4.0, 0.5, 0.5, 1]))
    resolve(config)
    told = "WARNING: pixels of slices have 0.5 x 4 mm; if scans are stacks of slices along"
    assert told in capsys.readouterr().out
    config.data.slicing = "coarsest"
    resolve(config)
    assert "pixels of slices" not in capsys.readouterr().out


def test_a_window_is_that_of_training_cases_alone(tmp_path):
    """Whatever organs have in cases whose labels validate, test or are withheld."""
    config, root = ct(tmp_path)
    config.data.labelled = 2
    before = resolve(config).data.normalise
    data = resolve(config).data
    teaching = case_lists.split(tasks.layout(data).find(data), data, data.split_seed).labelled
    assert len(teaching) == 2
    for path in (root / "imagesTr").iterdir():
        if path.name.replace("_0000.nii.gz", "") not in teaching:
            image = np.array(nib.load(path).dataobj)
            save(path, np.where(image >= 40, image + 500, image))
    assert resolve(config).data.normalise == before


def test_facts_are_looked_up_once(tmp_path, monkeypatch):
    config, root = ct(tmp_path)
    data = resolve(config).data
    cases = tasks.layout(data).find(data)
    facts = fingerprint.of_cases(cases.values(), data)
    of = facts["mine_002"]
    label = np.asarray(nib.load(root / "labelsTr" / "mine_002.nii.gz").dataobj)
    assert tuple(of.shape) == (4, 8, 9)
    assert tuple(of.spacing) == (1, 1, 1)
    assert of.voxels == {"head": (label == 1).sum(), "tail": (label == 2).sum()}
    assert len(of.intensities[0]) == len(fingerprint.QUANTILES)
    assert facts["mine_011"].voxels is None
    looked = []
    look = fingerprint._look
    monkeypatch.setattr(fingerprint, "_look", lambda *args: looked.append(args) or look(*args))
    again = fingerprint.of_cases(cases.values(), data)
    assert not looked
    assert again["mine_002"].voxels == of.voxels
    save(root / "imagesTr" / "mine_002_0000.nii.gz", np.ones((9, 8, 4), np.float32))
    fingerprint.of_cases(cases.values(), data)
    assert len(looked) == 1
    (kept,) = (root / "cgs_cache").glob("facts_mine_003_*.json")
    kept.unlink()
    kept.mkdir()  # as where nothing can be written: looked up every time
    assert fingerprint.of_cases(cases.values(), data).keys() == cases.keys()
    assert len(looked) == 2
    text = plan.describe(facts)
    assert "12 scans, 9 with labels" in text
    assert "head" in text


def scan(shape, spacing):
    return Facts(shape, spacing, None, [])


def test_scans_that_are_alike_are_taken_as_they_are():
    alike = {str(i): scan((20 + i, 128, 128), (3.0, 2.5, 2.5)) for i in range(3)}
    assert proposal.of_scans(alike, 16, "cpu")["data.size"] == 128
    other = alike | {"x": scan((20, 128, 128), (3.0, 4.0, 4.0))}
    found = proposal.of_scans(other, 16, "cpu")
    assert (found["data.spacing"], found["data.patch"]) == ("median", 128)
    odd = {str(i): scan((36, 50, 35), (1.0, 1.0, 1.0)) for i in range(3)}
    assert proposal.of_scans(odd, 16, "cpu")["data.patch"] == 64
    large = {str(i): scan((90, 512, 512), (2.0, 0.7, 0.7)) for i in range(3)}
    assert proposal.of_scans(large, 16, "cpu")["data.patch"] == 128
    assert proposal.of_scans(large, 16, "tpu")["data.patch"] == 256


def test_batches_divide_by_the_devices():
    fields = {"data.patch": 100, "batch.labelled": 12, "batch.unlabelled": 0}
    assert proposal.for_devices(fields, 1) == fields
    assert proposal.for_devices(fields, 8) == fields | {"batch.labelled": 16}


def test_volumes_are_proposed_by_their_spacing():
    small = {str(i): scan((36, 50, 35), (1.0, 1.0, 1.0)) for i in range(3)}
    found = proposal.of_scans(small, 8, "cpu", 3)
    assert found["model.depth_strides"] == (2, 2, 2)
    assert (found["data.depth"], found["data.patch"]) == (32, 56)
    assert found["data.patch_foreground"] > 0  # 36 slices, of which a window has 32
    heart = {str(i): scan((10, 200, 180), (10.0, 1.5, 1.5)) for i in range(3)}
    found = proposal.of_scans(heart, 16, "tpu", 4)
    assert found["model.depth_strides"] == (1, 1, 2, 2)  # 10 mm by 1.5, 3, 6 and 12
    assert (found["data.depth"], found["data.patch"]) == (12, 128)
    found = proposal.of_scans(heart, 16, "tpu", 4, depth_strides=(2, 2, 2, 2))
    assert (found["model.depth_strides"], found["data.depth"]) == ((2, 2, 2, 2), 16)


def test_a_folder_is_taken_as_it_is_without_an_option(tmp_path):
    """Squares only where scans are alike, or a size is asked for."""

    def grid(root, **fields):
        data = nnunet.get_config().data
        data.update(root=str(root), **fields)
        completion.complete(data)
        return data.size, data.spacing, data.slice_spacing, data.patch

    _, root = nnunet_folder(tmp_path)  # slices of 8 x 9 pixels of 1 mm
    assert grid(root) == (16, 1.0, 0, 16)
    assert grid(root, size=32) == (32, 0, 0, 0)
    assert grid(root, spacing=0.25) == (48, 0.25, 0, 48)
    assert grid(root, patch=32) == (32, 1.0, 0, 32)
    saved = nnunet.get_config().data
    saved.update(size=64, spacing=2.0, slice_spacing=0, patch=64, classes=("a",), channels=1)
    data = nnunet.get_config().data
    data.root = str(root)
    completion.complete(data, saved)
    assert (data.size, data.spacing, data.patch) == (64, 2.0, 64)
    for path in root.rglob("*.nii.gz"):
        array = np.asarray(nib.load(path).dataobj)
        save(path, np.resize(array, (32, 32, 4)))
    assert grid(root) == (32, 0, 0, 0)
    assert grid(root, patch=16) == (32, 0, 0, 16)
    assert grid(root, spacing="median") == (32, 1.0, 0, 32)
    for field in ("size", "patch"):
        with pytest.raises(UserError, match=f"data.{field}=big: give a whole number"):
            grid(root, **{field: "big"})
    lists(tmp_path, train=["nobody"], test=["mine_000"])
    with pytest.raises(UserError, match="no train cases"):
        grid(root, splits=str(tmp_path))
    config = collection.get_config("members=mine@nnunet")
    config.data.members.mine.update(root=str(root), size="auto")
    with pytest.raises(UserError, match="data.members.mine.size=auto is for a data set by itself"):
        completion.complete(config.data)


def test_arrays_tell_no_voxel_size(tmp_path):
    config = acdc.get_config()
    case = tasks.tasks(config.data)[""].data
    with pytest.raises(UserError, match="files of scans only"):
        fingerprint.of_cases([fingerprint.Case("a", (tmp_path / "a.h5",), None)], case)


@pytest.mark.parametrize(
    ("there", "warned"), [({"bytes_limit": 3e9}, True), ({}, False), (None, False)]
)
def test_a_step_that_does_not_fit_is_told(there, warned, monkeypatch, capsys):
    device = types.SimpleNamespace(memory_stats=lambda: there)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    plan.tell_of_little_memory(2e9)
    assert not capsys.readouterr().out
    plan.tell_of_little_memory(4e9)
    assert ("more than the 3.0 GB that a device has" in capsys.readouterr().out) == warned


@pytest.mark.slow
def test_a_plan_ends_with_a_command_that_trains(tmp_path):
    _, root = ct(tmp_path)
    tiny = {"model.channels": (4, 8), "model.dropout": (0.0,) * 2}
    line = runs.command(root, tmp_path / "run", program="plan")[:3]
    line += ["--config", "configs/nnunet.py", f"--config.data.root={root}"]
    line += [f"--config.{name}={value}" for name, value in tiny.items()]
    done = runs.start(line)
    assert done.returncode == 0, done.stderr
    assert "a step needs" in done.stdout
    command = done.stdout.strip().splitlines()[-1]
    assert "--config.data.patch=12 " in command
    assert "--config.data.spacing=median" in command
