"""Scores of predicted volumes by case and organ, and their means."""

import collections
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import tasks
from cgs_jax.data.prepared import Prepared
from cgs_jax.data.volume import NO_LABEL
from cgs_jax.inference.predictor import LITERATURE, Predictor, Scoring
from cgs_jax.runtime import processes, threads
from cgs_jax.runtime.console import progress
from cgs_jax.runtime.errors import UserError
from cgs_jax.scoring import metrics

SPLITS = {
    "test": "test",
    "test_literature": "test, the literature's scoring",
    "val": "validation",
    "val_literature": "validation, the literature's scoring",
}
Results = dict[str, dict[str, dict[str, float]]]  # case -> organ -> metric -> value


def read_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """summary.json of a run.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / "summary.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"no whole {path}; {workdir} has not finished") from None


def absent(prepared: Prepared, cases: list[str]) -> list[str]:
    """Organs that `cases` are scored by, but that have no voxel in any of their labels."""
    there = {}
    for case in cases:
        for organ, own in prepared.scored(case).items():
            there.setdefault(organ, set()).update(set(own).intersection(prepared.numbers(case)))
    return [organ for organ, found in there.items() if not found]


def empty(prepared: Prepared, cases: list[str]) -> list[str]:
    """Those of `cases` whose label has no voxel of any organ."""
    return [case for case in cases if not set(prepared.numbers(case)) - {0, NO_LABEL}]


def unannotated(prepared: Prepared, cases: list[str], organs: list[str]) -> list[str]:
    """Those of `organs` that the label of no case marks, so that none is scored by them."""
    marked = {organ for case in cases for organ in prepared.scored(case)}
    return [organ for organ in organs if organ not in marked]


def evaluate(
    predictor: Predictor, prepared: Prepared, cases: list[str], surface: bool, *scorings: Scoring
) -> list[Results]:
    """Scores the annotated organs of `cases`, or regions of them, dealt over the processes, by each
    scoring; without `surface` only the overlap metrics."""
    everyone, cases = cases, cases[jax.process_index() :: jax.process_count()]
    labels = segmented(predictor, prepared, cases, *scorings)
    labels = progress(labels, "scoring", len(cases), "case")
    results = [{case: {} for case in cases} for _ in scorings]
    begun = collections.deque()

    def finish_first():
        case, futures = begun.popleft()
        for (which, organ), future in futures.items():
            results[which][case][organ] = future.result()

    # Threads: scipy leaves Python's lock while it works, and the next volumes are predicted. Eight
    # at most, for each holds masks of the box around its organ.
    workers = min(8, len(threads.cores()))
    pool = ThreadPoolExecutor(workers)
    try:
        for case, by_scoring in labels:
            if len(begun) == 2 * workers:  # memory is limited
                finish_first()
            _, truth, spacing = prepared.volume(case)
            truth = np.array(truth)  # and so is the number of open files
            futures = {}
            for which, label in enumerate(by_scoring):
                for organ, own in prepared.scored(case).items():
                    future = pool.submit(_score, label, truth, own, spacing, surface)
                    futures[which, organ] = future
            begun.append((case, futures))
        while begun:
            finish_first()
    finally:
        pool.shutdown(cancel_futures=True)
    gathered = processes.gather(results)
    return [
        {case: part[which][case] for case in everyone for part in gathered if case in part[which]}
        for which in range(len(scorings))
    ]


def segmented(
    predictor: Predictor, prepared: Prepared, cases: Iterable[str], *scorings: Scoring
) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Of each case its labels [D, H, W] by each scoring, a data set after the other."""
    for name, own in prepared.by_task(cases).items():
        of_task = ((case, prepared.volume(case)) for case in own)
        yield from predictor.of(name).labels(of_task, *scorings)


def score(predictor: Predictor, prepared: Prepared) -> dict[str, Any]:
    """Summaries of all metrics: {'val': ..., 'test': ...}, or the first alone, and from the same
    predictions what the literature's scoring makes of them: 'val_literature', 'test_literature'."""
    splits = {"val": prepared.splits.val}
    if predictor.config.test and prepared.splits.test:
        splits["test"] = prepared.splits.test
    summaries = {}
    for name, cases in splits.items():
        both = evaluate(predictor, prepared, cases, True, predictor.scoring, LITERATURE)
        for scoring, results in zip(("", "_literature"), both, strict=True):
            summaries[name + scoring] = summarise(results, predictor.config.data)
    return summaries


