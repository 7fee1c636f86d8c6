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

from cgs_jax import evaluate, plots, run_config, sharding, train
from cgs_jax.checkpoint import Checkpoints
from cgs_jax.data import prepare
from cgs_jax.errors import UserError
from cgs_jax.writers import read_metrics, say, to_json, write_text


def run(config: ConfigDict, workdir: pathlib.Path) -> dict:
    """Trains what is left to train, tests the best checkpoint, and writes the outputs.

    `config.total_steps` 0 tests a trained `workdir` without training. Returns summary.json.
    """
    prepare.dataset(config)
    method = train.make_method(config)
    mesh = sharding.make_mesh()
    sharding.check_divisible(mesh, **config.batch, eval_batch=config.eval_batch)
    only_evaluate, splits = config.total_steps == 0, None
    if only_evaluate:
        config.total_steps = run_config.load(workdir)[0].total_steps
    with run_config.locked(workdir), contextlib.closing(Checkpoints(workdir)) as checkpoints:
        if (workdir / "config.json").exists():
            saved, splits = run_config.load(workdir)  # a run keeps its cases
            run_config.check_same(saved, config, workdir)
        elif checkpoints.latest:
            raise UserError(f"{workdir} holds checkpoints, but no config.json; choose another")
        prepared = prepare.prepare(config, splits)
        if not splits:
            run_config.save(config, prepared.splits, workdir)
        if not only_evaluate:
            train.train(config, method, prepared, checkpoints, workdir, mesh)
        return test(config, method, prepared, checkpoints, workdir, mesh)


def test(config, method, prepared, checkpoints, workdir, mesh) -> dict:
    """Scores the best checkpoint on validation and test volumes; writes summary and pictures."""
    state, step = train.restore_best(config, method, checkpoints, workdir, mesh)
    compiled = evaluate.make_predict(method, mesh)
    summary = {"checkpoint": "best", "step": step, "inference": config.inference}
    looks = plots.Looks()
    for split in ("val", "test"):
        results = evaluate.evaluate(
            lambda slices: compiled(state, slices),
            prepared,
            getattr(prepared.splits, split),
            config,
            surface=True,
            look=looks if split == "test" else None,
        )
        summary[split] = evaluate.summarise(results)
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
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; a training run goes on from its last checkpoint")
    except OSError as error:  # disk full, permissions, ...
        where = f": {error.filename}" if error.filename else ""
        sys.exit("error: " + " ".join(f"{error.strerror or error}{where}".split()))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
    flags.mark_flags_as_required(["config", "workdir"])
    cli(lambda _: run(_CONFIG.value, pathlib.Path(_WORKDIR.value)) and None)
