"""Nothing is lost: killed, stopped, and damaged runs go on."""

import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from runs import begin, command, config_of, final_state, start

from cgs_jax import optim, sharding, train
from cgs_jax.checkpoint import Checkpoints


def assert_identical(workdir, trained, scans):
    states = (final_state(folder, config_of(scans)) for folder in (workdir, trained[0]))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert (workdir / "summary.json").read_text() == (trained[0] / "summary.json").read_text()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_and_resume_is_bit_identical(trained, scans, tmp_path, kills):
    """kill -9 at random moments, the same command again: the state of the undisturbed run."""
    workdir, line = tmp_path / "killed", command(scans, tmp_path / "killed")
    killed = 0
    for i in range(kills):
        # Steps take milliseconds: lines that are waited for spread the moments over the run.
        until = f"step {20 * (1 + 9 * i // kills)}  validation"
        process = begin(line, "resuming" if i % 2 else until)
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed > kills / 2  # the others were through
    done = start(line)
    assert done.returncode == 0, done.stderr
    assert_identical(workdir, trained, scans)
    assert (workdir / "metrics.jsonl").read_text() == (trained[0] / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stop_by_signal_saves(trained, scans, tmp_path, name):
    workdir = tmp_path / "stopped"
    line = command(scans, workdir)
    process = begin(line, "step 50/")
    process.send_signal(getattr(signal, name))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert printed.endswith(f"stopped and saved; the same command goes on from there: {workdir}\n")
    saved = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert 50 <= saved < 200
    done = start(line)
    assert f"resuming {workdir} at step {saved}" in done.stdout
    assert_identical(workdir, trained, scans)


def copy_with_damage(trained, workdir, damage):
    """Copies of a run, in each of which another file of the newest checkpoint is damaged."""
    newest = trained[0] / "checkpoints" / "200"
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


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_checkpoint_is_skipped(trained, scans, tmp_path, capsys, damage):
    """Whatever file is hit: either the state is read as it was saved, or the one before is."""
    config = config_of(scans)
    method, optimizer = train.make_method(config), optim.make_optimizer(config)[0]
    like = train.init_state(method, optimizer, config, sharding.make_mesh(config))
    expected = final_state(trained[0], config)
    skipped = 0
    for path, copy in copy_with_damage(trained, tmp_path, damage):
        checkpoints = Checkpoints(copy)
        state = checkpoints.restore_latest(like)
        checkpoints.close()
        if state.step == 200:
            jax.tree.map(np.testing.assert_array_equal, state, expected)
            continue
        skipped += 1
        assert state.step == 180, path
        assert "checkpoints/200 is damaged" in capsys.readouterr().out
        assert (copy / "checkpoints" / "damaged_200").exists()
    assert skipped
