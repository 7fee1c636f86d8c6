"""Small data sets, as their users keep them."""

import json

import nibabel as nib
import numpy as np

from configs import nnunet


def lists(folder, **cases):
    folder.mkdir(parents=True, exist_ok=True)
    for name, names in cases.items():
        (folder / f"{name}.txt").write_text("\n".join(names) + "\n")
    return str(folder)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def nnunet_folder(tmp_path, labels=None, cases=12, **description):
    root = tmp_path / "Dataset001_Mine"
    rng = np.random.default_rng(0)
    for i in range(cases):
        save(root / "imagesTr" / f"mine_{i:03d}_0000.nii.gz", rng.random((9, 8, 4), np.float32))
        if i < cases - 3:
            label = rng.integers(0, 3, (9, 8, 4)).astype(np.uint8)
            save(root / "labelsTr" / f"mine_{i:03d}.nii.gz", label)
    labels = labels or {"background": 0, "head": 1, "tail": 2}
    description = {"labels": labels, "file_ending": ".nii.gz"} | description
    (root / "dataset.json").write_text(json.dumps(description))
    config = nnunet.get_config()
    config.data.root, config.data.size = str(root), 16
    return config, root
