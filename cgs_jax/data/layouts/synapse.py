"""Synapse multi-organ abdominal CT (BTCV, synapse.org syn3193805), eight organs.

Two layouts: TransUNet's prepared arrays (`train_npz/*.npz`, `test_vol_h5/*.npy.h5`: clipped to
[-125, 275] HU and scaled to [0, 1], labels 1 to 8), and the raw NIfTI.
"""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import nifti, volume
from cgs_jax.data.layouts import arrays
from cgs_jax.data.volume import Case, Volume
from cgs_jax.runtime.errors import UserError

# BTCV's aorta, gallbladder, left and right kidney, liver, pancreas, spleen, stomach, in the order
# of TransUNet's labels 1 to 8; its other organs are background here.
BTCV_LABELS = (8, 4, 3, 2, 6, 11, 1, 7)


def find(data: ConfigDict) -> dict[str, Case]:
    """Cases below `data.root`, in either layout; `img0001` is `case0001`."""
    root = pathlib.Path(data.root)
    cases = arrays.group_slices(root / "train_npz", r"(case\d+)_slice(\d+)\.npz")
    for path in sorted(root.glob("test_vol_h5/case*.npy.h5")):
        name = path.name.split(".")[0]
        cases.setdefault(name, Case(name, (path,), (path,)))
    if not cases:
        images, labels = (
            nifti.by_name((path.name, path) for path in root.glob(f"**/{kind}*.nii.gz"))
            for kind in ("img", "label")
        )
        for file, path in images.items():
            name = file.replace("img", "case").removesuffix(".nii.gz")
            label = labels.get(file.replace("img", "label"))
            cases[name] = Case(name, (path,), (label,) if label else None)
    if not cases:
        raise UserError(
            f"no Synapse in {data.root!r}: --config.data.root must hold train_npz/*.npz and "
            "test_vol_h5/*.npy.h5 (github.com/Beckschen/TransUNet) or img0001.nii.gz and "
            "label0001.nii.gz (synapse.org syn3193805)"
        )
    return cases


def read(case: Case, data: ConfigDict) -> Volume:
    """The case in [0, 1] with labels 0 to 8."""
    if case.image[0].suffix in (".npz", ".h5"):
        return arrays.read_arrays(case, lambda image: np.clip(image, 0, 1))
    image, label, spacing = nifti.read_nifti_case(case, data)
    return Volume(image, None if label is None else to_classes(label, image, case), spacing)


def to_classes(label: np.ndarray, image: np.ndarray, case: Case) -> np.ndarray:
    """BTCV's thirteen labels [D, H, W] -> 0 to 8; `image` is [C, D, H, W]."""
    label = volume.check_label(label, image, case.label[0], [f"BTCV {i}" for i in range(1, 14)])
    table = np.zeros(14, np.uint8)
    table[list(BTCV_LABELS)] = np.arange(1, 9)
    return table[label]
