"""Nothing is lost: killed, stopped, and damaged runs go on."""

import contextlib
import errno
import importlib.util
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from cgs_jax.analysis import plots
from cgs_jax.data import nifti
from cgs_jax.runtime import devices, files, logs, processes, run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import loop, train_step
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.train_state import Metrics, TrainState
from runs import before_the_end, begin, command, config_of, saved_state, start


def assert_identical(workdir, trained, scans):
    states = (saved_state(folder, config_of(scans)) for folder in (workdir, trained[0]))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert (workdir / "summary.json").read_text() == (trained[0] / "summary.json").read_text()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_and_resume_is_bit_identical(trained, scans, tmp_path, kills):
    """kill -9 at random moments, the same command again: the state of the undisturbed run."""
    workdir, line = tmp_path / "killed", command(scans, tmp_path / "killed")
    for i in range(kills):
        # Every third comes near the writing of a checkpoint, the others soon after the start.
        process = begin(line, "validation" if i % 3 == 2 else "loss")
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = start(line)
    assert done.returncode == 0, done.stderr
    assert_identical(workdir, trained, scans)
    assert (workdir / "metrics.jsonl").read_text() == (trained[0] / "metrics.jsonl").read_text()


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP")]


@pytest.mark.parametrize("name", ["SIGTERM", *SLOWLY])
def test_stop_by_signal_saves(trained, scans, tmp_path, name):
    workdir = before_the_end(trained, tmp_path / "stopped")
    line = command(scans, workdir)
    process = begin(line, "step 85/")
    process.send_signal(getattr(signal, name))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert printed.endswith(f"stopped and saved; the same command goes on from there: {workdir}\n")
    saved = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert 85 <= saved < 100
    assert not (workdir / "summary.json").exists()
    done = start(line)
    assert f"resuming {workdir} at step {saved}" in done.stdout
    assert_identical(workdir, trained, scans)


def test_few_steps_are_under_way_when_a_run_is_to_stop():
    """The host does not run ahead of a slow device: a stop would have to wait for all of that."""
    made, under_way = [], []
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, x: x @ x, x))

    def train_step(state, batch, seed):
        state = slow(state)
        made.append(Metrics(state[0, :1], ("loss",)))
        return state, made[-1]

    def batches():
        for i in range(10):
            under_way.append(sum(not metrics.values.is_ready() for metrics in made))
            yield i

    never = {"log_every": 100, "eval_every": 100, "total_steps": 100}
    config, state = ConfigDict({"seed": 0} | never), np.eye(512, dtype=np.float32)
    list(loop.steps(config, train_step, state, batches(), 0, None, processes.Stop()))
    assert max(under_way) <= loop.AHEAD


