"""Trains, resumes and evaluates.

python -m cgs_jax.main --config configs/segthor.py --workdir RUN --config.data.root=FOLDER
"""

import contextlib
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from cgs_jax import evaluate
from cgs_jax.data import cache, tasks
from cgs_jax.runtime import devices, processes, run_folder
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import folder
from cgs_jax.scoring import summaries
from cgs_jax.training import loop, train_step
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.resolve import resolve


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Trains what is left to train, tests the best checkpoint, and writes the outputs.

    Returns summary.json; None when training was stopped by a signal.
    """
    begun = (workdir / "config.json").exists()
    saved, splits = run_folder.load(workdir) if begun else (None, None)  # a run keeps its cases
    config = resolve(config, saved)
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    with run_folder.locked(workdir), contextlib.closing(Checkpoints(workdir)) as checkpoints:
        finished = checkpoints.latest == config.total_steps
        if saved:
            run_folder.check_same(saved, config, workdir, finished)
        elif checkpoints.latest:
            raise UserError(f"{workdir} holds checkpoints, but no config.json; choose another")
        prepared = cache.prepare(config, splits)
        options = ConfigDict(config.to_dict())
        for data in (options.data, *tasks.members(options.data).values()):
            data.root = data.cache = ""  # each host may have its own
        processes.check_same("options", options.to_json())
        digests = prepared.digests()
        processes.check_same("scans", (prepared.splits, digests))
        if begun:
            run_folder.check_scans(digests, workdir, finished)
        elif processes.is_first():
            run_folder.save_scans(digests, workdir)
        if processes.is_first():  # of a run that goes on what is free may be another
            run_folder.save(config, prepared.splits, workdir)
        if not loop.train(method, prepared, checkpoints, workdir, mesh):
            return None
        summary, best = evaluate.best_and_last(method, prepared, checkpoints, mesh)
        evaluate.tell(summary, summaries.final_split(summary))
        if processes.is_first():
            evaluate.write(summary, best, prepared, workdir)
        processes.barrier("outputs written")  # jax waits five minutes at most for who ends later
        return summary


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, or gs://...")
    _MULTIHOST = flags.DEFINE_boolean(
        "multihost",
        False,
        "this is one of several processes; found by itself on TPU pods, SLURM, "
        "Open MPI and Kubernetes, else named by the three flags below",
    )
    _COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 runs")
    _PROCESSES = flags.DEFINE_integer("processes", None, "how many there are")
    _PROCESS = flags.DEFINE_integer("process", None, "which this is, from 0")
    flags.mark_flags_as_required(["config", "workdir"])

    def _main(_):
        if _MULTIHOST.value:
            processes.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        elif {_COORDINATOR.value, _PROCESSES.value, _PROCESS.value} != {None}:
            raise UserError("--coordinator, --processes and --process go with --multihost")
        if run(_CONFIG.value, folder(_WORKDIR.value)) is None:
            say(f"stopped and saved; the same command goes on from there: {_WORKDIR.value}")

    cli(_main)
