"""ACDC cardiac MR (Bernard et al., TMI 2018): 1 right ventricle, 2 myocardium, 3 left ventricle.

Two layouts: the `.h5` files of SSL4MIS, which the semi-supervised literature trains on, and the
challenge's NIfTI. The literature numbers the two labelled frames of a patient 01 and 02; in NIfTI
they are the two files with a ground truth, in order.
"""

import pathlib

from ml_collections import ConfigDict

from cgs_jax.data import nifti, volume
from cgs_jax.data.layouts import arrays
from cgs_jax.data.volume import Case, Volume
from cgs_jax.runtime.errors import UserError


def find(data: ConfigDict) -> dict[str, Case]:
    """Cases below `data.root`, in either layout."""
    root = pathlib.Path(data.root)
    cases = arrays.group_slices(root / "data" / "slices", r"(patient\d+_frame\d+)_slice_(\d+)\.h5")
    for path in sorted(root.glob("data/patient*.h5")):
        cases.setdefault(path.stem, Case(path.stem, (path,), (path,)))
    frames: dict[str, list[pathlib.Path]] = {}
    if not cases:
        found = nifti.by_name((p.name, p) for p in root.glob("**/patient*_frame*.nii.gz"))
        for name, path in found.items():
            if not name.endswith("_gt.nii.gz"):
                frames.setdefault(name.split("_")[0], []).append(path)
    for patient, paths in frames.items():
        paths = [path for path in paths if _truth(path).exists()] or paths
        for i, path in enumerate(paths, 1):
            name, label = f"{patient}_frame{i:02d}", _truth(path)
            cases[name] = Case(name, (path,), (label,) if label.exists() else None)
    if not cases:
        raise UserError(
            f"no ACDC in {data.root!r}: --config.data.root must hold data/slices/*.h5 and "
            "data/*.h5 (github.com/HiLab-git/SSL4MIS) or patient001/patient001_frame01.nii.gz and "
            "patient001_frame01_gt.nii.gz (humanheart-project.creatis.insa-lyon.fr)"
        )
    return cases


def _truth(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name.replace(".nii.gz", "_gt.nii.gz"))


def read(case: Case, data: ConfigDict) -> Volume:
    """The case in [0, 1], by `data.normalise`."""
    if case.image[0].suffix == ".h5":
        return arrays.read_arrays(case, lambda image: volume.normalise(image, data.normalise))
    return nifti.read_nifti_case(case, data)
