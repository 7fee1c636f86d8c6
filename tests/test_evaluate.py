"""Finished runs scored again, with other options and together."""

import contextlib
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import pytest

from cgs_jax import compare, evaluate, main, sweep
from cgs_jax.analysis import tables
from cgs_jax.runtime import devices, run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import to_json
from cgs_jax.training import train_step
from cgs_jax.training.checkpoints import Checkpoints
from runs import TINY, before_the_end, command, config_of, start


def test_evaluation_reproduces_the_scores(trained, tmp_path):
    """And what is written of them; of a run that is not finished, nothing is."""
    workdir, _ = trained
    before = {name: (workdir / name).read_bytes() for name in ("summary.json", "overlays.png")}
    facts = (workdir / "report.html").read_text()
    for name in (*before, "report.html"):
        (workdir / name).unlink()
    summary = evaluate.evaluate([workdir])
    assert {name: (workdir / name).read_bytes() for name in before} == before
    assert to_json(summary, indent=1) + "\n" == before["summary.json"].decode()
    assert re.sub('data:image[^"]*', "", (workdir / "report.html").read_text()) == re.sub(
        'data:image[^"]*', "", facts
    )
    begun = before_the_end(trained, tmp_path / "begun")
    assert evaluate.evaluate([begun])["last"]["step"] == 80
    assert not (begun / "summary.json").exists()


def test_best_and_last_checkpoint_are_told_apart(trained, scans, tmp_path):
    """One more checkpoint, of a network that finds nothing, is the last and not the best."""
    workdir, config = shutil.copytree(trained[0], tmp_path / "run"), config_of(scans)
    like = train_step.abstract_state(train_step.make_method(config), devices.make_mesh(config))
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        best = checkpoints.best
        state = checkpoints.restore_latest(like)
        teacher = jax.tree.map(jnp.zeros_like, state.extra)
        checkpoints.save(state.replace(step=state.step + 1, extra=teacher), -0.5)
    before = json.loads((workdir / "summary.json").read_text())
    after = evaluate.evaluate([workdir])
    assert (after["step"], after["last"]["step"]) == (best, TINY["total_steps"] + 1)
    assert to_json(after["test"]) == to_json(before["test"])
    assert after["test"]["mean"]["dice"] > after["last"]["test"]["mean"]["dice"] == 0


def test_a_run_in_a_read_only_folder_is_scored(trained, monkeypatch, capsys):
    """What may be written is asked of the system: tests may run as root, who may write anywhere."""
    workdir, _ = trained
    monkeypatch.setattr(os, "access", lambda path, mode: path != workdir)
    monkeypatch.setattr(evaluate, "write", pytest.fail)
    monkeypatch.setattr(run_folder, "locked", pytest.fail)
    assert evaluate.evaluate([workdir]) == json.loads((workdir / "summary.json").read_text())
    assert f"{workdir} is read-only" in capsys.readouterr().out


def test_specialists_can_predict(trained, scans):
    """Of a finished run the same command may name others who predict."""
    workdir, _ = trained
    before = (workdir / "summary.json").read_bytes()
    asked = evaluate.evaluate([workdir], {"inference": "specialists"})
    assert (workdir / "summary.json").read_bytes() == before
    summary = main.run(config_of(scans, inference="specialists"), workdir)
    assert summary["inference"] == "specialists"
    assert summary["val"]["mean"] == asked["val"]["mean"]
    main.run(config_of(scans), workdir)
    assert (workdir / "summary.json").read_bytes() == before


def test_runs_score_together(trained, scans, tmp_path):
    """A run with itself is the run; other data or cases are an error."""
    workdir, _ = trained
    summary = json.loads((workdir / "summary.json").read_text())
    nearest = {"upsample": "nearest"}
    both = evaluate.evaluate([workdir, workdir], nearest | {"combine": "vote"})
    assert both["test"]["cases"] == evaluate.evaluate([workdir], nearest)["test"]["cases"]
    heads = evaluate.evaluate([workdir], {"inference": "both"})
    assert heads["test"]["cases"] != summary["test"]["cases"]

    def to_collection(text):
        text["data"].update(name="collection", members={"chest": dict(text["data"])})

    for i, (file, change, message) in enumerate(
        (
            ("splits.json", lambda text: text["test"].pop(), "other validation or test cases"),
            ("config.json", lambda text: text["data"].update(normalise=[0, 1]), "data.normalise"),
            ("config.json", to_collection, "were trained on other data sets"),
        )
    ):
        other = tmp_path / str(i)
        shutil.copytree(workdir, other)
        text = json.loads((other / file).read_text())
        change(text)
        (other / file).write_text(json.dumps(text))
        with pytest.raises(UserError, match=message):
            evaluate.evaluate([workdir, other])


def test_test_cases_wait_until_a_recipe_is_chosen(trained, scans, tmp_path, capsys):
    workdir = shutil.copytree(trained[0], tmp_path / "runs" / "cgs")
    tested = json.loads((workdir / "summary.json").read_text())
    summary = main.run(config_of(scans, test=False), workdir)
    assert "test" not in summary
    assert "test" not in summary["last"]
    assert summary["val"] == tested["val"]
    report = (workdir / "report.html").read_text()
    assert '"final": "val"' in report
    assert "Patient_06" not in report.split('"config"')[0]
    compared = compare.compare([workdir, trained[0]])
    assert compared.startswith("validation Dice %")
    splits = {"val", "val_literature", "last_val", "last_val_literature"}
    assert set(tables.load(tmp_path / "runs").cases.split) == splits
    assert sweep.write_tables(tmp_path / "runs").startswith("Dice %, validation, best")
    capsys.readouterr()
    assert "test" not in evaluate.evaluate([workdir])
    assert "test cases are left out, for the run has test=False" in capsys.readouterr().out
    again = main.run(config_of(scans), workdir)
    assert again["test"] == tested["test"]
    assert evaluate.evaluate([workdir])["test"] == tested["test"]


def test_prediction_options_of_the_command_line(trained, tmp_path):
    options = ["--upsample", "nearest", "--largest_component", "--output", str(tmp_path / "s.json")]
    line = command(None, trained[0], *options, program="evaluate")
    done = start(line)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())
    assert (scores["upsample"], scores["largest_component"]) == ("nearest", True)
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert scores["test"]["mean"] != summary["test"]["mean"]
    assert scores["test_literature"] == summary["test_literature"]
    for title in ("validation", "validation, the literature's scoring", "test"):
        assert f"\n{title}, best validation checkpoint (step {summary['step']}), " in done.stdout
