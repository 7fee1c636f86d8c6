"""The programs as a user starts them: train, evaluate, predict."""

import contextlib
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from cgs_jax import compare, evaluate, main, predict, sweep
from cgs_jax.analysis import tables
from cgs_jax.data.grid import upsampled_labels
from cgs_jax.data.nifti import read_nifti
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime import devices, run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import to_json
from cgs_jax.training import loop, train_step
from cgs_jax.training.checkpoints import Checkpoints
from configs import nnunet
from layouts import lists, nnunet_folder, save
from runs import TINY, before_the_end, command, config_of, start

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


def test_evaluation_reproduces_the_scores(trained, tmp_path):
    """And what is written of them; of a run that is not finished, nothing is."""
    workdir, _ = trained
    before = {name: (workdir / name).read_bytes() for name in ("summary.json", "overlays.png")}
    facts = (workdir / "report.html").read_text()
    for name in (*before, "report.html"):
        (workdir / name).unlink()
    summary = evaluate.evaluate([workdir])
    assert {name: (workdir / name).read_bytes() for name in before} == before
    assert to_json(summary, indent=1) + "\n" == before["summary.json"].decode()
    assert re.sub('data:image[^"]*', "", (workdir / "report.html").read_text()) == re.sub(
        'data:image[^"]*', "", facts
    )
    begun = before_the_end(trained, tmp_path / "begun")
    assert evaluate.evaluate([begun])["last"]["step"] == 80
    assert not (begun / "summary.json").exists()


def test_best_and_last_checkpoint_are_told_apart(trained, scans, tmp_path):
    """One more checkpoint, of a network that finds nothing, is the last and not the best."""
    workdir, config = shutil.copytree(trained[0], tmp_path / "run"), config_of(scans)
    like = train_step.abstract_state(train_step.make_method(config), devices.make_mesh(config))
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        best = checkpoints.best
        state = checkpoints.restore_latest(like)
        teacher = jax.tree.map(jnp.zeros_like, state.extra)
        checkpoints.save(state.replace(step=state.step + 1, extra=teacher), -0.5)
    before = json.loads((workdir / "summary.json").read_text())
    after = evaluate.evaluate([workdir])
    assert (after["step"], after["last"]["step"]) == (best, TINY["total_steps"] + 1)
    assert to_json(after["test"]) == to_json(before["test"])
    assert after["test"]["mean"]["dice"] > after["last"]["test"]["mean"]["dice"] == 0


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
    monkeypatch.setattr(loop, "train", lambda config, method, prepared, *_: seen.append(prepared))
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


def test_a_run_in_a_read_only_folder_is_scored(trained, monkeypatch, capsys):
    """What may be written is asked of the system: tests may run as root, who may write anywhere."""
    workdir, _ = trained
    monkeypatch.setattr(os, "access", lambda path, mode: path != workdir)
    monkeypatch.setattr(evaluate, "write", pytest.fail)
    monkeypatch.setattr(run_folder, "locked", pytest.fail)
    assert evaluate.evaluate([workdir]) == json.loads((workdir / "summary.json").read_text())
    assert f"{workdir} is read-only" in capsys.readouterr().out


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


def test_specialists_can_predict(trained, scans):
    """Of a finished run the same command may name others who predict."""
    workdir, _ = trained
    before = (workdir / "summary.json").read_bytes()
    asked = evaluate.evaluate([workdir], {"inference": "specialists"})
    assert (workdir / "summary.json").read_bytes() == before
    summary = main.run(config_of(scans, inference="specialists"), workdir)
    assert summary["inference"] == "specialists"
    assert summary["val"]["mean"] == asked["val"]["mean"]
    main.run(config_of(scans), workdir)
    assert (workdir / "summary.json").read_bytes() == before


def test_runs_score_together(trained, scans, tmp_path):
    """A run with itself is the run; other data or cases are an error."""
    workdir, _ = trained
    summary = json.loads((workdir / "summary.json").read_text())
    nearest = {"upsample": "nearest"}
    both = evaluate.evaluate([workdir, workdir], nearest | {"combine": "vote"})
    assert both["test"]["cases"] == evaluate.evaluate([workdir], nearest)["test"]["cases"]
    heads = evaluate.evaluate([workdir], {"inference": "both"})
    assert heads["test"]["cases"] != summary["test"]["cases"]

    def to_collection(text):
        text["data"].update(name="collection", members={"chest": dict(text["data"])})

    for i, (file, change, message) in enumerate(
        (
            ("splits.json", lambda text: text["test"].pop(), "other validation or test cases"),
            ("config.json", lambda text: text["data"].update(normalise=[0, 1]), "data.normalise"),
            ("config.json", to_collection, "were trained on other data sets"),
        )
    ):
        other = tmp_path / str(i)
        shutil.copytree(workdir, other)
        text = json.loads((other / file).read_text())
        change(text)
        (other / file).write_text(json.dumps(text))
        with pytest.raises(UserError, match=message):
            evaluate.evaluate([workdir, other])


