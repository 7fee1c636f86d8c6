"""Runs as a user starts them, from data to their report."""

import json
import pathlib
import shutil

import nibabel as nib
import numpy as np
import pytest

from cgs_jax import compare, evaluate, main, predict
from cgs_jax.runtime import run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import loop
from configs import nnunet
from layouts import lists, nnunet_folder, save
from runs import TINY, before_the_end, config_of

NEW = "new.nii.gz"


def test_outputs_of_a_run(trained):
    workdir, printed = trained
    names = ["config.json", "checkpoints", "metrics.jsonl", "tensorboard", "summary.json"]
    for name in [*names, "curves.png", "overlays.png", "splits.json"]:
        assert (workdir / name).exists(), name
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary["test"]["cases"]) == {"Patient_06", "Patient_07"}
    assert set(summary["val"]["cases"]) == {"Patient_05"}
    scores = summary["test"]["cases"]["Patient_06"]["heart"]
    assert set(scores) == {
        "dice",
        "jaccard",
        "hd95",
        "asd",
        "hd95_mm",
        "asd_mm",
        "voxels",
        "predicted",
        "missed",
    }
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(5, 101, 5))
    validation = {line["step"]: line["val/dice"] for line in lines if "val/dice" in line}
    assert list(validation) == list(range(20, 101, 20))
    assert summary["last"]["step"] == 100
    assert set(summary["last"]["test"]["cases"]) == {"Patient_06", "Patient_07"}
    assert summary["step"] in [s for s, v in validation.items() if v == max(validation.values())]
    chosen = pytest.approx(100 * summary["val"]["mean"]["dice"])
    assert validation[summary["step"]] == chosen
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert kept == {80, 100, summary["step"]}  # the latest two and the best
    assert "esophagus" in printed
    assert "Dice %" in printed
    assert compare.compare([workdir, workdir]).count("+0.00") == 5
    assert compare.names([workdir, workdir]) == [workdir.name] * 2
    runs = [workdir / row / "seed0" for row in ("a", "b")]
    assert compare.names(runs) == ["a/seed0", "b/seed0"]


def test_gain_is_what_the_last_run_has_more(trained, tmp_path):
    better = shutil.copytree(trained[0], tmp_path / "better")
    summary = json.loads((better / "summary.json").read_text())
    for organ in summary["test"]["organs"].values():
        organ["dice"]["mean"] += 0.1
    summary["test"]["mean"]["dice"] += 0.2
    (better / "summary.json").write_text(json.dumps(summary))
    text = compare.compare([trained[0], better])
    assert (text.count("+10.00"), text.count("+20.00")) == (4, 1)


def test_a_run_keeps_its_cases(trained, scans, tmp_path, monkeypatch):
    """Lists that changed since change nothing in a run that goes on, or is scored again."""
    workdir = before_the_end(trained, tmp_path / "run")
    splits = json.loads((workdir / "splits.json").read_text())
    config, seen = config_of(scans), []
    with pytest.raises(UserError, match="run was trained with inference=generalist, now it is"):
        main.run(config_of(scans, inference="specialists"), workdir)  # would choose otherwise
    moved = shutil.copytree(scans, tmp_path / "moved")
    config.data.splits = str(moved / "lists")
    saved = json.loads((workdir / "config.json").read_text())
    saved["data"]["splits"] = config.data.splits  # as if they had been there when it began
    (workdir / "config.json").write_text(json.dumps(saved))
    lists(moved / "lists", val=splits["test"][:1], test=splits["val"])
    monkeypatch.setattr(loop, "train", lambda method, prepared, *_: seen.append(prepared))
    assert main.run(config, workdir) is None
    for found in (seen[0].splits, evaluate.scans(*run_folder.load(workdir)).splits):
        assert (found.val, found.test) == (splits["val"], splits["test"])


def test_a_run_keeps_the_free_options_that_it_went_on_with(trained, scans, tmp_path, monkeypatch):
    """Begun without test scores and ended with them, it is scored again with them."""
    workdir = before_the_end(trained, tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | {"test": False}))
    monkeypatch.setattr(loop, "train", lambda *_: False)
    main.run(config_of(scans), workdir)
    assert run_folder.load(workdir)[0].test


