"""A sweep as a user starts it, and the notebook that reads it."""

import ast
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from cgs_jax import sweep
from cgs_jax.analysis import tables
from cgs_jax.runtime import console, run_folder, threads
from cgs_jax.runtime.errors import UserError
from runs import REPOSITORY, TINY, command, start

ROWS = ("supervised", "cgs")  # dealt in turn to two shards
STEPS = {"config.total_steps": 10, "config.eval_every": 5}


def line(scans, workdir, *options):
    fields = [f"--{name}={value}" for name, value in STEPS.items()]
    options = ["--sweep", "configs/sweeps/ablation.py", "--rows", ",".join(ROWS), *fields, *options]
    plain = command(scans, workdir)
    plain[plain.index("cgs_jax.main")] = "cgs_jax.sweep"
    return [*plain, *options]


@pytest.fixture(scope="module")
def swept(scans, tmp_path_factory):
    """Two rows of one seed, by two shards; and what they printed."""
    workdir = tmp_path_factory.mktemp("sweep")
    options = ["--seeds", "1", "--config.seed=3", "--shard"]
    printed = [start(line(scans, workdir, *options, f"{i}/2")) for i in (1, 2)]
    return workdir, printed


def test_sweep_shards_and_table(swept, scans):
    workdir, printed = swept
    assert [done.returncode for done in printed] == [0, 0], [done.stderr for done in printed]
    for row, done in zip(ROWS, printed, strict=True):
        assert f"1/1 {row} seed 3  test Dice" in done.stdout
    assert "| supervised |" in printed[0].stdout
    runs, curves, cases, first = tables.load(workdir)
    assert first == "supervised"
    assert list(zip(runs.row, runs.seed, strict=True)) == [(row, 3) for row in ROWS]
    assert set(curves[curves.row == "cgs"].step) == {5, 10}
    assert "pseudo/ihed/precision" in curves
    assert set(cases.case[cases.split == "test"]) == {"Patient_06", "Patient_07"}
    table = pd.read_csv(workdir / "table.csv", index_col=[0, 1])
    assert len(table) == 4 * 6 * 2  # metrics, splits and checkpoints, rows
    table = table.loc["Dice %, test, best checkpoint on validation"]
    by_case = cases[(cases.split == "test") & (cases.row == "cgs")].groupby("organ").dice.mean()
    for organ, value in by_case.items():
        assert table.loc["cgs", organ] == pytest.approx(value)
    assert (workdir / "table.md").read_text().split("Jaccard")[0].strip() in printed[1].stdout
    assert "against supervised" in (workdir / "table.tex").read_text()
    config = run_folder.load(workdir / "supervised" / "seed3")[0]
    assert (config.batch.labelled, config.batch.unlabelled, config.seed) == (8, 0, 3)


