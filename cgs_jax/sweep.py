"""Trains a list of configurations over several seeds, and compares them.

python -m cgs_jax.sweep --config configs/acdc.py --sweep configs/sweeps/ablation.py \
    --workdir runs/ablation --seeds 3 [--at_once 2] [--shard 1/4] --config.data.root=FOLDER

The same command goes on with what is not finished. Each run is a `cgs_jax.main` of its own, in
WORKDIR/ROW/seedN; its output is in log.txt there.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import pandas as pd
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from cgs_jax.analysis import tables
from cgs_jax.runtime import processes, run_folder, threads
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import is_remote, read_lines, to_json, write_text
from cgs_jax.runtime.logs import time_spent
from cgs_jax.scoring import summaries
from cgs_jax.scoring.metrics import HEADINGS
from cgs_jax.training import loop
from cgs_jax.training.resolve import resolve

METRICS = ("dice", "jaccard", "hd95", "asd")
SPLITS = {
    "test": "test, best checkpoint on validation",
    "test_literature": "test, the literature's scoring, best checkpoint on validation",
    "last_test": "test, last checkpoint",
    "last_test_literature": "test, the literature's scoring, last checkpoint",
    "val": "validation, best checkpoint",
    "last_val": "validation, last checkpoint",
}


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    workdir: pathlib.Path
    config: ConfigDict
    command: list[str]

    def finished(self) -> bool:
        """Whether it has been trained and, if it is to be, tested."""
        if not all((self.workdir / name).exists() for name in loop.RESULTS):
            return False
        tests = self.config.test and run_folder.load(self.workdir)[1].test
        try:
            return not tests or "test" in summaries.read_summary(self.workdir)
        except UserError:  # damaged; the run writes it anew
            return False

    def step(self) -> int:
        """How far it is."""
        lines = read_lines(self.workdir / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0


def plan(
    config_file: str,
    overrides: dict[str, Any],
    sweep_file: str,
    workdir: pathlib.Path,
    seeds: int,
    wanted: Sequence[str] = (),
) -> tuple[list[str], list[Run]]:
    """Names of all rows, and the runs of the wanted and of the begun ones, a seed after the other.

    Args:
      config_file: as given to --config, 'configs/acdc.py:labelled=7'.
      overrides: fields from the command line, which knows those of its method and model; these
        hold for the rows that have them, too.
      sweep_file: defines get_sweep(config) -> {row: (arguments of the config file, fields)}; the
        fields come last, and a line says where one is not what `overrides` has. In place of the
        fields may stand a function that makes them of the row's own config.
      wanted: rows to train; none: all. Others are checked if WORKDIR has runs of them, for they
        share its table.

    Raises:
      UserError: a file, one of these rows or an option is wrong; or WORKDIR has runs that were
        trained otherwise.
    """
    path, _, arguments = config_file.partition(":")
    default, *_ = _config(path, arguments, overrides, {}, "the command line")
    rows, runs = _rows(sweep_file, default), []
    once = functools.cache(say)  # most runs tell the same
    wrong = set(wanted) - set(rows)
    if wrong:
        raise UserError(f"--rows {', '.join(sorted(wrong))}: there are {', '.join(rows)}")
    begun = {row for row in rows if (workdir / row).exists()}
    chosen = {row: rows[row] for row in rows if row in begun.union(wanted or rows)}
    for seed in range(default.seed, default.seed + seeds):
        for row, (more, fields) in chosen.items():
            together = ",".join(filter(None, (arguments, more)))
            config, plain, fields = _config(path, together, overrides, fields, row)
            config.seed = seed
            for name, value in fields.items():
                if value != overrides.get(name, value):
                    once(f"row {row}: {name} is {value}, not {overrides[name]}")
            run = workdir / row / f"seed{seed}"
            command = [sys.executable, "-m", "cgs_jax.main", "--workdir", str(run), "--config"]
            command += [f"{path}:{together}" if together else path]
            command += [
                f"--config.{name}={value}"
                for name, value in run_folder.flatten(config).items()
                if value != plain[name]
            ]
            saved = run_folder.load(run)[0] if (run / "config.json").exists() else None
            with contextlib.redirect_stdout(io.StringIO()) as told:
                config = resolve(config, saved)
            for text in told.getvalue().splitlines():
                once(text)
            runs.append(Run(f"{row} seed {seed}", run, config, command))
            if saved:
                run_folder.check_same(saved, config, run, runs[-1].finished())
    return list(rows), runs


def _rows(path, config):
    try:
        rows = dict(_module(path).get_sweep(config))
        for row, (arguments, fields) in rows.items():
            if not re.fullmatch(r"\w[\w.+-]*", row):
                raise ValueError(f"{row!r} can not be the name of a folder")
            if not isinstance(arguments, str) or not (isinstance(fields, dict) or callable(fields)):
                raise ValueError(f"{row!r} is not (arguments, fields)")
    except UserError:
        raise
    except Exception as error:  # it is the user's code
        raise UserError(f"--sweep {path}: {type(error).__name__}: {error}") from error
    if not rows:
        raise UserError(f"--sweep {path} has no rows")
    return rows


def _module(path):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if not spec or not pathlib.Path(path).is_file():
        raise UserError(f"no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    # Not by the loader: its bytecode is that of before where a file changes within a second.
    exec(compile(pathlib.Path(path).read_bytes(), path, "exec"), module.__dict__)
    return module


def _config(path, arguments, overrides, fields, row):
    """The config of a row, all its fields as the file alone sets them, and the row's own fields."""
    try:
        config = _module(path).get_config(arguments or None)
    except ValueError as error:
        raise UserError(f"{row}: {error}") from None
    plain = run_folder.flatten(config)
    shared = {
        k: v
        for k, v in overrides.items()
        if k in plain or not k.startswith(("method.", "cgs.", "model.", "data.members."))
    }
    _update(config, shared, plain, row)
    if callable(fields):
        try:
            fields = dict(fields(config.copy_and_resolve_references()))
        except Exception as error:  # it is the user's code
            raise UserError(f"{row}: {type(error).__name__}: {error}") from error
    _update(config, fields, plain, row)
    return config, plain, fields