def test_a_run_keeps_its_scans(trained, scans, tmp_path, capsys):
    """Scans may move; other labels stop a run that goes on, and of a finished one they are told.
    Labels that are withheld do not count."""
    workdir, moved = before_the_end(trained, tmp_path / "begun"), tmp_path / "moved"
    shutil.copytree(scans, moved, ignore=shutil.ignore_patterns("cgs_cache"))
    config = config_of(scans)
    config.data.root = str(moved / "scans")

    def empty(case):
        path = moved / "scans" / case / "GT.nii.gz"
        label = nib.load(path)
        save(path, np.zeros(label.shape, np.uint8), label.affine)

    splits = json.loads((workdir / "splits.json").read_text())
    assert "Patient_04" in set(splits["train"]) - set(splits["labelled"])
    empty("Patient_04")
    evaluate.evaluate([workdir], root=str(moved / "scans"))
    assert "WARNING" not in capsys.readouterr().out
    empty("Patient_06")
    with pytest.raises(UserError, match="begun began with .* label of Patient_06 has changed;"):
        main.run(config, workdir)
    evaluate.evaluate([trained[0], trained[0]], root=str(moved / "scans"))
    assert "WARNING" in capsys.readouterr().out
    told = json.loads((workdir / "scans.json").read_text())
    of_another = {case: {"image": own["image"]} for case, own in told.items()}  # labelled there
    run_folder.check_scans(of_another, workdir, finished=False)
    (workdir / "scans.json").write_text("[]")
    with pytest.raises(UserError, match=r"scans.json is damaged: .* scans are not compared"):
        evaluate.evaluate([workdir])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fields"), [("cps", {}), ("cmems", {"method.predicts": "mean"})]
)
def test_two_networks_run_the_same_path(scans, tmp_path, method, fields):
    summary = main.run(config_of(scans, method, total_steps=4, **fields), tmp_path / "run")
    assert set(summary["test"]["organs"]) == {"esophagus", "heart", "trachea", "aorta"}


def test_two_channels_end_to_end(tmp_path):
    """nnU-Net's layout with two files a scan: trained, tested, and predicted on the same grid."""
    config, root = nnunet_folder(tmp_path, cases=8, channel_names={"0": "T1", "1": "T2"})
    config.update_from_flattened_dict(TINY | {"total_steps": 4})
    workdir, inputs = tmp_path / "run", root / "imagesTr"
    summary = main.run(config, workdir)
    assert list(summary["test"]["organs"]) == ["head", "tail"]
    affine = nib.affines.from_matvec(np.diag([-1.5, 2, 3]), [5, 6, 7])
    for channel in (0, 1):
        image = np.random.default_rng(channel).random((7, 12, 5), np.float32)
        save(inputs / f"new_{channel:04d}.nii.gz", image, affine)
    written = predict.predict([workdir], inputs, tmp_path / "labels")
    assert [path.name for path in written] == [*(f"mine_00{i}.nii.gz" for i in range(8)), NEW]
    label = nib.load(tmp_path / "labels" / NEW)
    assert label.shape == (7, 12, 5)
    np.testing.assert_array_equal(label.affine, affine)
    (one,) = predict.predict([workdir], inputs / "new_0001.nii.gz", tmp_path / "one")
    np.testing.assert_array_equal(nib.load(one).dataobj, label.dataobj)
    (inputs / "new_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"no .*new_0000.nii.gz: scans have 2 channel"):
        predict.predict([workdir], inputs, tmp_path / "more")


def test_hippocampus_end_to_end(test_data, tmp_path):
    """Real NIfTI in nnU-Net's layout, 12 scans of it without labels."""
    config = nnunet.get_config()
    config.update_from_flattened_dict(TINY | {"total_steps": 4})
    config.data.root = str(test_data / "data" / "Dataset004_Hippocampus")
    config.data.cache = str(tmp_path / "cache")
    workdir = tmp_path / "run"
    summary = main.run(config, workdir)
    assert list(summary["test"]["organs"]) == ["anterior", "posterior"]
    train_cases = json.loads((workdir / "splits.json").read_text())["train"]
    labels = pathlib.Path(config.data.root) / "labelsTr"
    unlabelled = [c for c in train_cases if not (labels / f"{c}.nii.gz").exists()]
    assert len(unlabelled) == 12
    image = labels.with_name("imagesTr") / f"{unlabelled[0]}_0000.nii.gz"
    (label,) = predict.predict([workdir], image, tmp_path / "labels")
    image, label = nib.load(image), nib.load(label)
    assert label.shape == image.shape
    np.testing.assert_array_equal(label.affine, image.affine)
