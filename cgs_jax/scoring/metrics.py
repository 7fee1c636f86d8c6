"""Overlap and surface distances of volumes, on the host.

Semantics of medpy, which the literature's figures were made with: a surface is a mask minus its
6-neighbour erosion; 95HD is the 95th percentile of both directions pooled; ASD is one-directional,
prediction to truth.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

OVERLAP = ("dice", "jaccard")
SHARES = (*OVERLAP, "missed")  # shown in %
HEADINGS = {
    "dice": "Dice %",
    "jaccard": "Jaccard %",
    "hd95": "95HD vox",
    "asd": "ASD vox",
    "hd95_mm": "95HD mm",
    "asd_mm": "ASD mm",
    "missed": "missed %",
}
ABSENT_IN_ONE = {"hd95": 50.0, "asd": 10.0}  # the literature's penalty, in either unit


def overlap(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice and Jaccard of boolean masks of one shape; nan where both are empty."""
    both, total = np.count_nonzero(pred & truth), np.count_nonzero(pred) + np.count_nonzero(truth)
    if total == 0:
        return dict.fromkeys(OVERLAP, float("nan"))
    return {"dice": 2 * both / total, "jaccard": both / (total - both)}


def score(
    pred: np.ndarray, truth: np.ndarray, spacing: np.ndarray | None = None
) -> dict[str, float]:
    """All metrics of one organ in one case.

    Args:
      pred, truth: boolean [D, H, W].
      spacing: millimetres per voxel along each axis, None where unknown.

    Returns:
      dice, jaccard, hd95 and asd in voxels and, with `spacing`, hd95_mm and asd_mm. An organ absent
      in both is undefined (nan); absent in one it scores the literature's 0, 0, 50, 10, though no
      distance is right: 'missed' is 1 where an organ was not found at all, else 0, and nan where it
      is not there.
    """
    scores = overlap(pred, truth)
    scores["missed"] = float(not pred.any()) if truth.any() else float("nan")
    units = {"": np.ones(pred.ndim)}
    if spacing is not None:
        units["_mm"] = np.asarray(spacing, float)
    if not (pred.any() and truth.any()):
        undefined = not (pred.any() or truth.any())
        values = {k: float("nan") if undefined else v for k, v in ABSENT_IN_ONE.items()}
        return scores | {k + unit: v for unit in units for k, v in values.items()}
    box = ndimage.find_objects((pred | truth).view(np.uint8))[0]
    pred_surface, truth_surface = _surface(pred[box]), _surface(truth[box])
    for unit, sampling in units.items():
        to_truth = _distances(pred_surface, truth_surface, sampling)
        to_pred = _distances(truth_surface, pred_surface, sampling)
        scores[f"hd95{unit}"] = float(np.percentile(np.concatenate([to_truth, to_pred]), 95))
        scores[f"asd{unit}"] = float(to_truth.mean())
    return scores


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)  # outside the volume counts as background


def _distances(surface: np.ndarray, other: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """Of each voxel of a surface to the nearest of another, in any order. A tree of the voxels is
    small where a distance transform would fill the box around pieces that are far apart."""
    tree = KDTree(np.argwhere(other) * sampling, balanced_tree=False, compact_nodes=False)
    found, apart = np.zeros(np.count_nonzero(surface)), np.argwhere(surface & ~other)
    found[: len(apart)], _ = tree.query(apart * sampling)
    return found
