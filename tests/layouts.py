"""Small data sets, as their users keep them."""

import json

import nibabel as nib
import numpy as np

from cgs_jax.data.streams import Stream
from configs import nnunet

STREAMS = {"labelled": Stream("labelled", True, 4), "unlabelled": Stream("unlabelled", False, 3)}


def lists(folder, **cases):
    folder.mkdir(parents=True, exist_ok=True)
    for name, names in cases.items():
        (folder / f"{name}.txt").write_text("\n".join(names) + "\n")
    return str(folder)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def nnunet_folder(tmp_path, labels=None, cases=12, **description):
    """Random scans of as many channels as `description` names in channel_names."""
    root, channels = tmp_path / "Dataset001_Mine", len(description.get("channel_names", "1"))
    rng = np.random.default_rng(0)
    for i in range(cases):
        for c in range(channels):
            path = root / "imagesTr" / f"mine_{i:03d}_{c:04d}.nii.gz"
            save(path, (c + 1) * rng.random((9, 8, 4), np.float32))
        if i < cases - 3:
            label = rng.integers(0, 3, (9, 8, 4)).astype(np.uint8)
            save(root / "labelsTr" / f"mine_{i:03d}.nii.gz", label)
    labels = labels or {"background": 0, "head": 1, "tail": 2}
    description = {"labels": labels, "file_ending": ".nii.gz"} | description
    (root / "dataset.json").write_text(json.dumps(description))
    config = nnunet.get_config()
    config.data.root, config.data.size = str(root), 16
    return config, root


def everything(data):
    """Images and labels of all training slices."""
    rows = data.rows(data.splits.train)
    return data.images(rows), data.labels(rows)
