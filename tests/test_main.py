"""The programs as a user starts them: train, resume, evaluate, predict; and their error lines."""

import errno
import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import nibabel as nib
import numpy as np
import pytest

from cgs_jax import compare, evaluate, main, optim, predict, sharding, train
from cgs_jax.checkpoint import Checkpoints
from cgs_jax.data.phantom import write as write_phantoms
from cgs_jax.errors import UserError
from configs import nnunet, segthor

REPOSITORY = pathlib.Path(__file__).parents[1]
TINY = {
    "data.size": 32,
    "model.channels": (8, 16, 16),
    "model.dropout": (0.1, 0.1, 0.1),
    "batch.labelled": 3,
    "batch.unlabelled": 3,
    "total_steps": 200,
    "eval_every": 20,
    "log_every": 5,
    "eval_batch": 8,
    "optimizer.lr": 0.05,  # 200 steps have to do
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Phantoms and lists: two labelled, two image-only, one for validation, two for testing."""
    folder = tmp_path_factory.mktemp("scans")
    patients = {f"Patient_{i:02d}": i not in (3, 4) for i in range(1, 8)}
    write_phantoms(folder / "scans", patients, size=20, depth=5, seed=0)
    (folder / "lists").mkdir()
    names = list(patients)
    for name, part in (("train", names[:4]), ("val", names[4:5]), ("test", names[5:])):
        (folder / "lists" / f"{name}.txt").write_text("\n".join(part))
    return folder


def config_of(scans, method="cgs", **fields):
    config = segthor.get_config(f"method={method},labelled=2")
    config.update_from_flattened_dict(TINY | fields)
    config.data.root, config.data.splits = str(scans / "scans"), str(scans / "lists")
    if method == "supervised":
        config.batch.unlabelled = 0
    return config


def command(scans, workdir, *options, program="main"):
    """The command line of the same configuration."""
    line = [sys.executable, "-m", f"cgs_jax.{program}", "--workdir", str(workdir)]
    if program == "main":
        line += ["--config", "configs/segthor.py:labelled=2"]
        line += [f"--config.{k}={v}" for k, v in TINY.items()]
        line += [f"--config.data.root={scans}/scans", f"--config.data.splits={scans}/lists"]
    return [*line, *options]


def start(line, **environment):
    options = {"cwd": REPOSITORY, "env": os.environ | environment, "timeout": 300}
    return subprocess.run(line, capture_output=True, text=True, **options)


def final_state(workdir, config):
    method = train.make_method(config)
    like = train.init_state(
        method, optim.make_optimizer(config)[0], config, sharding.make_mesh(config)
    )
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest == config.total_steps
    state = checkpoints.restore(checkpoints.latest, like)
    checkpoints.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """A finished run of the command line."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    done = start(command(scans, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_outputs_of_a_run(trained):
    workdir, printed = trained
    names = ["config.json", "checkpoints", "metrics.jsonl", "tensorboard", "summary.json"]
    for name in [*names, "curves.png", "overlays.png", "splits.json"]:
        assert (workdir / name).exists(), name
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary["test"]["cases"]) == {"Patient_06", "Patient_07"}
    assert set(summary["val"]["cases"]) == {"Patient_05"}
    scores = summary["test"]["cases"]["Patient_06"]["heart"]
    assert set(scores) == {"dice", "jaccard", "hd95", "asd", "hd95_mm", "asd_mm"}
    assert "undefined" in summary["test"]["organs"]["trachea"]["dice"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(5, 201, 5))
    validation = {line["step"]: line["val/dice"] for line in lines if "val/dice" in line}
    assert list(validation) == list(range(20, 201, 20))
    assert summary["step"] in [s for s, v in validation.items() if v == max(validation.values())]
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert kept == {200, summary["step"]}  # the latest and the best
    assert "esophagus" in printed
    assert "Dice %" in printed
    assert compare.compare([workdir, workdir]).count("+0.00") == 5


def test_total_steps_0_reproduces_the_scores(trained, scans):
    workdir, _ = trained
    before = (workdir / "summary.json").read_bytes()
    (workdir / "summary.json").unlink()
    main.run(config_of(scans, total_steps=0), workdir)
    assert (workdir / "summary.json").read_bytes() == before


def test_run_from_before_a_field_was_there(trained, scans, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "old")
    text = json.loads((workdir / "config.json").read_text())
    del text["model"]["dtype"], text["model"]["lanes"]
    (workdir / "config.json").write_text(json.dumps(text))
    assert main.run(config_of(scans, total_steps=0), workdir)["step"]


def test_specialists_can_predict(trained, scans):
    workdir, _ = trained
    summary = main.run(config_of(scans, total_steps=0, inference="specialists"), workdir)
    assert summary["inference"] == "specialists"
    main.run(config_of(scans, total_steps=0), workdir)


