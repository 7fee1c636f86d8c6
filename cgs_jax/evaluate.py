"""Scores a trained run on its validation and test cases, or several runs that predict together.

python -m cgs_jax.evaluate --workdir RUN [--workdir RUN ...] [--inference both] [--combine vote] \
    [--upsample nearest] [--largest_component] [--window 128] [--root FOLDER] [--cache FOLDER] \
    [--output FILE.json]

A finished run that predicts by its own options gets its summary, report and pictures anew, unless
its folder is read-only.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cgs_jax.analysis import plots, report
from cgs_jax.data import cache, tasks
from cgs_jax.data.case_lists import Splits
from cgs_jax.data.prepared import Prepared
from cgs_jax.inference import predictor
from cgs_jax.inference.predictor import Predictor
from cgs_jax.methods.base import Method
from cgs_jax.runtime import devices, run_folder
from cgs_jax.runtime.cli import cli, output_file
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import folder, read_lines, to_json, write_text
from cgs_jax.scoring import nnunet_summary, summaries
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.train_step import abstract_state


def evaluate(
    workdirs: Sequence[pathlib.Path],
    options: Mapping[str, Any] | None = None,
    root: str = "",
    prepared_in: str = "",
) -> dict[str, Any]:
    """Scores validation and, if the first run scores them, test cases.

    Args:
      workdirs: trained runs. Of a single one the last checkpoint is scored, too, and its outputs
        are written anew if it is finished, its folder can be written and `options` change nothing.
      options: replace those of the first run, such as {'combine': 'vote'}.
      root, prepared_in: where its scans and the prepared ones are now, if elsewhere.

    Returns:
      What summary.json holds.

    Raises:
      UserError: as `Predictor.restore`, or the runs have other validation or test cases.
    """
    saved, splits = run_folder.load(workdirs[0])
    if splits.test and not saved.test:
        say(
            "test cases are left out, for the run has test=False; its command with "
            "--config.test=True scores them, without more training"
        )
    for workdir in workdirs[1:]:
        _, other = run_folder.load(workdir)
        if (set(other.val), set(other.test)) != (set(splits.val), set(splits.test)):
            raise UserError(f"{workdir} and {workdirs[0]} have other validation or test cases")
    if len(workdirs) > 1:
        together = Predictor.restore(workdirs, options)
        prepared = scans(together.config, splits, root, prepared_in)
        digests = prepared.digests()
        for workdir in workdirs:
            run_folder.check_scans(digests, workdir, finished=True)
        summary = {"runs": list(map(str, workdirs))}
        summary |= predictor.prediction_options(together.config)
        return summary | summaries.score(together, prepared)
    (workdir,), method = workdirs, predictor.load_run(workdirs[0], options)
    own = predictor.prediction_options(method.config) == predictor.prediction_options(saved)
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        writes = own and checkpoints.latest == saved.total_steps
        if writes and not run_folder.writable(workdir):
            writes = False
            say(f"{workdir} is read-only; its summary, report and pictures stay as they are")
        with run_folder.locked(workdir) if writes else contextlib.nullcontext():
            prepared = scans(method.config, splits, root, prepared_in)
            run_folder.check_scans(prepared.digests(), workdir, finished=True)
            summary, best = best_and_last(method, prepared, checkpoints, devices.local_mesh())
            if writes:
                write(summary, best, prepared, workdir)
    return summary


def scans(config: ConfigDict, splits: Splits, root: str = "", prepared_in: str = "") -> Prepared:
    """The prepared scans of a run; `root` says where its scans are now, if elsewhere, and
    `prepared_in` where the prepared ones are. In both, members of a collection have folders by
    their names."""
    config = ConfigDict(config.to_dict())
    for name, data in tasks.members(config.data).items():
        data.root = str(pathlib.Path(root, name)) if root else data.root
        data.cache = str(pathlib.Path(prepared_in, name)) if prepared_in else data.cache
    return cache.prepare(config, splits)


def best_and_last(
    method: Method, prepared: Prepared, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[dict[str, Any], Predictor]:
    """What summary.json holds: scores of the best checkpoint and, as 'last', of the last one on
    validation and test volumes; and the best, as it predicts."""
    predict_with = predictor.make_predictor(method)

    def scored(state):
        found = predict_with(state)
        return found, {"step": int(state.step)} | summaries.score(found, prepared)

    state = checkpoints.restore_best(abstract_state(method, mesh))
    found, best = scored(state)
    last = best
    if checkpoints.latest != best["step"]:
        _, last = scored(checkpoints.restore_latest(state))
    return {**predictor.prediction_options(method.config), **best, "last": last}, found


def write(
    summary: dict[str, Any], best: Predictor, prepared: Prepared, workdir: pathlib.Path
) -> None:
    """Writes summary.json, of nnU-Net's folders theirs, too, the pictures and, last, the report."""
    data = best.config.data
    organs, results = tasks.organs(data), summary[summaries.final_split(summary)]["cases"]
    names = ["summary.json", "curves.png", "overlays.png", "report.html"]
    write_text(workdir / "summary.json", to_json(summary, indent=1) + "\n")
    if data.name == "nnunet":
        names.insert(1, "nnunet_summary.json")
        text = to_json(nnunet_summary.of(results, data), indent=1)
        write_text(workdir / "nnunet_summary.json", text + "\n")
    ranked = summaries.ranked(results)
    worst_middle_best = [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})]
    shown = plots.show(best, prepared, worst_middle_best)
    plots.save(plots.overlays(shown, organs), workdir / "overlays.png", dpi=110)
    curves = plots.curves(read_lines(workdir / "metrics.jsonl"), tasks.scored(data))
    if curves:  # else metrics.jsonl was not kept
        plots.save(curves, workdir / "curves.png", dpi=120)
    report.write(workdir, best.config, summary, shown, curves)
    for name in names:
        say(str(workdir / name))


