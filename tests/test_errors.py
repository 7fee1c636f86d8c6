"""What goes wrong is one clear line, exit code 1, and nothing is lost."""

import errno
import fcntl
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from cgs_jax import evaluate, main, predict
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime import console, devices, processes, run_folder
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import optimizers, train_step
from cgs_jax.training.checkpoints import Checkpoints
from configs import segthor
from runs import command, config_of, start


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (42, r"the loss is (nan|inf) at step 4[3-5]; the checkpoint of step 40 is kept"),
        (39, r"a parameter is not finite at step 40; the checkpoint of step 20 is kept"),
    ],
)
def test_nan_stops_and_keeps_the_last_good_checkpoint(scans, tmp_path, monkeypatch, last, message):
    make = optimizers.make_optimizer

    def explodes(config):
        schedule = lambda step: jax.numpy.where(step < last, 0.01, jax.numpy.nan)  # noqa: E731
        return optimizers.sgd(schedule, 0.9, 1e-4), make(config)[1]

    monkeypatch.setattr(optimizers, "make_optimizer", explodes)
    with pytest.raises(UserError, match=message):
        main.run(config_of(scans, "supervised"), tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest == last // 20 * 20
    checkpoints.close()


def test_stopped_before_the_first_validation(scans, tmp_path, monkeypatch):
    """There is nothing yet to test or to predict with."""
    monkeypatch.setattr(processes.Stop, "at", lambda self, step: setattr(self, "now", True) or True)
    workdir = tmp_path / "run"
    assert main.run(config_of(scans), workdir) is None
    with pytest.raises(UserError, match="holds no validated checkpoint; train first"):
        evaluate.evaluate([workdir])
    with pytest.raises(UserError, match="holds no validated checkpoint; train first"):
        predict.predict([workdir], scans / "scans" / "Patient_06", tmp_path / "labels")


def test_class_without_dice_is_called_out(scans, tmp_path, monkeypatch, capsys):
    def no_trachea(self, volumes, *scorings):
        for name, volume in volumes:
            yield name, [np.full(volume.image.shape[1:], 2, np.uint8)] * len(scorings)

    monkeypatch.setattr(Predictor, "labels", no_trachea)
    main.run(config_of(scans, "supervised", total_steps=40), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "WARNING: validation Dice stays 0 for aorta, esophagus, trachea\n" in printed


THREE_LEVELS = {"model.channels": (8, 16, 16), "model.dropout": (0.1, 0.1, 0.1)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"data.classes": ("a", "b", "c")},
            r"trained with data.classes=\('esophagus', .*--workdir",
        ),
        ({"optimizer.lr": 0.5}, "trained with optimizer.lr=0.05, now it is 0.5"),
        ({"method.name": "cpss"}, "unknown method 'cpss'; there are: ad_mt, bcp, cgs"),
        ({"model.name": "vnet"}, "unknown model 'vnet'; there are: transunet, unet"),
        (
            {"data.name": "lits"},
            "unknown data set 'lits'; there are: acdc, nnunet, segthor, synapse",
        ),
        ({"method.plan": "quick"}, "unknown --config.method.plan 'quick'; there are: full, lean"),
        ({"inference": "nobody"}, "unknown inference 'nobody'; there are: both, generalist"),
        ({"predict_with": "both"}, "unknown predict_with 'both'; there are: student, teacher"),
        (THREE_LEVELS | {"data.size": 18}, "data.size=18 does not divide by 4"),
        (
            THREE_LEVELS | {"data.patch": 18},
            "data.patch or data.grow_to has 18: sides of windows divide by 4",
        ),
        ({"data.grow_to": (64,), "data.grow_at": (0.5,)}, "has 64: .* at most data.size=32"),
        ({"data.grow_at": (0.5,)}, "data.grow_at and data.grow_to must have the same length"),
        ({"data.grow_at": (2.0,), "data.grow_to": (0,)}, "shares of total_steps in rising order"),
        ({"data.patch_anywhere": 0.7, "data.patch_foreground": 0.7}, "are shares of 1"),
        ({"precise_bn": -1}, "precise_bn must be at least 0"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"method.name": "ad_mt", "seed": -1}, "seed=-1 must be between 0 and 4294967295"),
        ({"method.name": "ad_mt", "total_steps": -5}, "total_steps must be at least 1, not -5"),
        ({"batch.unlabelled": -1}, "batch.unlabelled must be at least 0, not -1"),
        (THREE_LEVELS | {"window": 18}, "window=18 does not divide by 4"),
        ({"combine": "sum"}, "unknown combine 'sum'; there are: average, confidence, vote"),
        ({"method.specialists": False}, "specialists=False goes with method.terms"),
        ({"batch.unlabelled": 0}, "batch.unlabelled must be at least 1"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"model.dropout": (0.1,)}, "model.dropout and model.channels must have the same length"),
        (THREE_LEVELS | {"model.dropout": (0.1, 1.0, 0.1)}, "rates are between 0 and 0.9"),
        ({"model.dtype": "float16"}, "unknown model.dtype 'float16'"),
        ({"mesh.space": 3}, "mesh.data=-1 times mesh.space=3 must be the 1 devices"),
        ({"augment.degrees": 180.0}, "augment.degrees=180.0 must be between 0 and 90"),
        ({"method.tau": 1.5}, "method.tau=1.5 must be between 0 and 1"),
        ({"method.lambda_max": float("nan")}, "method.lambda_max=nan: give a finite number"),
        ({"optimizer.lr": float("inf")}, "optimizer.lr=inf: give a finite number"),
        ({"optimizer.lr": -0.1}, "optimizer.lr must be at least 0, not -0.1"),
        ({"method.terms": ()}, "--config.method.terms is empty; there are: G_from_g"),
        ({"method.terms": (1,)}, "unknown --config.method.terms 1; there are: G_from_g"),
        ({"model.channels": (8, 0)}, r"model.channels=\(8, 0\): whole numbers from 1 on"),
        ({"model.channels": (8, 8.5)}, r"model.channels=\(8, 8.5\): whole numbers"),
        ({"data.grow_at": ("a",), "data.grow_to": (0,)}, "shares of total_steps in rising order"),
        ({"data.numbers": (1, 2.5, 3, 4)}, "organs have numbers of their own"),
    ],
)
def test_bad_options(trained, scans, fields, message):
    with pytest.raises(UserError, match=message):
        main.run(config_of(scans, **fields), trained[0])


