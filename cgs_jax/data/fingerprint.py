"""What scans are like before anything is done to them: sizes, voxels, intensities of organs.

As nnU-Net does it (Isensee et al., Nature Methods 2021), intensities are those of annotated organs.
What was found of a case is kept beside its cache entry.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from cgs_jax.data import case_lists, nifti, tasks
from cgs_jax.data.volume import Case, check_label, finite
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import write_text

QUANTILES = np.linspace(0, 1, 201)  # of the intensities in the organs of a case
WINDOW = 0.5, 99.5  # percentiles


class Facts(NamedTuple):
    """Of one case.

    Attributes:
      shape: of its stack [D, H, W].
      spacing: millimetres along D, H, W.
      voxels: by organ; None without a label.
      intensities: QUANTILES of all voxels of organs, by channel; () where there are none.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    voxels: dict[str, int] | None
    intensities: list[list[float]]


def of_cases(cases: Iterable[Case], data: ConfigDict) -> dict[str, Facts]:
    """Facts by name of NIfTI cases.

    Raises:
      UserError: they are not stored as NIfTI, or a file is damaged.
    """
    cases = list(cases)
    if not all(".nii" in path.suffixes for case in cases for path in case.image):
        raise UserError("voxel sizes and intensities are looked up in NIfTI files only")
    folder = pathlib.Path(data.cache or pathlib.Path(data.root) / "cgs_cache")
    found = {}
    for case in tqdm(cases, "looking at scans", unit="scan", leave=False, disable=None):
        files = [*case.image, *(case.label or ())]
        key = [data.slicing, data.classes, *((str(f), f.stat().st_mtime_ns) for f in files)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        path = folder / f"facts_{case.name}_{digest}.json"
        try:
            found[case.name] = Facts(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            found[case.name] = _look(case, data)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(found[case.name]._asdict()))
            except OSError:
                pass  # it is looked up again
    return found


def _look(case, data):
    scans = [nifti.read_nifti(path, data.slicing) for path in case.image]
    arrays = [finite(scan.array, path) for scan, path in zip(scans, case.image, strict=True)]
    first, voxels, intensities = scans[0], None, []
    if case.label:
        label = nifti.read_nifti(case.label[0], data.slicing).array
        label = check_label(label, np.stack(arrays), case.label[0], data.classes)
        counts = np.bincount(label.ravel(), minlength=1 + len(data.classes))[1:]
        voxels = dict(zip(data.classes, counts.tolist(), strict=True))
        if label.any():
            of_organs = (array[label > 0] for array in arrays)
            intensities = [np.quantile(values, QUANTILES).tolist() for values in of_organs]
    return Facts(first.array.shape, first.spacing, voxels, intensities)


def median_pixel(data: ConfigDict) -> tuple[float, float]:
    """For `data.spacing='median'`: height and width in millimetres of a pixel of the slices."""
    facts = of_cases(tasks.layout(data).find(data).values(), data).values()
    height, width = np.median([of.spacing[1:] for of in facts], 0)
    return round(float(height), 3), round(float(width), 3)


def normalisation(data: ConfigDict) -> Any:
    """For `data.normalise='auto'`: of CT, whose values have a meaning, the window that holds the
    organs of the labelled training cases; else 'percentile' of each scan."""
    module = tasks.layout(data)
    kinds = module.channel_kinds(data) if hasattr(module, "channel_kinds") else [""]
    if {kind.lower() for kind in kinds} != {"ct"}:
        return "percentile"
    cases = module.find(data)
    labelled = case_lists.split(cases, data, data.split_seed).labelled
    facts = of_cases((cases[name] for name in labelled if name in cases), data).values()
    values = [values for of in facts for values in of.intensities]
    if not values:
        return "percentile"
    low, high = np.percentile(values, WINDOW).round().tolist()
    return (low, max(high, low + 1))