def _update(config, fields, known, row):
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{row}: there is no config field {name}")
        try:
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            raise UserError(f"{row}: {name}={value!r}: {error}") from None


def train_all(runs: list[Run], at_once: int = 1) -> None:
    """Trains what is not finished, `at_once` runs side by side, each on its share of the cores.

    Raises:
      UserError: runs failed; the others have been trained.
    """
    todo, failed = [run for run in runs if not run.finished()], []
    total = sum(run.config.total_steps for run in runs)
    done = total - sum(run.config.total_steps for run in todo)
    count = max(min(at_once, len(runs)), 1)
    free, training = _shares(count), []
    numbered = list(enumerate(todo, len(runs) - len(todo) + 1))
    with tqdm(total=total, initial=done, unit="step", disable=None) as bar:
        try:
            while numbered or training:
                while numbered and free:
                    i, run = numbered.pop(0)
                    try:
                        name = f"{i}/{len(runs)} {run.name}"
                        training.append(_Training(name, run, free[-1], count))
                        free.pop()
                    except OSError as error:
                        failed.append(f"{run.name} ({error.strerror}: {error.filename})")
                bar.set_description(", ".join(each.name for each in training))
                time.sleep(1)
                bar.n = done + sum(each.run.step() for each in training)
                bar.refresh()
                for each in list(training):
                    if each.process.poll() is None:
                        continue
                    training.remove(each)
                    free.append(each.cores)
                    error = each.error()
                    say(f"{each.name}  {error or _score(each.run)}")
                    if error:
                        failed.append(f"{each.run.name} ({error})")
                    else:
                        done += each.run.config.total_steps
            bar.n = done
        finally:  # interrupted: they save their state first
            for each in training:
                each.process.terminate()
            for each in training:
                each.process.wait()
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: " + "; ".join(failed))


def _shares(count):
    """Cores of this process in `count` equal shares, empty where there are fewer cores: a run that
    goes on has as many as before, on which its rounding depends."""
    cores = threads.cores()
    size = len(cores) // count
    return [set(cores[i * size : (i + 1) * size]) for i in range(count)]


def _score(run):
    """Its Dice and the time that it took, as words."""
    minutes, _ = time_spent(run.workdir)
    summary = summaries.read_summary(run.workdir)
    split = summaries.final_split(summary)
    dice = 100 * tables.number(summary[split]["mean"]["dice"])
    return f"{summaries.SPLITS[split]} Dice {dice:.2f}  {minutes:.1f} min"