def test_kill_and_resume_is_bit_identical(trained, scans, tmp_path):
    """kill -9 at random moments, the same command again: the state of the undisturbed run."""
    workdir, kills = tmp_path / "killed", 0
    line = command(scans, workdir)
    for _ in range(3):
        process = subprocess.Popen(
            line, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        metrics = workdir / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (
            not metrics.exists() or metrics.stat().st_size <= before + 100
        ):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    done = start(line)
    assert done.returncode == 0, done.stderr
    config = config_of(scans)
    expected, state = final_state(trained[0], config), final_state(workdir, config)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert (workdir / "metrics.jsonl").read_text() == (trained[0] / "metrics.jsonl").read_text()
    assert (workdir / "summary.json").read_text() == (trained[0] / "summary.json").read_text()


@pytest.mark.parametrize(
    ("method", "fields"), [("supervised", {}), ("cgs", {"method.plan": "full"})]
)
def test_other_methods_run_the_same_path(scans, tmp_path, method, fields):
    summary = main.run(config_of(scans, method, total_steps=4, **fields), tmp_path / "run")
    assert set(summary["test"]["organs"]) == {"esophagus", "heart", "trachea", "aorta"}


def test_every_mesh_gives_the_same_numbers(scans, tmp_path):
    """1 device, 8, and 2 x 4 with split rows, over 10 steps of CGS with everything random on.

    The sums of a step come in another order, which float32 feels in the seventh digit; ten steps
    of SGD amplify that.
    """
    options = ["--config.batch.labelled=8", "--config.batch.unlabelled=8"]
    options += ["--config.total_steps=10", "--config.log_every=1"]
    runs = []
    for devices, space in ((1, 1), (8, 1), (8, 4)):
        flags = f"--xla_force_host_platform_device_count={devices}"
        workdir = tmp_path / f"mesh{devices}x{space}"
        where = [f"--config.mesh.space={space}", "--config.mesh.shard_params=1000"]
        done = start(command(scans, workdir, *options, *where), XLA_FLAGS=flags)
        assert done.returncode == 0, done.stderr
        assert f"{devices} device(s)" in done.stdout
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        summary = json.loads((workdir / "summary.json").read_text())
        state = final_state(workdir, config_of(scans, **{"total_steps": 10, "batch.labelled": 8}))
        runs.append((losses, summary["test"]["mean"]["dice"], state))
    for losses, dice, state in runs[1:]:
        np.testing.assert_allclose(losses[:3], runs[0][0][:3], rtol=1e-5)
        np.testing.assert_allclose(losses, runs[0][0], rtol=1e-3)
        assert abs(dice - runs[0][1]) < 0.01
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3)  # noqa: E731
        jax.tree.map(close, state, runs[0][2])


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
        predict.predict(workdir, inputs, inputs, overwrite=True)
    (inputs / "b.nii").write_bytes(b"damaged")
    (tmp_path / "labels" / "c.nii.gz").unlink()
    with pytest.raises(UserError, match=r"b.nii is not a whole NIfTI.*; 2 others are written to"):
        predict.predict(workdir, inputs, tmp_path / "labels", overwrite=True)
    assert (tmp_path / "labels" / "c.nii.gz").exists()
    with pytest.raises(UserError, match="no such file or folder"):
        predict.predict(workdir, tmp_path / "nothing", tmp_path / "labels")
    with pytest.raises(UserError, match="holds no run"):
        predict.predict(tmp_path, inputs, tmp_path / "new")
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    with pytest.raises(UserError, match="can not write to --output"):
        predict.predict(workdir, inputs, blocked / "labels")