def final_split(*summaries: dict[str, Any]) -> str:
    """'test', or 'val' where one of them was not to score the test cases."""
    return "test" if all("test" in summary for summary in summaries) else "val"


def _score(label, truth, own, spacing, surface):
    # One comparison a label: np.isin takes thirty times as long.
    found, there = (functools.reduce(np.logical_or, (x == i for i in own)) for x in (label, truth))
    masks = found & (truth != NO_LABEL), there
    scores = metrics.score(*masks, spacing) if surface else metrics.overlap(*masks)
    predicted, voxels = (int(np.count_nonzero(mask)) for mask in masks)
    return scores | {"voxels": voxels, "predicted": predicted}


def ranked(results: Results) -> list[tuple[str, float]]:
    """Cases and their mean Dice in %, worst first; those without any organ only if all are."""
    dice = {c: 100 * mean(s["dice"] for s in organs.values()) for c, organs in results.items()}
    defined = [(case, value) for case, value in dice.items() if not np.isnan(value)]
    return sorted(defined, key=lambda pair: pair[1]) or list(dice.items())


def summarise(results: Results, data: ConfigDict) -> dict[str, Any]:
    """Means over cases for every organ, and over organs, with the number of undefined values.

    'voxels' is an organ's true size, 'predicted' that which was found. The mean of a collection is
    that of its members' means.

    Returns {'mean': {metric: value}, 'organs': {organ: {metric: {'mean', 'std', 'undefined'}}},
    'cases': results}; what no case defines is nan.
    """
    organs: dict[str, Any] = {}
    for by_organ in results.values():
        for organ, scores in by_organ.items():
            for metric, value in scores.items():
                organs.setdefault(organ, {}).setdefault(metric, []).append(value)
    for by_metric in organs.values():
        for metric, values in by_metric.items():
            undefined = int(np.isnan(values).sum())
            by_metric[metric] = {"mean": mean(values), "std": mean(values, np.std)}
            by_metric[metric]["undefined"] = undefined
    # Members may know no millimetres; what is told of all is what all of them have.
    of_all = set.intersection(*map(set, organs.values()))
    organs = {
        organ: {m: value for m, value in by_metric.items() if m in of_all}
        for organ, by_metric in organs.items()
    }
    by_task = {}
    for name, task in tasks.tasks(data).items():
        known = [organs[organ] for organ in task.scored() if organ in organs]
        if known:
            by_task[name] = {m: mean(organ[m]["mean"] for organ in known) for m in known[0]}
    names = next(iter(by_task.values()))
    overall = {m: mean(means[m] for means in by_task.values()) for m in names}
    members = {"members": by_task} if data.name == tasks.COLLECTION else {}
    return {"mean": overall, **members, "organs": organs, "cases": results}


def mean(values: Iterable[float], statistic: Callable = np.mean) -> float:
    """Mean, or another statistic, of what is not nan; nan where nothing is left."""
    known = [v for v in values if not np.isnan(v)]
    return float(statistic(known)) if known else float("nan")


def table(summary: dict[str, Any]) -> str:
    """The means as text, an organ a line."""
    columns = [name for name in metrics.HEADINGS if name in summary["mean"]]
    scale = {name: 100 if name in metrics.SHARES else 1 for name in columns}
    means = {f"mean of {name}": own for name, own in summary.get("members", {}).items()}
    width = max(map(len, [*summary["organs"], *means, "organ"]))
    lines = [f"{'organ':<{width}}" + "".join(f"{metrics.HEADINGS[c]:>11}" for c in columns)]
    for organ, scores in summary["organs"].items():
        cells = (f"{scores[c]['mean'] * scale[c]:>11.2f}" for c in columns)
        undefined = max(scores[c]["undefined"] for c in columns)
        note = f"   ({undefined} undefined)" if undefined else ""
        lines.append(f"{organ:<{width}}" + "".join(cells) + note)
    for name, own in (means | {"mean": summary["mean"]}).items():
        cells = (f"{own[c] * scale[c]:>11.2f}" for c in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
