"""Runs as pandas frames, and the table that compares them.

Used by `cgs_jax.sweep` and `notebooks/ablation.ipynb`. Scores are in %, distances in voxels, or in
millimetres where the name ends in `_mm`.
"""

import json
import pathlib
import re
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from cgs_jax.data.case_lists import patient_of
from cgs_jax.data.tasks import task_of
from cgs_jax.runtime import run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import read_lines
from cgs_jax.runtime.logs import time_spent
from cgs_jax.scoring import summaries
from cgs_jax.scoring.metrics import SHARES


class Sweep(NamedTuple):
    """Finished runs of a folder.

    Attributes:
      runs: a line a run: row, seed, workdir, method, steps, best (step), val (Dice), minutes,
        hardware.
      curves: a line a line of metrics.jsonl, with row and seed.
      cases: a line an organ of a case: row, seed, split ('val', 'test', 'val_literature',
        'test_literature' of the best checkpoint, with 'last_' before it of the last), member (of a
        collection, else ''), case, patient, organ, voxels (true size), predicted (size), and what
        `scoring.metrics` measures, such as dice, jaccard, hd95 and asd.
      first: the row that others are held against, the first that has a finished run.
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
    order = folder / "sweep.json"
    if order.exists():
        name = lambda workdir: str(workdir.parent.relative_to(folder))  # noqa: E731
        rows = json.loads(order.read_text())["rows"]
        runs = [workdir for workdir in found if re.fullmatch(r"seed\d+", workdir.name)]
        found = [workdir for row in rows for workdir in runs if name(workdir) == row]
    if not found:
        raise UserError(f"no finished run in {folder}")
    runs, curves, cases = [], [], []
    for workdir in found:
        config, _ = run_folder.load(workdir)
        summary = summaries.read_summary(workdir)
        key = {"row": name(workdir), "seed": config.seed}
        minutes, hardware = time_spent(workdir)
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
        last = {f"last_{split}": scored for split, scored in summary["last"].items()}
        for split, scored in (summary | last).items():
            if split.removeprefix("last_") not in summaries.SPLITS:
                continue
            for case, organs in scored["cases"].items():
                who = {"split": split, "case": case, "patient": patient_of(case, config.data)}
                member, _ = task_of(config.data, case)
                for organ, scores in organs.items():
                    organ = organ.removeprefix(f"{member}/")
                    values = {k: number(v) * (100 if k in SHARES else 1) for k, v in scores.items()}
                    cases.append(key | who | {"member": member, "organ": organ} | values)
    return Sweep(*map(pd.DataFrame, (runs, curves, cases)), name(found[0]))


def number(value: float | None) -> float:
    """What JSON had to write as null is nan."""
    return float("nan") if value is None else value


def scores(cases: pd.DataFrame, metric: str = "dice", split: str = "test") -> pd.DataFrame:
    """A line a row and seed, a column an organ, and their 'mean'; undefined cases are left out.

    `cases` are of one member, here and below: the members of a collection have tables of their own.
    """
    cases = cases[cases.split == split]
    by_organ = cases.groupby(["row", "seed", "organ"], sort=False)[metric].mean()
    by_organ = by_organ.unstack("organ", sort=False)
    return by_organ.assign(mean=by_organ.mean(axis=1))


def differences(
    cases: pd.DataFrame, first: str, metric: str = "dice", split: str = "test"
) -> pd.DataFrame:
    """By row: how far its mean over all its seeds is above that of row `first`, in the same organs
    and cases: columns difference, low, high, and seeds of first.

    What either row leaves undefined in all its seeds is left out. The 95 % bootstrap interval draws
    the patients, whose cases and organs go together, and the seeds of both rows independently of
    each other, since training noise is not shared. Where a row has one seed, its training noise can
    not be known and is not in the interval; with two or three it is underestimated.
    """
    cases = cases[cases.split == split]
    values = cases.set_index(["row", "seed", "patient", "case", "organ"])[metric]
    values = values.unstack(["patient", "case", "organ"], sort=False)
    lines = {}
    rows = list(dict.fromkeys(values.index.get_level_values("row")))
    for row in (row for row in rows if first in rows and row != first):
        pair = values.loc[[row]], values.loc[[first]]
        both = pair[0].notna().any() & pair[1].notna().any()
        pair = [runs.loc[:, both] for runs in pair]
        whose = pair[0].columns.get_level_values("patient")
        patients, whose = np.unique(whose, return_inverse=True)
        share = (whose == np.arange(len(patients))[:, None]) / np.bincount(whose)[:, None]
        gain = partial(_gain, *(runs.to_numpy() for runs in pair), share)
        seeds = tuple(map(len, pair))
        whole = [np.ones((1, n)) for n in (*seeds, len(patients))]
        low, high = np.nan, np.nan
        if len(patients) > 1:
            rng = np.random.default_rng(0)
            draws = [rng.multinomial(n, [1 / n] * n, 10_000) for n in (*seeds, len(patients))]
            low, high = np.percentile(gain(*draws), (2.5, 97.5))
        difference = gain(*whole)[0] if len(patients) else np.nan
        lines[row] = (difference, low, high, seeds[1])
    columns = ["difference", "low", "high", "seeds of first"]
    return pd.DataFrame.from_dict(lines, "index", columns=columns)


def _gain(ours, theirs, share, our_seeds, their_seeds, patients):
    """Differences [draws] of the means of ours and theirs [seeds, items], where `share` [patients,
    items] averages a patient's items, and a draw counts each seed and patient so many times."""

    def mean(runs, times):
        defined = times @ ~np.isnan(runs)
        with np.errstate(invalid="ignore"):  # none of the seeds drawn defines the item
            return (times @ np.nan_to_num(runs)) / defined

    gains = mean(ours, our_seeds) - mean(theirs, their_seeds)
    by_patient = np.nan_to_num(gains) @ share.T / (~np.isnan(gains) @ share.T)
    return np.nansum(patients * by_patient, 1) / np.sum(patients * ~np.isnan(by_patient), 1)


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
    """The same as readers want it: '79.1 ± 0.4', '+3.2 [1.0, 5.1] (3 and 3 seeds)'."""
    organs = [c for c in table.columns if f"{c} sd" in table.columns]

    def spread(row, organ):
        sd = row[f"{organ} sd"]
        return f"{row[organ]:.2f}" + ("" if np.isnan(sd) else f" ± {sd:.2f}")

    def gain(row):
        if np.isnan(row["difference"]):
            return ""
        interval = "" if np.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        seeds = f"{row['seeds']:.0f} and {row['seeds of first']:.0f} seeds"
        return f"{row['difference']:+.2f}{interval} ({seeds})"

    lines = {
        name: {"seeds": str(int(row["seeds"]))}
        | {organ: spread(row, organ) for organ in organs}
        | {f"against {first}": gain(row)}
        for name, row in table.iterrows()
    }
    return pd.DataFrame.from_dict(lines, "index")


LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "±": r"$\pm$"}
)


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    lines = [["", *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[name, *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    lines = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """A table of texts as a LaTeX tabular."""

    def line(cells):
        return " & ".join(cell.translate(LATEX) for cell in cells) + " \\\\\n"

    body = "".join(line([n, *r]) for n, r in zip(table.index, table.to_numpy(), strict=True))
    head = line(["", *table.columns])
    begin = f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}\n"
    return f"{begin}\\hline\n{head}\\hline\n{body}\\hline\n\\end{{tabular}}\n"