def test_folders_without_locks(tmp_path, monkeypatch, capsys):
    """Some network file systems have none."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with run_folder.locked(tmp_path):
        assert "can not be locked there; start one job" in capsys.readouterr().out


def test_minutes_of_all_starts_add_up(tmp_path):
    """A start counts as far as its last validation."""
    starts = [{"hardware": "a", "jax": "1"}, {"seconds": 60}, {"seconds": 120}]
    starts += [{"hardware": "b", "jax": "2"}, {"seconds": 30}]
    (tmp_path / "times.jsonl").write_text("".join(files.to_json(line) + "\n" for line in starts))
    assert logs.time_spent(tmp_path) == (2.5, "b, jax 2")


def test_the_best_checkpoint_is_kept(tmp_path):
    """By validation Dice, however many come after, with a Dice or without."""

    def state(n):
        value = {"w": jnp.full(3, float(n))}
        return TrainState(jnp.asarray(n), value, value, value, value)

    like = devices.abstract(state(0), devices.replicated(devices.local_mesh()))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for n, dice in enumerate((0.2, 0.9, 0.4, 0.3), 1):
            checkpoints.save(state(n), dice)
        checkpoints.save(state(5))
        assert checkpoints.restore_best(like).params["w"].tolist() == [2, 2, 2]
        assert checkpoints.restore_latest(like).params["w"].tolist() == [5, 5, 5]
        assert (checkpoints.best, checkpoints.latest) == (2, 5)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"2", "4", "5"}


def copy_with_damage(trained, workdir, damage):
    """Copies of a run, in each of which another file of the newest checkpoint is damaged."""
    newest = trained[0] / "checkpoints" / "100"
    for i, path in enumerate(sorted(p for p in newest.rglob("*") if p.is_file())):
        copy = shutil.copytree(trained[0], workdir / str(i))
        path = copy / path.relative_to(trained[0])
        damage(path)
        yield path, copy


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Flips a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_checkpoint_is_skipped(trained, scans, tmp_path, capsys, damage):
    """Whatever file is hit: either the state is read as it was saved, or the one before is."""
    config = config_of(scans)
    method = train_step.make_method(config)
    like = train_step.abstract_state(method, devices.make_mesh(config))
    expected = saved_state(trained[0], config)
    skipped = 0
    for path, copy in copy_with_damage(trained, tmp_path, damage):
        checkpoints = Checkpoints(copy)
        state = checkpoints.restore_latest(like)
        checkpoints.close()
        if state.step == 100:
            jax.tree.map(np.testing.assert_array_equal, state, expected)
            continue
        skipped += 1
        assert state.step == 80, path
        assert "checkpoints/100 is damaged" in capsys.readouterr().out
        assert list((copy / "checkpoints").glob("damaged_100_*"))
    assert skipped


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system; a function sets how many KiB are free, None: it can only be read."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=99m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")

    def leave(free):
        used = shutil.disk_usage(folder).used // 1024
        option = "remount,ro" if free is None else f"remount,rw,size={used + free}k"
        subprocess.run([*mount, option, "tmpfs", folder], check=True)

    yield folder, leave
    subprocess.run(["umount", folder], check=True)


def test_full_disk_names_the_file(small_disk):
    """The system does not."""
    disk, leave = small_disk
    scores, curves, labels = (disk / name for name in ("scores.json", "curves.png", "case.nii.gz"))
    (disk / "there").write_text("before")  # a file system of no size would be without limit
    leave(0)
    volume = nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4))
    writes = {
        scores: lambda: files.write_text(scores, "1" * 10_000),
        curves: lambda: plots.save(Figure(), curves),
        labels: lambda: nifti.save(volume, labels),
    }
    for path, write in writes.items():
        with pytest.raises(UserError, match=f"can not write {path}: No space left on device"):
            write()
    if importlib.util.find_spec("SimpleITK"):
        with pytest.raises(UserError, match="can not write .*case.mha: SimpleITK: "):
            nifti.save(volume, disk / "case.mha")
    assert list(disk.rglob("*")) == [disk / "there"]


@pytest.mark.parametrize("lines", [0, 9])
def test_full_disk_ends_the_log(small_disk, lines):
    """It is named, whichever file is the first; nothing waits for what can not be written."""
    disk, leave = small_disk
    scalars = {f"loss/{i}": float(i) for i in range(30)}
    message = f"can not write {disk}/(metrics.jsonl|tensorboard): No space left on device"

    def fill(log):
        for step in range(1000):
            if step == lines:
                leave(0)
            log.write(step, scalars)

    with pytest.raises(UserError, match=message), contextlib.closing(logs.Writer(disk, 0)) as log:
        fill(log)


def test_full_and_read_only_disk(trained, scans, small_disk):
    disk, leave = small_disk
    workdir = before_the_end(trained, disk / "run")
    line = command(scans, workdir)
    for free, message in (
        (
            150,
            f"error: can not write a checkpoint to {workdir}/checkpoints: No space left on device",
        ),
        (None, f"error: can not write to --workdir {workdir}: Read-only file system"),
    ):
        leave(free)
        done = start(line)
        assert done.returncode == 1
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
        assert (workdir / "checkpoints" / "80").exists()
        assert not (workdir / "checkpoints" / "100").exists()
    leave(10_000)
    done = start(line)
    assert "at step 80" in done.stdout
    assert_identical(workdir, trained, scans)


def test_logs_of_a_run_in_a_bucket(tmp_path, monkeypatch):
    """They are written elsewhere and copied: a bucket can not append."""
    monkeypatch.setattr(logs, "is_remote", lambda path: True)
    for begun, there in ((0, 0), (10, 2)):
        with contextlib.closing(logs.Writer(tmp_path, begun)) as writer:
            writer.write(begun + 10, {"loss": 1.0})
            assert len(files.read_lines(tmp_path / "metrics.jsonl")) == there
            writer.publish(begun + 10)
            writer.write(begun + 20, {"loss": 2.0})
    steps = [line["step"] for line in files.read_lines(tmp_path / "metrics.jsonl")]
    assert steps == [10, 20, 30]
    times = files.read_lines(tmp_path / "times.jsonl")
    assert [line["step"] for line in times if "seconds" in line] == [10, 20]
    assert sum("hardware" in line for line in times) == 2
    assert any((tmp_path / "tensorboard").iterdir())


def footprint(process):
    """Resident MiB, open files and threads of a process."""
    folder = pathlib.Path(f"/proc/{process.pid}")
    (resident,) = re.findall(r"VmRSS:\s+(\d+)", (folder / "status").read_text())
    return int(resident) / 1024, *(len(list((folder / x).iterdir())) for x in ("fd", "task"))


@pytest.mark.slow
def test_long_run_does_not_grow(scans, tmp_path):
    """2,400 steps, 120 validations and checkpoints."""
    steps = ["--config.total_steps=2400", "--config.log_every=20"]
    process = begin(command(scans, tmp_path / "run", *steps), "step 300/")
    seen = [footprint(process)]
    for line in process.stdout:
        if any(f"step {n}  validation" in line for n in range(600, 2401, 300)):
            seen.append(footprint(process))
    assert process.wait() == 0
    print("MiB, files, threads:", seen)
    memory, files, threads = zip(*seen, strict=True)
    assert memory[-1] < memory[1] + 20
    for count in (files, threads):  # more while a checkpoint is written
        assert min(count[-3:]) <= min(count[:3]) + 1