def test_workdir_without_a_whole_run(trained, scans, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        evaluate.evaluate([tmp_path / "nothing"])
    with pytest.raises(UserError, match="data.labelled=9, but only 3 patients"):
        main.run(config_of(scans, **{"data.labelled": 9}), tmp_path / "run")
    for field, value in (("labelled", -1), ("fold", -2), ("split_seed", -1)):
        with pytest.raises(UserError, match=f"data.{field}"):
            main.run(config_of(scans, **{f"data.{field}": value}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()  # so the mended command can use it
    shutil.copytree(trained[0], tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "checkpoints").glob("*/default/manifest.ocdbt"):
        file.unlink()
    for _ in range(2):  # it does not start anew in silence, the second time either
        with pytest.raises(UserError, match="no checkpoint in .* is whole"):
            main.run(config_of(scans), tmp_path / "damaged")
    for text in ("{", "[]", "{}"):
        (tmp_path / "damaged" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json or splits.json in .* is damaged"):
            main.run(config_of(scans), tmp_path / "damaged")
    shutil.copytree(trained[0], tmp_path / "lost")
    (tmp_path / "lost" / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints, but no config.json"):
        main.run(config_of(scans), tmp_path / "lost")


@pytest.mark.parametrize(
    ("count", "fields", "message"),
    [
        (8, {}, "12 does not divide by mesh.data, 8 devices; --config.mesh.data=4 --config.mesh.s"),
        (8, {"batch.unlabelled": 6}, "8 devices; --config.mesh.data=2 --config.mesh.space=4 fit"),
        (8, {"mesh.space": 8, "data.size": 64}, "4 rows of .*; --config.mesh.data=4 --config.mesh"),
        (5, {}, "does not divide by mesh.data, 5 devices; use fewer devices"),
        (
            4,
            {"batch.labelled": 2, "data.depth": 16},
            "4 devices; use fewer devices, or another bat",
        ),
    ],
)
def test_devices_that_do_not_share_the_work(count, fields, message):
    config = segthor.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        devices.make_mesh(config, [None] * count)


def test_coordinator_without_port():
    with pytest.raises(UserError, match="--coordinator=here must be HOST:PORT"):
        processes.initialize("here", 2, 0)


def test_two_processes_in_one_workdir(trained, scans):
    with open(trained[0] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working in"):
            evaluate.evaluate([trained[0]])
        with pytest.raises(UserError, match="another process is working in"):
            main.run(config_of(scans), trained[0])


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        ("cgs", {}, "base=cgs: CGS lies over other methods with unlabelled images only"),
        ("supervised", {}, "base=supervised: CGS lies over other methods"),
        ("nonsense", {}, "unknown method 'nonsense'; there are: ad_mt, bcp"),
        ("fixmatch", {"cgs.terms": ("G_from_x",)}, "unknown --config.cgs.terms G_from_x"),
        (
            "bcp",
            {"method.pretrain": 9000.0},
            "method.pretrain=9000.0: it is a share of total_steps",
        ),
        ("urpc", {"model.channels": (4, 8), "model.dropout": (0.1, 0.1)}, "at least 3 levels"),
        ("bcp", {"batch.labelled": 3}, "must be the same even number"),
    ],
)
def test_bad_bases(base, fields, message):
    config = segthor.get_config(f"method=cgs,base={base}")
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        train_step.make_method(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.nosuch=3"], "unknown config field: 'nosuch'"),
        (["--config.modell.lanes=1"], "unknown config field: 'modell.lanes' Did you mean"),
        (["--config.model.layers=1"], "unknown config field: 'model.layers'"),
        (["--config=configs/nope.py"], "--config: [Errno 2] No such file or directory: 'configs/"),
        (["--config.total_steps=many"], "total_steps"),
        (["config.total_steps=3"], "unexpected argument 'config.total_steps=3'"),
        (
            ["--config.data.root=/nonexistent/folder"],
            "no SegTHOR in '/nonexistent/folder': --config.data.root",
        ),
        (
            ["--config.data.root=~/nonexistent"],
            f"no SegTHOR in '{pathlib.Path.home()}/nonexistent': --config.data.root",
        ),
        (["--multihost"], "--multihost: coordinator_address should be defined"),
        (["--process=0"], "--coordinator, --processes and --process go with --multihost"),
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
        cli(full)
    assert stop.value.code == "error: No space left on device: runs/a/metrics.jsonl"


def test_what_a_user_can_not_mend_keeps_its_traceback(monkeypatch):
    """As does everything with --traceback."""

    def too_many(_):
        raise OSError(errno.EMFILE, "Too many open files")

    def wrong(_):
        raise UserError("no such option")

    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(OSError, match="Too many open files"):
        cli(too_many)
    with pytest.raises(SystemExit, match="error: no such option"):
        cli(wrong)
    monkeypatch.setattr(sys, "argv", ["main", "--traceback"])
    with pytest.raises(UserError, match="no such option"):
        cli(wrong)


def test_nobody_listens(monkeypatch):
    """A closed terminal or pipe does not end what would have saved; a full disk is told."""

    def write(text):
        raise OSError(int(text), "the disk is full")

    monkeypatch.setattr(console.tqdm, "write", write)
    console.say(str(errno.EIO))
    console.say(str(errno.EPIPE))
    with pytest.raises(OSError, match="the disk is full"):
        console.say(str(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("Unable to allocate 9 bytes"), "or the job, .* memory: Unable to allocate"),
        (MemoryError(), "or the job, has too little memory: it is used up"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            "the device has too little memory: RESOURCE_EXHAUSTED: Out of memory allocating 9",
        ),
    ],
)
def test_memory_that_is_used_up_is_one_line(monkeypatch, error, line):
    def fills(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["main", "--notraceback"])
    with pytest.raises(SystemExit, match=f"error: .*{line}"):
        cli(fills)
    other = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        cli(lambda _: (_ for _ in ()).throw(other))


def test_long_work_is_told_where_no_bar_can_be_drawn(monkeypatch, capsys):
    """A line at most so often, and none at the end."""
    now = iter(range(0, 1000, 25))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    assert list(console.progress(iter("abcdef"), "reading", 6, "scan")) == list("abcdef")
    assert capsys.readouterr().out.splitlines() == ["reading: 3 of 6 scans"]
    assert list(console.progress([], "reading", 0, "scan")) == []


def test_programming_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main"])
    with pytest.raises(ZeroDivisionError):
        cli(lambda _: 1 / 0)


def test_a_run_of_an_earlier_version_is_named(tmp_path):
    config = segthor.get_config()
    run_folder.check_version(config, tmp_path)
    del config.data.depth
    with pytest.raises(UserError, match="is of an earlier version, which had no depth"):
        run_folder.check_version(config, tmp_path)