def test_test_cases_wait_until_a_recipe_is_chosen(trained, scans, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "runs" / "cgs")
    tested = json.loads((workdir / "summary.json").read_text())
    summary = main.run(config_of(scans, test=False), workdir)
    assert "test" not in summary
    assert "test" not in summary["last"]
    assert summary["val"] == tested["val"]
    report = (workdir / "report.html").read_text()
    assert '"final": "val"' in report
    assert "Patient_06" not in report.split('"config"')[0]
    compared = compare.compare([workdir, trained[0]])
    assert compared.startswith("validation Dice %")
    splits = {"val", "val_literature", "last_val", "last_val_literature"}
    assert set(tables.load(tmp_path / "runs").cases.split) == splits
    assert sweep.write_tables(tmp_path / "runs").startswith("Dice %, validation, best")
    assert "test" not in evaluate.evaluate([workdir])
    again = main.run(config_of(scans), workdir)
    assert again["test"] == tested["test"]
    assert evaluate.evaluate([workdir])["test"] == tested["test"]


def test_prediction_options_of_the_command_line(trained, tmp_path):
    options = ["--upsample", "nearest", "--largest_component", "--output", str(tmp_path / "s.json")]
    line = command(None, trained[0], *options, program="evaluate")
    done = start(line)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())
    assert (scores["upsample"], scores["largest_component"]) == ("nearest", True)
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert scores["test"]["mean"] != summary["test"]["mean"]
    assert scores["test_literature"] == summary["test_literature"]
    for title in ("validation", "validation, the literature's scoring", "test"):
        assert f"\n{title}, best validation checkpoint (step {summary['step']}), " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fields"), [("cps", {}), ("cmems", {"method.predicts": "mean"})]
)
def test_two_networks_run_the_same_path(scans, tmp_path, method, fields):
    summary = main.run(config_of(scans, method, total_steps=4, **fields), tmp_path / "run")
    assert set(summary["test"]["organs"]) == {"esophagus", "heart", "trachea", "aorta"}


def test_predict_keeps_grid_header_and_name(trained, scans, tmp_path):
    workdir, _ = trained
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    source = nib.load(scans / "scans" / "Patient_06" / "Patient_06.nii.gz")
    nib.save(source, inputs / "a.nii.gz")
    turned = source.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt("SRA")
        )
    )
    turned.header.set_xyzt_units("mm", "sec")
    turned.header["descrip"] = b"turned"
    nib.save(turned, inputs / "b.nii")
    odd = np.asarray(source.dataobj)[:17, :11, :, None].astype(np.float32)
    tilt = nib.eulerangles.euler2mat(0.1, 0.2, 0.05) @ np.diag([1.5, 2, 3])
    nib.save(nib.Nifti1Image(odd, nib.affines.from_matvec(tilt, [5, 6, 7])), inputs / "c.nii.gz")
    line = command(scans, workdir, program="predict")
    line += ["--input", str(inputs), "--output", str(tmp_path / "labels")]
    done = start(line)
    assert done.returncode == 0, done.stderr
    for name in ("a.nii.gz", "b.nii", "c.nii.gz"):
        image, label = nib.load(inputs / name), nib.load(tmp_path / "labels" / name)
        assert label.shape == image.shape
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(label.affine, image.affine)
        for key in ("qform_code", "sform_code", "pixdim", "xyzt_units", "descrip", "quatern_b"):
            np.testing.assert_array_equal(label.header[key], image.header[key], key)
    # the same anatomy stored another way gets the same labels
    first = nib.as_closest_canonical(nib.load(tmp_path / "labels" / "a.nii.gz"))
    second = nib.as_closest_canonical(nib.load(tmp_path / "labels" / "b.nii"))
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    again = start(line)
    assert again.returncode == 1
    assert "a.nii.gz exists; choose another --output or give --overwrite" in again.stderr
    assert start([*line, "--overwrite"]).returncode == 0
    with pytest.raises(UserError, match="would replace the input"):
        predict.predict([workdir], inputs, inputs, overwrite=True)
    (inputs / "b.nii").write_bytes(b"damaged")
    (tmp_path / "labels" / "c.nii.gz").unlink()
    with pytest.raises(UserError, match=r"b.nii is not a whole scan.*; 2 others are written to"):
        predict.predict([workdir], inputs, tmp_path / "labels", overwrite=True)
    assert (tmp_path / "labels" / "c.nii.gz").exists()
    _check_resume(workdir, inputs, tmp_path / "labels")
    with pytest.raises(UserError, match="no such file or folder"):
        predict.predict([workdir], tmp_path / "nothing", tmp_path / "labels")
    with pytest.raises(UserError, match="holds no run"):
        predict.predict([tmp_path], inputs, tmp_path / "new")
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    with pytest.raises(UserError, match="can not write to --output"):
        predict.predict([workdir], inputs, blocked / "labels")