def tell(summary: dict[str, Any], *splits: str) -> None:
    """Prints the tables of those `splits` that were scored, by both scorings."""
    runs, step = summary.get("runs"), summary.get("step")
    by = f"{len(runs)} runs" if runs else f"best validation checkpoint (step {step})"
    for split in splits:
        for name in (f"{split}_literature", split):
            if name in summary:
                say(f"\n{summaries.SPLITS[name]}, {by}, {len(summary[name]['cases'])} cases")
                say(summaries.table(summary[name]))


def define_flags() -> Callable[[], dict[str, Any]]:
    """Flags that say how runs predict. Returns what reads those that were given."""
    default = "; default: the first run's"
    for name, what in {
        "inference": "which heads decide",
        "predict_with": "of a method with a teacher: student or teacher",
        "combine": "how several predictions become one",
        "upsample": "probabilities or labels to the scan's grid",
    }.items():
        flags.DEFINE_enum(name, None, predictor.CHOICES[name], what + default)
    flags.DEFINE_integer("window", None, "pixels a side of overlapping windows; 0: none" + default)
    flags.DEFINE_boolean(
        "largest_component", None, "keep only the largest piece of an organ" + default
    )

    def given():
        values = {name: flags.FLAGS[name].value for name in run_folder.PREDICTION}
        return {name: value for name, value in values.items() if value is not None}

    return given


if __name__ == "__main__":
    _WORKDIRS = flags.DEFINE_multi_string("workdir", None, "folder of a trained run; repeat it")
    _options = define_flags()
    _ROOT = flags.DEFINE_string("root", "", "folder of the data set; default: the first run's")
    _CACHE = flags.DEFINE_string("cache", "", "prepared data; default: the first run's")
    _OUTPUT = flags.DEFINE_string("output", None, "JSON file for all scores")
    flags.mark_flag_as_required("workdir")

    def _main(_):
        output = output_file(_OUTPUT.value)
        workdirs = [folder(name) for name in _WORKDIRS.value]
        summary = evaluate(workdirs, _options(), _ROOT.value, _CACHE.value)
        tell(summary, "val", "test")
        if output:
            write_text(output, to_json(summary, indent=1) + "\n")

    cli(_main)
