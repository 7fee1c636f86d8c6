"""Trains, resumes and evaluates.

python -m cgs_jax.main --config configs/segthor.py --workdir RUN --config.data.root=FOLDER
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from cgs_jax import distributed, evaluate, plots, run_config, sharding, train
from cgs_jax.checkpoint import Checkpoints
from cgs_jax.data import prepare
from cgs_jax.errors import UserError
from cgs_jax.writers import read_metrics, say, to_json, write_text


def run(config: ConfigDict, workdir: pathlib.Path) -> dict | None:
    """Trains what is left to train, tests the best checkpoint, and writes the outputs.

    `config.total_steps` 0 tests a trained `workdir` without training. Returns summary.json; None
    when training was stopped by a signal.
    """
    prepare.dataset(config)
    method = train.make_method(config)
    mesh = sharding.make_mesh(config)
    only_evaluate, splits = config.total_steps == 0, None
    if only_evaluate:
        config.total_steps = run_config.load(workdir)[0].total_steps
    with run_config.locked(workdir), contextlib.closing(Checkpoints(workdir)) as checkpoints:
        if (workdir / "config.json").exists():
            saved, splits = run_config.load(workdir)  # a run keeps its cases
            run_config.check_same(saved, config, workdir)
        elif checkpoints.latest:
            raise UserError(f"{workdir} holds checkpoints, but no config.json; choose another")
        with distributed.first_process_first():
            prepared = prepare.prepare(config, splits)
        places = {"data.root": "", "data.cache": ""}
        same = config.copy_and_resolve_references()
        same.update_from_flattened_dict(places)
        distributed.check_same("options", same.to_json())
        distributed.check_same("scans", (prepared.splits, prepared.images.shape))
        if not splits and distributed.is_first():
            run_config.save(config, prepared.splits, workdir)
        if not only_evaluate and not train.train(
            config, method, prepared, checkpoints, workdir, mesh
        ):
            return None
        return test(config, method, prepared, checkpoints, workdir, mesh)


def test(config, method, prepared, checkpoints, workdir, mesh) -> dict:
    """Scores the best checkpoint on validation and test volumes; writes summary and pictures."""
    state, step = train.restore_best(config, method, checkpoints, workdir, mesh)
    predict = evaluate.make_predict(method)(state)
    summary = {"checkpoint": "best", "step": step, "inference": config.inference}
    looks = plots.Looks()
    for split in ("val", "test"):
        cases = getattr(prepared.splits, split)
        look = looks if split == "test" else None
        results = evaluate.evaluate(predict, prepared, cases, config, surface=True, look=look)
        summary[split] = evaluate.summarise(results)
    looks.gather()
    if distributed.is_first():
        write_text(workdir / "summary.json", to_json(summary, indent=1) + "\n")
        plots.curves(read_metrics(workdir), config.data.classes, workdir / "curves.png")
        plots.overlays(looks, results, config.data, workdir / "overlays.png")
    say(f"\ntest, best validation checkpoint (step {step}), {len(results)} cases")
    say(evaluate.table(summary["test"]))
    for name in ("summary.json", "curves.png", "overlays.png"):
        say(str(workdir / name))
    return summary


def cli(main: Callable[[list[str]], None]) -> None:
    """Runs `main` with parsed flags; what the user can mend is one line and exit code 1."""
    # Compilation takes most of a minute; later starts take it from here.
    cache = pathlib.Path.home() / ".cache" / "cgs_jax" / "xla"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    app.define_help_flags()
    try:
        arguments = flags.FLAGS(sys.argv)
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # An error inside the config file arrives as its traceback: the last line says what it is.
        sys.exit("error: " + (lines[-1] if "Traceback" in str(error) else " ".join(lines)))
    except (AttributeError, KeyError) as error:  # how ml_collections answers an unknown field
        sys.exit(f"error: unknown config field: {' '.join(str(error.args[0]).split())}")
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if len(arguments) > 1:
        sys.exit(f"error: unexpected argument {arguments[1]!r}; options begin with --")
    try:
        main(arguments)
    except (Exception, KeyboardInterrupt) as error:
        line = _explain(error)
        distributed.leave(line)
        if not line:
            raise
        sys.exit(line)


def _explain(error: BaseException) -> str:
    """What the user can mend, as one line; '' is for programming errors."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training run goes on from its last checkpoint"
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError):  # disk full, permissions, ...
        where = f": {error.filename}" if error.filename else ""
        return "error: " + " ".join(f"{error.strerror or error}{where}".split())
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        reason = " ".join(str(error).split())[:200]
        return (
            f"error: another process is lost ({reason}); the same command in all processes goes on "
            "from the last checkpoint"
        )
    return ""


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
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
            distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        elif _COORDINATOR.value or _PROCESSES.value or _PROCESS.value:
            raise UserError("--coordinator, --processes and --process go with --multihost")
        if run(_CONFIG.value, pathlib.Path(_WORKDIR.value)) is None:
            say(f"stopped and saved; the same command goes on from there: {_WORKDIR.value}")

    cli(_main)
