"""What scans are like before anything is done to them: sizes, voxels, intensities of organs.

As nnU-Net does it (Isensee et al., Nature Methods 2021), intensities are those of annotated organs.
What was found of a case is kept beside its cache entry.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import cache, case_lists, nifti, tasks
from cgs_jax.data.volume import Case, check_label, finite
from cgs_jax.runtime import threads
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import write_text

QUANTILES = (np.arange(200) + 0.5) / 200  # of the intensities in the organs of a case
WINDOW = 0.5, 99.5  # percentiles


class Facts(NamedTuple):
    """Of one case.

    Attributes:
      shape: of its stack [D, H, W].
      spacing: millimetres along D, H, W.
      voxels: by annotated organ; None without a label.
      intensities: QUANTILES of all voxels of organs, by channel; () where there are none.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    voxels: dict[str, int] | None
    intensities: list[list[float]]


def of_cases(cases: Iterable[Case], data: ConfigDict) -> dict[str, Facts]:
    """Facts by name of cases.

    Raises:
      UserError: they are not stored as scans, or a file is damaged. Of a case without label the
        header alone is read.
    """
    cases = list(cases)
    if not all(nifti.ending_of(path) for case in cases for path in case.image):
        raise UserError("voxel sizes and intensities are looked up in files of scans only")
    found = threads.each(lambda case: _facts(case, data), cases, "looking at scans")
    return {case.name: facts for case, facts in zip(cases, found, strict=True)}


def _facts(case, data):
    fields = ("slicing", "classes", "numbers", "ignore", "trust_shapes")
    options = [*(data[field] for field in fields), case.annotated]
    folder = cache.folder_of(data)
    path = folder / f"facts_{case.name}_{cache.digest(case, data, options)}.json"
    try:
        return Facts(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        facts = _look(case, data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(facts._asdict()))
    except (OSError, UserError):
        pass  # it is looked up again
    return facts


def _look(case, data):
    scans = nifti.read_scans(case.image, data.slicing, values=bool(case.label))
    first, voxels, intensities = scans[0], None, []
    if case.label:
        label = nifti.read_label(case.label[0], case.image[0], first, data)
        module, image = tasks.layout(data), first.array[None]
        if hasattr(module, "to_classes"):
            label = module.to_classes(label, image, case)
        label = check_label(label, image, case.label[0], data.classes, data.numbers, data.ignore)
        known = data.classes if case.annotated is None else case.annotated
        numbers = {organ: i for i, organ in enumerate(data.classes, 1) if organ in known}
        voxels = {organ: int(np.count_nonzero(label == i)) for organ, i in numbers.items()}
        organs = np.isin(label, list(numbers.values()))
        if organs.any():
            arrays = (finite(s.array, path) for s, path in zip(scans, case.image, strict=True))
            intensities = [np.quantile(array[organs], QUANTILES).tolist() for array in arrays]
    return Facts(first.array.shape, first.spacing, voxels, intensities)


def median(facts: Mapping[str, Facts], field: str) -> float:
    """Millimetres for the `field` 'spacing' of the data, of a pixel, or 'slice_spacing'."""
    axes = {"spacing": slice(1, 3), "slice_spacing": slice(0, 1)}[field]
    found = np.median([case.spacing[axes] for case in facts.values()])
    return float(f"{found:.4g}")  # a thousandth of a millimetre is much to a microscope


def tell_of_long_pixels(facts: Mapping[str, Facts]) -> None:
    """Warns where pixels of slices are far from square, as where scans are cut across an axis along
    which they were not taken."""
    short, long = sorted(np.median([case.spacing[1:] for case in facts.values()], 0))
    if long > 2 * short:
        say(
            f"WARNING: pixels of slices have {short:.3g} x {long:.3g} mm; if scans are stacks of "
            "slices along another axis, give data.slicing=coarsest"
        )


def of_training(data: ConfigDict) -> dict[str, Facts]:
    """Facts by name of the training cases.

    Raises:
      UserError: the case lists can not be, or as `of_cases`.
    """
    cases = tasks.layout(data).find(data)
    splits = case_lists.split(cases, data, data.split_seed)
    case_lists.check(splits, cases, data)
    return of_cases((cases[name] for name in splits.train), data)


def normalisation(data: ConfigDict) -> Any:
    """For `data.normalise='auto'`: of CT, whose values have a meaning, the window that holds the
    organs of the labelled training cases; else 'percentile' of each scan."""
    module = tasks.layout(data)
    kinds = module.channel_kinds(data) if hasattr(module, "channel_kinds") else [""]
    if {kind.lower() for kind in kinds} != {"ct"}:
        return "percentile"
    if data.exemplar:
        raise UserError("one labelled slice tells no window of CT: give --config.data.normalise")
    cases = module.find(data)
    labelled = case_lists.split(cases, data, data.split_seed).labelled
    facts = of_cases((cases[name] for name in labelled if name in cases), data).values()
    values = [values for case in facts for values in case.intensities]
    if not values:
        return "percentile"
    low, high = np.percentile(values, WINDOW).round().tolist()
    return (low, max(high, low + 1))