def test_sweep_goes_on(swept, scans, tmp_path):
    """Finished runs stay; one that lacks its end is finished; a failure is told at the end."""
    workdir = tmp_path / "sweep"
    shutil.copytree(swept[0], workdir)
    (workdir / "cgs" / "seed3" / "report.html").unlink()
    (workdir / "fixmatch" / "seed3").mkdir(parents=True)
    (workdir / "fixmatch" / "seed3" / "checkpoints").write_text("in the way")
    kept = (workdir / "supervised" / "seed3" / "summary.json").stat().st_mtime_ns
    options = workdir / "supervised" / "seed3" / "config.json"  # after main --config.combine=vote
    options.write_text(options.read_text().replace('"average"', '"vote"'))
    assert run_folder.load(options.parent)[0].combine == "vote"
    rows = ["--rows", "supervised,fixmatch,cgs", "--seeds", "1", "--config.seed=3"]
    done = start(line(scans, workdir, *rows, "--at_once", "2"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: 1 of 3 runs failed: fixmatch seed 3 (error: ")
    assert done.stderr.count("\n") == 1
    assert str(workdir / "fixmatch" / "seed3" / "log.txt") in done.stderr
    assert "3/3 cgs seed 3  test Dice" in done.stdout
    assert (workdir / "supervised" / "seed3" / "summary.json").stat().st_mtime_ns == kept
    (run,) = runs_of(swept, workdir / "supervised", "seed3")
    assert run.finished()
    (workdir / "supervised" / "seed3" / "summary.json").write_text('{"test": ')
    assert not run.finished()  # it is damaged
    (workdir / "supervised" / "seed3" / "summary.json").unlink()
    assert tables.load(workdir).first == "cgs"  # the first that has finished


RUN = """
import os, pathlib, shutil, signal, sys, time
begun = time.time()
finished, run = map(pathlib.Path, sys.argv[1:])
seconds = 60 if "long" in run.name else 2
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
try:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    (run / "ready").touch()
    time.sleep(seconds)
    shutil.copytree(finished, run, dirs_exist_ok=True)
finally:
    (run / "seen.txt").write_text(repr((begun, time.time(), cores)))
"""


def runs_of(swept, workdir, *names):
    """Runs that sleep, and then have the results of one that was trained."""
    finished = swept[0] / "supervised" / "seed3"
    config = run_folder.load(finished)[0]
    return [
        sweep.Run(name, run, config, [sys.executable, "-c", RUN, str(finished), str(run)])
        for name, run in ((name, workdir / name) for name in names)
    ]


def test_runs_side_by_side(swept, tmp_path, capsys):
    """One that can not even start does not keep the others back."""
    before, runs = threads.cores(), runs_of(swept, tmp_path, "a", "b", "c", "d")
    failing = runs_of(swept, tmp_path, "in_the_way")
    failing[0].workdir.write_text("")
    with pytest.raises(UserError, match=r"1 of 5 runs failed: in_the_way \(File exists: .*way\)"):
        sweep.train_all([runs[0], *failing, *runs[1:]], at_once=2)
    seen = [ast.literal_eval((run.workdir / "seen.txt").read_text()) for run in runs]
    together = [sum(a <= b < end for a, end, _ in seen) for b, _, _ in seen]
    assert max(together) == 2
    assert sorted(line[:5] for line in capsys.readouterr().out.splitlines()) == [
        "1/5 a", "3/5 b", "4/5 c", "5/5 d",
    ]  # fmt: skip
    if hasattr(os, "sched_getaffinity") and len(before) > 1:  # each has its half
        assert len(seen[0][2]) == len(seen[1][2]) == len(before) // 2
        assert not set(seen[0][2]) & set(seen[1][2])
    assert threads.cores() == before


@pytest.mark.parametrize(
    ("cores", "count", "expected"),
    [
        ([2, 3, 5, 7], 1, [{2, 3, 5, 7}]),
        ([2, 3, 5, 7], 2, [{2, 3}, {5, 7}]),
        ([2, 3, 5], 2, [{2}, {3}]),
        ([2, 3], 3, [set()] * 3),
    ],
)
def test_shares_of_cores(monkeypatch, cores, count, expected):
    monkeypatch.setattr(threads, "cores", lambda: cores)
    assert sweep._shares(count) == expected


@pytest.fixture
def default_interrupt():
    """A shell that starts tests in the background makes them ignore Ctrl-C; this undoes it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interruption_ends_all_runs(swept, tmp_path, default_interrupt):
    runs = runs_of(swept, tmp_path, "long_1", "long_2", "long_3")

    def interrupt():
        deadline = time.time() + 60
        while not all((run.workdir / "ready").exists() for run in runs[:2]):
            if time.time() > deadline:
                return
            time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sweep.train_all(runs, at_once=2)
    assert [(run.workdir / "seen.txt").exists() for run in runs] == [True, True, False]
    assert not any(run.finished() for run in runs)


def test_bad_sweeps(scans, tmp_path, capsys):
    overrides = TINY | {"data.root": str(scans / "scans")}

    def plan(text, overrides=overrides, wanted=()):
        path, runs = tmp_path / "sweep.py", tmp_path / "runs"
        path.write_text(text)
        return sweep.plan("configs/segthor.py", overrides, str(path), runs, 1, wanted)

    rows = "def get_sweep(config):\n    return {'a': ('method=cgs', %s)}"
    for text, message in (
        ("", "AttributeError: module 'sweep' has no attribute 'get_sweep'"),
        ("def get_sweep(config) return", "SyntaxError"),
        ("def get_sweep(config): return {}", "has no rows"),
        ("def get_sweep(config): return {'a': 'method=cgs'}", "sweep.py: ValueError"),
        ("def get_sweep(config): return {'a': ('method=cgs', None)}", "'a' is not"),
        (rows.replace("'a'", "'..'") % {}, "can not be the name of a folder"),
        (rows.replace("'a'", "'a/b'") % {}, "'a/b' can not be the name of a folder"),
        (rows % {"method.taw": 1}, "a: there is no config field method.taw"),
        (rows % {"data.size": "big"}, "a: data.size='big'"),
        (rows % "lambda own: own.method.taw", "a: AttributeError: .*taw"),
        (rows % "lambda own: None", "a: TypeError"),
        (rows.replace("=cgs", ":cgs") % {}, "a: config argument 'method:cgs': write"),
        (rows.replace("=cgs", "=cgx") % {}, "unknown method 'cgx'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(text)
    with pytest.raises(UserError, match="no Python file .*none.py"):
        sweep.plan("configs/segthor.py", {}, str(tmp_path / "none.py"), tmp_path, 1)
    assert len(sweep.plan("configs/acdc.py", {}, "configs/sweeps/recipe.py", tmp_path, 1)[1]) > 9
    capsys.readouterr()
    given = {"method.tau": 0.8, "method.lambda_max": 0.1}
    names, (run,) = plan(rows % {"method.lambda_max": 1.5}, overrides | given)
    assert capsys.readouterr().out == "row a: method.lambda_max is 1.5, not 0.1\n"
    assert (run.config.method.tau, run.config.method.lambda_max) == (0.8, 1.5)
    assert "--config.method.lambda_max=1.5" in run.command
    assert "configs/segthor.py:method=cgs" in run.command
    third = rows % "lambda own: {'method.lambda_max': own.method.lambda_max / 2}"
    _, (run,) = plan(third, overrides | given)  # of the row's own, not of the command line's method
    assert run.config.method.lambda_max == 0.05
    two = "def get_sweep(config):\n    return {'a': ('', {}), 'b': ('method=cgx', {})}"
    names, (run,) = plan(two, wanted=["a"])  # what else is wrong does not matter
    assert (names, run.name) == (["a", "b"], "a seed 0")
    with pytest.raises(UserError, match="--rows c: there are a, b"):
        plan(two, wanted=["c"])
    (tmp_path / "runs" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="unknown method 'cgx'"):  # unless the table has it
        plan(two, wanted=["a"])
    with pytest.raises(UserError, match="--shard 0/2: write 1/4 to 4/4"):
        sweep.shard("0/2", [run])


def test_seeds_differ(tmp_path):
    """From that of the config on."""
    given = {"seed": 3, "data.root": "none"}
    _, found = sweep.plan("configs/acdc.py", given, "configs/sweeps/three.py", tmp_path, 2, ["cgs"])
    assert [run.config.seed for run in found] == [3, 4]
    assert [run.workdir for run in found] == [tmp_path / "cgs" / f"seed{i}" for i in (3, 4)]
    for run in found:
        assert f"--config.seed={run.config.seed}" in run.command


def test_what_all_runs_tell_is_told_once(monkeypatch, tmp_path, capsys):
    def resolve(config, saved):
        console.say("grid: size 64")
        return config

    monkeypatch.setattr(sweep, "resolve", resolve)
    sweep.plan("configs/acdc.py", {}, "configs/sweeps/three.py", tmp_path, 2)
    assert capsys.readouterr().out == "grid: size 64\n"


def test_weights_are_shares_of_the_data_sets_own(scans, tmp_path):
    """configs/acdc.py has 1 for CGS on windows; the method of the command line does not matter."""
    line, sweeps = "configs/acdc.py:method=supervised,recipe=patches", "configs/sweeps/"
    for file, row, expected in (
        ("ablation", "cgs", 1.0),
        ("ablation", "cgs_third", 1 / 3),
        ("ablation", "cgs_without_specialists", 3.0),
        ("ablation", "fixmatch_teacher", 1.0),
        ("weights", "cgs_triple_ramp_1", 3.0),
        ("weights", "urpc_triple_ramp_1", 3 * 0.2),
    ):
        _, (run,) = sweep.plan(line, {}, f"{sweeps}{file}.py", tmp_path, 1, [row])
        assert run.config.method.lambda_max == pytest.approx(expected), row
    for line in ("configs/acdc.py", "configs/acdc.py:method=supervised"):
        rows = ["supervised", "supervised_fewer_slices"]
        _, runs = sweep.plan(line, {}, f"{sweeps}ablation.py", tmp_path, 1, rows)
        assert [run.config.batch.labelled for run in runs] == [24, 12]


@pytest.mark.parametrize("name", ["ablation", "plugin", "weights", "partly"])
def test_rows_of_the_shipped_sweeps_are_comparable(name, tmp_path):
    """Same data, steps, slices (but for a control) and optimiser (but for VerSemi) for all."""
    _, runs = sweep.plan("configs/acdc.py", {}, f"configs/sweeps/{name}.py", tmp_path, 1)
    for run in runs:
        assert run.config.total_steps == 30_000
        fewer = run.name == "supervised_fewer_slices seed 0"
        assert sum(run.config.batch.values()) == (12 if fewer else 24)
        of_its_own = {"optimizer"} if run.name.startswith("versemi") else set()
        for part in {"data", "optimizer", "augment"} - of_its_own:
            shared, first = (config[part].to_dict() for config in (run.config, runs[0].config))
            if name == "partly" and part == "data":  # what it compares
                assert shared.pop("partly_labelled") == run.name.split()[0].endswith("partly")
                first.pop("partly_labelled")
            assert shared == first


def test_notebook_runs(swept, tmp_path, monkeypatch):
    """From top to bottom, with all its pictures."""
    monkeypatch.setenv("CGS_SWEEP", str(swept[0]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path = REPOSITORY / "notebooks" / "ablation.ipynb"
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    folder = {"metadata": {"path": str(pathlib.Path(path).parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 6
    assert not [out for out in outputs if out.output_type == "error"]