def _check_resume(workdir, inputs, labels):
    """After an interruption what is there stays, and the rest comes."""
    expected = (labels / "c.nii.gz").read_bytes()
    (labels / "c.nii.gz").unlink()
    (labels / "a.nii.gz").write_bytes(b"stays")
    (inputs / "b.nii").unlink()
    assert predict.predict([workdir], inputs, labels, resume=True) == [labels / "c.nii.gz"]
    assert (labels / "c.nii.gz").read_bytes() == expected
    assert (labels / "a.nii.gz").read_bytes() == b"stays"
    assert predict.predict([workdir], inputs, labels, resume=True) == []
    with pytest.raises(UserError, match="--overwrite and --resume contradict each other"):
        predict.predict([workdir], inputs, labels, overwrite=True, resume=True)


def test_arrays_in_arrays_out(trained, scans, tmp_path):
    """Three lines of Python give what `predict` writes."""
    workdir, path = trained[0], scans / "scans" / "Patient_06" / "Patient_06.nii.gz"
    scan = read_nifti(path, "axial")
    predictor = Predictor.restore(workdir)
    labels = predictor.segment(scan.array, scan.spacing)
    assert (labels.dtype, labels.shape) == (np.uint8, scan.array.shape)
    (written,) = predict.predict([workdir], path, tmp_path)
    np.testing.assert_array_equal(scan.to_stored(labels), np.asarray(nib.load(written).dataobj))
    scores = predictor.scores(scan.array)
    assert scores.shape == (5, 32, 32, 5)
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(upsampled_labels(scores, *labels.shape[1:]), labels)
    before = scan.array[::2, :11].astype(np.float64)  # of another shape and kind, and left as it is
    given = before.copy()
    assert predictor.segment(given).shape == given.shape
    np.testing.assert_array_equal(given, before)
    for array, message in (
        (scan.array[0], r"the array has shape \(20, 20\); volumes are \[1, D, H, W\]"),
        (scan.array[:0], r"the array has shape \(0, 20, 20\); volumes are \[1, D, H, W\]"),
        (np.full((1, 4, 4), np.nan), "the array has 16 voxels that are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            predictor.segment(array)
    for spacing in ((1.5, 1.5), (3, np.nan, 1), (3, 0, 1), (3, -1, 1), "abc"):
        with pytest.raises(UserError, match="spacing=.*: give millimetres along D, H and W"):
            predictor.segment(scan.array, spacing)
    with pytest.raises(UserError, match="unknown option 'window_size' of prediction; there are: "):
        Predictor.restore([workdir], {"window_size": 3})
    with pytest.raises(UserError, match="window=31 does not divide by 2"):
        Predictor.restore([workdir], {"window": 31})
    with pytest.raises(UserError, match="an option of prediction has another type: .*window"):
        Predictor.restore([workdir], {"window": "16"})
    in_windows = Predictor.restore(workdir, {"window": 16, "upsample": "nearest"})
    assert in_windows.config.window == 16
    assert (in_windows.segment(scan.array) == labels).mean() > 0.8


def test_names_that_may_be_mistaken(trained, scans, tmp_path, capsys):
    """A second channel of a run that takes one, and endings in capitals."""
    workdir, source = trained[0], scans / "scans" / "Patient_06" / "Patient_06.nii.gz"
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("new_0000.nii.gz", "new_0001.nii.gz", "other_0002.nii.gz"):
        shutil.copy(source, inputs / name)
    written = predict.predict([workdir], inputs, tmp_path / "labels")
    assert sorted(path.name for path in written) == [
        "new.nii.gz",
        "new_0001.nii.gz",
        "other_0002.nii.gz",
    ]
    printed = capsys.readouterr().out
    assert printed.count("WARNING") == 1
    assert "WARNING: new_0001.nii.gz is segmented as a scan of its own: the run has one" in printed
    (inputs / "new_0001.nii.gz").rename(inputs / "new_0001.NII.GZ")
    with pytest.raises(UserError, match=r"_0001.NII.GZ: write its ending in small letters, .nii"):
        predict.predict([workdir], inputs, tmp_path / "more")


def test_prediction_scores_as_the_evaluation_says(trained, scans, tmp_path):
    """Labels written as NIfTI against the ground truth give the Dice of summary.json."""
    workdir, _ = trained
    cases = json.loads((workdir / "summary.json").read_text())["test"]["cases"]
    case = max(cases, key=lambda name: cases[name]["heart"]["dice"])
    source = scans / "scans" / case
    written = predict.predict([workdir], source / f"{case}.nii.gz", tmp_path)
    label = np.asarray(nib.load(written[0]).dataobj)
    truth = np.asarray(nib.load(source / "GT.nii.gz").dataobj)
    assert cases[case]["heart"]["dice"] > 0.3
    for i, organ in enumerate(("esophagus", "heart", "trachea", "aorta"), 1):
        total = (label == i).sum() + (truth == i).sum()
        dice = 2 * ((label == i) & (truth == i)).sum() / total if total else None
        assert dice == pytest.approx(cases[case][organ]["dice"])


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
