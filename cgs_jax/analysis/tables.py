"""Runs as pandas frames, and the table that compares them.

Used by `cgs_jax.sweep` and `notebooks/ablation.ipynb`. Scores are in %, distances in voxels.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cgs_jax.compare import read_summary
from cgs_jax.data.case_lists import patient
from cgs_jax.runtime import run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import read_lines
from cgs_jax.runtime.logs import spent
from cgs_jax.scoring import summaries
from cgs_jax.scoring.metrics import OVERLAP


class Sweep(NamedTuple):
    """Finished runs of a folder.

    Attributes:
      runs: a line a run: row, seed, workdir, method, steps, best (step), val (Dice), minutes,
        hardware.
      curves: a line a line of metrics.jsonl, with row and seed.
      cases: a line an organ of a case: row, seed, split ('val', 'test', 'val_literature',
        'test_literature' of the best checkpoint, with 'last_' before it of the last), case,
        patient, organ, voxels (true size), dice, jaccard, hd95, asd.
      first: the row that others are held against, finished or not.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    cases: pd.DataFrame
    first: str


def load(folder: pathlib.Path | str) -> Sweep:
    """Reads the finished runs of a sweep, in its order; of any other folder all runs below it.

    Raises:
      UserError: there is no finished run.
    """
    folder = pathlib.Path(folder)
    found = sorted(path.parent for path in folder.rglob("summary.json"))
    name = lambda workdir: str(workdir.relative_to(folder))  # noqa: E731
    rows, order = [name(workdir) for workdir in found], folder / "sweep.json"
    if order.exists():
        name = lambda workdir: str(workdir.parent.relative_to(folder))  # noqa: E731
        rows = json.loads(order.read_text())["rows"]
        found = [workdir for row in rows for workdir in found if name(workdir) == row]
    if not found:
        raise UserError(f"no finished run in {folder}")
    runs, curves, cases = [], [], []
    for workdir in found:
        config, _ = run_folder.load(workdir)
        summary = read_summary(workdir)
        key = {"row": name(workdir), "seed": config.seed}
        minutes, hardware = spent(workdir)
        runs.append(
            key
            | {
                "workdir": workdir,
                "method": run_folder.name_of(config),
                "steps": config.total_steps,
            }
            | {"best": summary["step"], "val": 100 * number(summary["val"]["mean"]["dice"])}
            | {"minutes": minutes, "hardware": hardware}
        )
        curves += [key | line for line in read_lines(workdir / "metrics.jsonl")]
        last = summary.get("last", {})  # older runs have scored the best only
        for split, scored in {**summary, **{f"last_{k}": v for k, v in last.items()}}.items():
            if split.removeprefix("last_") not in summaries.SPLITS:
                continue
            for case, organs in scored["cases"].items():
                who = {"split": split, "case": case, "patient": patient(case, config.data.patient)}
                for organ, scores in organs.items():
                    values = {
                        k: number(v) * (100 if k in OVERLAP else 1) for k, v in scores.items()
                    }
                    cases.append(key | who | {"organ": organ} | values)
    return Sweep(*map(pd.DataFrame, (runs, curves, cases)), rows[0])


def number(value: float | None) -> float:
    """What JSON had to write as null is nan."""
    return float("nan") if value is None else value


def scores(cases: pd.DataFrame, metric: str = "dice", split: str = "test") -> pd.DataFrame:
    """A line a row and seed, a column an organ, and their 'mean'; undefined cases are left out."""
    cases = cases[cases.split == split]
    by_organ = cases.groupby(["row", "seed", "organ"], sort=False)[metric].mean()
    by_organ = by_organ.unstack("organ", sort=False)
    return by_organ.assign(mean=by_organ.mean(axis=1))


def differences(
    cases: pd.DataFrame, first: str, metric: str = "dice", split: str = "test"
) -> pd.DataFrame:
    """By row: how far it is above row `first` in the same organ, case and seed, on average, with a
    95 % bootstrap interval over the patients: columns difference, low, high.

    What either leaves undefined is left out. A patient's cases and organs go together. Seeds are
    averaged: the interval is not about them.
    """
    cases = cases[cases.split == split]
    keys = ["row", "seed", "patient", "case", "organ"]
    values = cases.set_index(keys)[metric].unstack("row", sort=False)
    lines = {}
    for row in values.columns.drop(first) if first in values else ():
        gains = (values[row] - values[first]).dropna().groupby("patient").mean().to_numpy()
        low, high = np.nan, np.nan
        if len(gains) > 1:
            done = stats.bootstrap((gains,), np.mean, method="percentile", rng=0)
            low, high = done.confidence_interval
        mean = gains.mean() if len(gains) else np.nan
        lines[row] = {"difference": mean, "low": low, "high": high}
    return pd.DataFrame.from_dict(lines, "index", columns=["difference", "low", "high"])


def table(
    cases: pd.DataFrame, first: str, metric: str = "dice", split: str = "test"
) -> pd.DataFrame:
    """A line a row: seeds, mean and sd over the seeds by organ and of all, and `differences`."""
    by_seed = scores(cases, metric, split)
    groups = by_seed.groupby("row", sort=False)
    parts = {"seeds": groups.size()}
    for organ in by_seed.columns:
        parts |= {organ: groups[organ].mean(), f"{organ} sd": groups[organ].std(ddof=1)}
    return pd.DataFrame(parts).join(differences(cases, first, metric, split))


def as_text(table: pd.DataFrame, first: str) -> pd.DataFrame:
    """The same as readers want it: '79.1 ± 0.4', '+3.2 [1.0, 5.1]'."""
    organs = [c for c in table.columns if f"{c} sd" in table.columns]

    def spread(row, organ):
        sd = row[f"{organ} sd"]
        return f"{row[organ]:.2f}" + ("" if np.isnan(sd) else f" ± {sd:.2f}")

    def gain(row):
        if np.isnan(row["difference"]):
            return ""
        interval = "" if np.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        return f"{row['difference']:+.2f}{interval}"

    lines = {
        name: {"seeds": str(int(row["seeds"]))}
        | {organ: spread(row, organ) for organ in organs}
        | {f"against {first}": gain(row)}
        for name, row in table.iterrows()
    }
    return pd.DataFrame.from_dict(lines, "index")


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    lines = [["", *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[name, *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """A table of texts as a LaTeX tabular."""

    def line(cells):
        text = " & ".join(cells).replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$")
        return f"{text} \\\\\n"

    body = "".join(line([n, *r]) for n, r in zip(table.index, table.to_numpy(), strict=True))
    head = line(["", *table.columns])
    begin = f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}\n"
    return f"{begin}\\hline\n{head}\\hline\n{body}\\hline\n\\end{{tabular}}\n"
