"""Scores a trained run by other heads or options of prediction, or several runs together.

python -m cgs_jax.evaluate --workdir RUN [--workdir RUN ...] [--inference both] [--combine vote] \
    [--upsample linear] [--largest_component] [--root FOLDER] [--cache FOLDER] [--output FILE.json]
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from cgs_jax.data import cache
from cgs_jax.data.case_lists import Splits
from cgs_jax.inference import predictor
from cgs_jax.methods.base import Method
from cgs_jax.runtime import devices, run_folder
from cgs_jax.runtime.cli import cli, output_file
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import folder, to_json, write_text
from cgs_jax.runtime.logs import say
from cgs_jax.scoring import summaries
from cgs_jax.training import loop, train_step
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.train_state import TrainState


def restore(
    workdirs: Sequence[pathlib.Path], options: Mapping[str, Any]
) -> tuple[ConfigDict, predictor.Predict]:
    """The best checkpoints of `workdirs`, predicting together by the options of the first, which
    `options` such as {'combine': 'vote'} replace: the first's config, and `Predict`.

    Raises:
      UserError: no run, no validated checkpoint, or runs on different data.
    """
    methods, states = [], []
    for workdir in workdirs:
        method, state = restore_run(workdir, options)
        options = predictor.prediction_options(method.config)
        methods.append(method)
        states.append(state)
        for field in cache.OPTIONS:
            if method.config.data[field] != methods[0].config.data[field]:
                raise UserError(f"{workdir} and {workdirs[0]} differ in data.{field}")
    return methods[0].config, predictor.make_predict(*methods)(*states)


def restore_run(
    workdir: pathlib.Path, options: Mapping[str, Any] | None = None
) -> tuple[Method, TrainState]:
    """One run and its best checkpoint, on the devices of this process."""
    config, _ = run_folder.load(workdir)
    config.lock().update(options or {})
    method = train_step.make_method(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    state = loop.restore_best(config, method, checkpoints, workdir, devices.local_mesh())
    checkpoints.close()
    return method, state


def scans(config: ConfigDict, splits: Splits, root: str = "", cache: str = "") -> cache.Prepared:
    """The prepared scans of a run; `root` and `cache` say where they are now, if elsewhere."""
    config.data.root, config.data.cache = root or config.data.root, cache or config.data.cache
    return cache.prepare(config, splits)


def define_flags() -> Callable[[], dict[str, Any]]:
    """Flags that say how runs predict. Returns what reads those that were given."""
    default = "; default: the first run's"
    for name, what in {
        "inference": "which heads decide",
        "combine": "how several predictions become one",
        "upsample": "probabilities or labels to the scan's grid",
    }.items():
        flags.DEFINE_enum(name, None, train_step.CHOICES[name], what + default)
    flags.DEFINE_boolean(
        "largest_component", None, "keep only the largest piece of an organ" + default
    )

    def given():
        values = {name: flags.FLAGS[name].value for name in run_folder.PREDICTION}
        return {name: value for name, value in values.items() if value is not None}

    return given


def score(
    workdirs: Sequence[pathlib.Path], options: Mapping[str, Any], root: str = "", cache: str = ""
) -> dict[str, Any]:
    """Summaries of validation and, if the first run scores them, test cases, as in summary.json.

    Raises:
      UserError: as `restore`, or the runs have been trained or validated on other cases.
    """
    splits = [run_folder.load(workdir)[1] for workdir in workdirs]
    for workdir, other in zip(workdirs, splits, strict=True):
        if (set(other.val), set(other.test)) != (set(splits[0].val), set(splits[0].test)):
            raise UserError(f"{workdir} and {workdirs[0]} have other validation or test cases")
    config, predict = restore(workdirs, options)
    prepared = scans(config, splits[0], root, cache)
    summary = {"runs": list(map(str, workdirs)), **predictor.prediction_options(config)}
    return summary | summaries.score(predict, prepared, config)


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
        summary = score(workdirs, _options(), _ROOT.value, _CACHE.value)
        for split, name in summaries.SPLITS.items():
            if split in summary:
                say(f"\n{name}, {len(workdirs)} run(s)\n{summaries.table(summary[split])}")
        if output:
            write_text(output, to_json(summary, indent=1) + "\n")

    cli(_main)