def test_prediction_scores_as_the_evaluation_says(trained, scans, tmp_path):
    """Labels written as NIfTI against the ground truth give the Dice of summary.json."""
    workdir, _ = trained
    cases = json.loads((workdir / "summary.json").read_text())["test"]["cases"]
    case = max(cases, key=lambda name: cases[name]["heart"]["dice"])
    source = scans / "scans" / case
    written = predict.predict(workdir, source / f"{case}.nii.gz", tmp_path)
    label = np.asarray(nib.load(written[0]).dataobj)
    truth = np.asarray(nib.load(source / "GT.nii.gz").dataobj)
    assert cases[case]["heart"]["dice"] > 0.3
    for i, organ in enumerate(("esophagus", "heart", "trachea", "aorta"), 1):
        total = (label == i).sum() + (truth == i).sum()
        dice = 2 * ((label == i) & (truth == i)).sum() / total if total else None
        assert dice == pytest.approx(cases[case][organ]["dice"])


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (42, r"the loss is (nan|inf) at step 4[3-5]; the checkpoint of step 40 is kept"),
        (39, r"a parameter is not finite at step 40; the checkpoint of step 20 is kept"),
    ],
)
def test_nan_stops_and_keeps_the_last_good_checkpoint(scans, tmp_path, monkeypatch, last, message):
    make = optim.make_optimizer

    def explodes(config):
        schedule = lambda step: jax.numpy.where(step < last, 0.01, jax.numpy.nan)  # noqa: E731
        return optim.sgd(schedule, 0.9, 1e-4), make(config)[1]

    monkeypatch.setattr(optim, "make_optimizer", explodes)
    with pytest.raises(UserError, match=message):
        main.run(config_of(scans, "supervised"), tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest == last // 20 * 20
    checkpoints.close()


def test_class_without_dice_is_called_out(scans, tmp_path, monkeypatch, capsys):
    def no_trachea(predict, stacks, size, batch):
        for stack in stacks:
            yield np.full(stack.shape, 2, np.uint8)

    monkeypatch.setattr(evaluate, "segment", no_trachea)
    main.run(config_of(scans, "supervised", total_steps=40), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "WARNING: validation Dice stays 0 for aorta, esophagus, trachea\n" in printed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.classes": ("a", "b", "c")},
            r"trained with data.classes=\('esophagus', .*--workdir",
        ),
        ({"optimizer.lr": 0.5}, "trained with optimizer.lr=0.05, now it is 0.5"),
        ({"method.name": "cpss"}, "unknown method 'cpss'; there are: cgs, supervised"),
        ({"model.name": "vnet"}, "unknown model 'vnet'; there are: unet"),
        (
            {"data.name": "lits"},
            "unknown data set 'lits'; there are: acdc, nnunet, segthor, synapse",
        ),
        ({"method.plan": "quick"}, "unknown --config.method.plan 'quick'; there are: full, lean"),
        ({"inference": "both"}, "unknown inference 'both'"),
        ({"data.size": 18}, "data.size=18 does not divide by 4"),
        ({"batch.unlabelled": 0}, "batch.unlabelled must be at least 1"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"model.dropout": (0.1,)}, "model.dropout and model.channels must have the same length"),
        ({"model.dropout": (0.1, 1.0, 0.1)}, "rates are between 0 and 0.9"),
        ({"model.dtype": "float16"}, "unknown model.dtype 'float16'"),
        ({"augment.degrees": 180.0}, "augment.degrees=180.0 must be between 0 and 90"),
    ],
)
def test_bad_options(trained, scans, fields, message):
    with pytest.raises(UserError, match=message):
        main.run(config_of(scans, **fields), trained[0])


def test_workdir_without_a_whole_run(trained, scans, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        main.run(config_of(scans, total_steps=0), tmp_path / "nothing")
    with pytest.raises(UserError, match="data.labelled=9, but only 2 patients"):
        main.run(config_of(scans, **{"data.labelled": 9}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()  # so the mended command can use it
    shutil.copytree(trained[0], tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "checkpoints").glob("*/default/manifest.ocdbt"):
        file.unlink()
    with pytest.raises(UserError, match="checkpoints/[0-9]+ is damaged"):
        main.run(config_of(scans, total_steps=0), tmp_path / "damaged")
    for text in ("{", "[]", "{}"):
        (tmp_path / "damaged" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json or splits.json in .* is damaged"):
            main.run(config_of(scans), tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints, but no config.json"):
        main.run(config_of(scans), tmp_path / "damaged")


def test_two_processes_in_one_workdir(trained, scans):
    with open(trained[0] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working in"):
            main.run(config_of(scans, total_steps=0), trained[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.nosuch=3"], "unknown config field"),
        (["--config.total_steps=many"], "total_steps"),
        (["config.total_steps=3"], "unexpected argument 'config.total_steps=3'"),
        (
            ["--config.data.root=/nonexistent/folder"],
            "no SegTHOR in '/nonexistent/folder': --config.data.root",
        ),
        (["--workdir=/dev/null/run"], "can not write to --workdir /dev/null/run"),
    ],
)
def test_command_line_errors_are_one_line(scans, tmp_path, options, message):
    done = start(command(scans, tmp_path / "run", *options))
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_full_disk_is_one_line(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")

    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(SystemExit) as stop:
        main.cli(full)
    assert stop.value.code == "error: No space left on device: runs/a/metrics.jsonl"


def test_programming_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(ZeroDivisionError):
        main.cli(lambda _: 1 / 0)


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
    (label,) = predict.predict(workdir, image, tmp_path / "labels")
    image, label = nib.load(image), nib.load(label)
    assert label.shape == image.shape
    np.testing.assert_array_equal(label.affine, image.affine)
