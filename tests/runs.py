"""Tiny runs, as a user starts them."""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import jax

from cgs_jax.runtime import devices
from cgs_jax.training import loop, train_step
from cgs_jax.training.checkpoints import Checkpoints
from configs import segthor

REPOSITORY = pathlib.Path(__file__).parents[1]
TINY = {
    "data.size": 32,
    "model.channels": (8, 16),
    "model.dropout": (0.1, 0.1),
    "batch.labelled": 4,
    "batch.unlabelled": 4,
    "total_steps": 100,
    "eval_every": 20,
    "log_every": 5,
    "eval_batch": 8,
    "optimizer.lr": 0.05,  # 100 steps have to do
}


def config_of(scans, method="cgs", **fields):
    config = segthor.get_config(f"method={method},labelled=2")
    config.update_from_flattened_dict(TINY | fields)
    config.data.root, config.data.splits = str(scans / "scans"), str(scans / "lists")
    if method == "supervised":
        config.batch.unlabelled = 0
    return config


def command(scans, workdir, *options, program="main", processes=0):
    """The command line of the same configuration."""
    line = [sys.executable, "-m", f"cgs_jax.{program}"]
    if processes:
        line = ["bash", "launch/local_processes.sh", str(processes)]
    line += ["--workdir", str(workdir)]
    if program == "main":
        line += ["--config", "configs/segthor.py:labelled=2"]
        line += [f"--config.{k}={v}" for k, v in TINY.items()]
        line += [f"--config.data.root={scans}/scans", f"--config.data.splits={scans}/lists"]
    return [*line, *options]


def environment(devices):
    """CPU devices for each process. On one, programs take so many steps that level 0 is slower."""
    flags = os.environ["XLA_FLAGS"]
    if devices == 1:
        flags = flags.replace("level=0", "level=1")
    flags += f" --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHON": sys.executable}


def start(line, devices=1):
    """Runs to the end."""
    options = {"cwd": REPOSITORY, "env": environment(devices), "timeout": 300}
    return subprocess.run(line, capture_output=True, text=True, **options)


def begin(line, until, devices=1):
    """Starts in the background, in a group of its own, and waits for a line with `until`."""
    options = {"cwd": REPOSITORY, "env": environment(devices), "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(line, **options)
    printed = list(itertools.takewhile(lambda line: until not in line, process.stdout))
    assert process.poll() is None, "".join(printed)
    return process


def processes_with(*words):
    """Numbers of the Python processes whose command line has all `words`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if set(words) <= set(arguments) and "cgs_jax.main" in arguments:
            found.append(int(path.parent.name))
    return found


def saved_state(workdir, config, step=TINY["total_steps"]):
    """The state of a step, as numpy arrays."""
    method = train_step.make_method(config)
    like = train_step.abstract_state(method, devices.make_mesh(config))
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest == config.total_steps
    state, damage = checkpoints._read(step, like)
    checkpoints.close()
    assert not damage
    return jax.device_get(state)


def before_the_end(trained, workdir):
    """A copy of the finished run, of which the last 20 steps and the results are taken back."""
    shutil.copytree(trained[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / str(TINY["total_steps"]))
    for name in loop.RESULTS:
        (workdir / name).unlink()
    return workdir
