"""Scores in the form of nnU-Net's `summary.json` (version 2), for programs that read that."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cgs_jax.data import tasks
from cgs_jax.data.volume import stored_labels
from cgs_jax.scoring import summaries


def of(results: summaries.Results, data: ConfigDict) -> dict[str, Any]:
    """What nnU-Net would write of the cases of one data set that were scored.

    Returns:
      'metric_per_case', a list with 'metrics' by number of the label in its file, or of a region by
      its numbers, such as '(1, 2)'; their means over the cases, 'mean'; and the mean of these,
      'foreground_mean'. Shares are in 0 to 1, and nan where neither prediction nor truth has the
      organ. Files are told by the names of the cases, and true negatives are left out. (A region
      that is given as a list of one number is '(4,)' there; here it is '4', as without a list.)
    """
    numbers, keys = stored_labels(data.classes, data.numbers), {}
    for name, own in tasks.find(data, "").scored().items():
        of_files = tuple(numbers[i] for i in own)
        keys[name] = str(of_files if data.regions and len(of_files) > 1 else of_files[0])
    cases = [
        {
            "metrics": {keys[name]: _metrics(scores) for name, scores in by_name.items()},
            "prediction_file": case,
            "reference_file": case,
        }
        for case, by_name in results.items()
    ]
    mean = {}
    for key in keys.values():
        of_cases = [case["metrics"][key] for case in cases if key in case["metrics"]]
        if of_cases:
            mean[key] = _mean(of_cases)
    return {"foreground_mean": _mean(mean.values()), "mean": mean, "metric_per_case": cases}


def _metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """Of one organ in one case."""
    truth, guess = scores["voxels"], scores["predicted"]
    both = round(scores["dice"] * (truth + guess) / 2) if truth + guess else 0
    return {
        "Dice": scores["dice"],
        "IoU": scores["jaccard"],
        "TP": both,
        "FP": guess - both,
        "FN": truth - both,
        "n_ref": truth,
        "n_pred": guess,
    }


def _mean(metrics):
    metrics = list(metrics)
    return {name: summaries.mean(case[name] for case in metrics) for name in metrics[0]}
