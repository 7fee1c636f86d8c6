"""SegTHOR thorax CT (Lambert et al., 2020, arXiv 1912.05950): esophagus, heart, trachea, aorta.

`Patient_01/Patient_01.nii.gz` and `Patient_01/GT.nii.gz`; a patient without GT.nii.gz is an
image-only scan.
"""

import pathlib

from ml_collections import ConfigDict

from cgs_jax.data.nifti import by_name, read_nifti_case
from cgs_jax.data.volume import Case
from cgs_jax.runtime.errors import UserError

read = read_nifti_case


def find(data: ConfigDict) -> dict[str, Case]:
    """Cases in `data.root` or its folder `train`."""
    paths = pathlib.Path(data.root).glob("**/Patient_*/Patient_*.nii.gz")
    scans = ((path.parent.name, path) for path in paths)
    scans = by_name((name, path) for name, path in scans if path.name == f"{name}.nii.gz")
    cases = {}
    for name, path in scans.items():
        label = path.with_name("GT.nii.gz")
        cases[name] = Case(name, (path,), (label,) if label.exists() else None)
    if not cases:
        raise UserError(
            f"no SegTHOR in {data.root!r}: --config.data.root must hold Patient_01/"
            "{Patient_01.nii.gz,GT.nii.gz} and so on (competitions.codalab.org/competitions/21145);"
            " `python -m cgs_jax.data.phantom --out FOLDER` writes phantoms in this layout"
        )
    return cases
