"""Trains, resumes and evaluates.

python -m cgs_jax.main --config configs/segthor.py --workdir RUN --config.data.root=FOLDER
"""

import contextlib
import pathlib

from absl import flags
from ml_collections import ConfigDict, config_flags

from cgs_jax.analysis import plots, report
from cgs_jax.data import cache
from cgs_jax.inference import predictor
from cgs_jax.runtime import devices, processes, run_folder
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import folder, read_lines, to_json, write_text
from cgs_jax.runtime.logs import say
from cgs_jax.scoring import summaries
from cgs_jax.training import loop, train_step
from cgs_jax.training.checkpoints import Checkpoints


def run(config: ConfigDict, workdir: pathlib.Path) -> dict | None:
    """Trains what is left to train, tests the best checkpoint, and writes the outputs.

    `config.total_steps` 0 tests a trained `workdir` without training. Returns summary.json; None
    when training was stopped by a signal.
    """
    cache.dataset(config)
    method = train_step.make_method(config)
    mesh = devices.make_mesh(config)
    only_evaluate, splits = config.total_steps == 0, None
    if only_evaluate:
        config.total_steps = run_folder.load(workdir)[0].total_steps
    with run_folder.locked(workdir), contextlib.closing(Checkpoints(workdir)) as checkpoints:
        finished = checkpoints.latest == config.total_steps
        if (workdir / "config.json").exists():
            saved, splits = run_folder.load(workdir)  # a run keeps its cases
            free = run_folder.FREE + run_folder.PREDICTION * finished
            run_folder.check_same(saved, config, workdir, free)
        elif checkpoints.latest:
            raise UserError(f"{workdir} holds checkpoints, but no config.json; choose another")
        with processes.first_process_first():
            prepared = cache.prepare(config, splits)
        options = config.copy_and_resolve_references()
        options.data.root = options.data.cache = ""  # each host may have its own
        processes.check_same("options", options.to_json())
        slices = len(prepared.rows(prepared.splits.train))
        processes.check_same("scans", (prepared.splits, slices))
        if (finished or not splits) and processes.is_first():
            run_folder.save(config, prepared.splits, workdir)
        if not only_evaluate and not loop.train(
            config, method, prepared, checkpoints, workdir, mesh
        ):
            return None
        return test(config, method, prepared, checkpoints, workdir, mesh)


def test(config, method, prepared, checkpoints, workdir, mesh) -> dict:
    """Scores the best and the last checkpoint on validation and test volumes; writes summary, and
    report and pictures of the best."""
    predict_with = predictor.make_predict(method)

    def score(state):
        predict = predict_with(state)
        return predict, {"step": int(state.step)} | summaries.score(predict, prepared, config)

    state = loop.restore_best(config, method, checkpoints, workdir, mesh)
    predict, best = score(state)
    last = best
    if checkpoints.latest != best["step"]:
        _, last = score(checkpoints.restore_latest(state))
    summary = {**predictor.prediction_options(config), **best, "last": last}
    split = summaries.final_split(summary)
    if processes.is_first():
        write_text(workdir / "summary.json", to_json(summary, indent=1) + "\n")
        ranked = summaries.ranked(summary[split]["cases"])
        telling = [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})]
        shown = plots.show(predict, prepared, telling, config)
        figure = plots.overlays(shown, config.data.classes, config.data.slicing)
        plots.save(figure, workdir / "overlays.png", dpi=110)
        figure = plots.curves(read_lines(workdir / "metrics.jsonl"), config.data.classes)
        if figure:  # else metrics.jsonl was not kept
            plots.save(figure, workdir / "curves.png", dpi=120)
        report.write(workdir, config, summary, shown)
    for name in (f"{split}_literature", split):
        count = len(summary[name]["cases"])
        title = f"{summaries.SPLITS[name]}, best validation checkpoint"
        say(f"\n{title} (step {summary['step']}), {count} cases")
        say(summaries.table(summary[name]))
    for name in ("summary.json", "curves.png", "overlays.png", "report.html"):
        say(str(workdir / name))
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