class _Training:
    """A process that trains a run, on its cores, beside others."""

    def __init__(self, name, run, cores, count):
        self.name, self.run, self.cores = name, run, cores
        run.workdir.mkdir(parents=True, exist_ok=True)
        self._log = run.workdir / "log.txt"
        self._begun = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                run.command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {processes.HERE: str(count)},
            )
        if cores and hasattr(os, "sched_setaffinity"):  # before it has threads
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, cores)

    def error(self):
        """What went wrong with the ended process, '' if nothing."""
        code = self.process.returncode
        if code == 0 and self.run.finished():
            return ""
        if code < 0:
            return f"killed by signal {-code}; see {self._log}"
        text = self._log.read_bytes()[self._begun :].decode(errors="replace")
        lines = text.strip().splitlines()
        # A run that another process trains has that one's lines after its own.
        lines = [line for line in lines if line.startswith("error: ")] or lines
        return f"{lines[-1] if lines else 'no output'}; see {self._log}"


def write_tables(workdir: pathlib.Path) -> str:
    """Writes table.csv, .md and .tex of the finished runs, for each member of a collection; returns
    of each member the first that has most rows."""
    *_, cases, first = tables.load(workdir)
    scored, shown = {}, {}
    for member, some in cases.groupby("member", sort=False):
        for which, split in SPLITS.items():
            for metric in METRICS if which in set(some.split) else ():
                title = ", ".join(filter(None, (member, HEADINGS[metric], split)))
                scored[title] = tables.table(some, first, metric, which)
                if len(scored[title]) > len(scored.get(shown.get(member), ())):
                    shown[member] = title
    texts = {title: tables.as_text(table, first) for title, table in scored.items()}
    markdown = {title: f"{title}\n\n{tables.markdown(text)}" for title, text in texts.items()}
    latex = [f"% {title}\n{tables.latex(text)}" for title, text in texts.items()]
    write_text(workdir / "table.csv", pd.concat(scored, names=["score", "row"]).to_csv())
    write_text(workdir / "table.md", "\n".join(markdown.values()))
    write_text(workdir / "table.tex", "\n".join(latex))
    return "\n".join(markdown[title] for title in shown.values())


def shard(text: str, runs: list[Run]) -> list[Run]:
    """Every n-th run from the i-th on, of 'i/n'."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: write 1/4 to 4/4 for four machines")
    return runs[int(match[1]) - 1 :: int(match[2])]


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _SWEEP = flags.DEFINE_string("sweep", None, "file with the rows, such as configs/sweeps/*.py")
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the runs")
    _SEEDS = flags.DEFINE_integer("seeds", 3, "seeds of each row", lower_bound=1)
    _ROWS = flags.DEFINE_list("rows", [], "train these only; the table has all that are finished")
    _AT_ONCE = flags.DEFINE_integer(
        "at_once", 1, "runs side by side, each on its share of the cores", lower_bound=1
    )
    _SHARD = flags.DEFINE_string("shard", "1/1", "i/n: the i-th of n machines takes its share")
    flags.mark_flags_as_required(["config", "sweep", "workdir"])

    def _main(_):
        jax.config.update("jax_platforms", "cpu")  # the accelerators are for the runs
        if _AT_ONCE.value > 1:  # else the first takes the memory of the GPU
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        flag, workdir = flags.FLAGS["config"], pathlib.Path(_WORKDIR.value)
        if is_remote(_WORKDIR.value):
            raise UserError("--workdir of a sweep is a local or mounted folder")
        name, overrides = config_flags.get_config_filename(flag), flag.override_values
        rows, runs = plan(name, overrides, _SWEEP.value, workdir, _SEEDS.value, _ROWS.value)
        wanted = _ROWS.value or rows
        mine = shard(_SHARD.value, [run for run in runs if run.workdir.parent.name in wanted])
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / "sweep.json", to_json({"rows": rows}) + "\n")
        try:
            train_all(mine, _AT_ONCE.value)
        finally:
            finished = sum(run.finished() for run in runs)
            if finished:
                say(f"\n{finished} of {len(runs)} runs: {write_tables(workdir)}")
                say("\n".join(str(workdir / f"table.{kind}") for kind in ("md", "csv", "tex")))

    cli(_main)
