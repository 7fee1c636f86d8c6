"""One clear line for every bad scan, label, list and folder."""

import h5py
import nibabel as nib
import numpy as np
import pytest

from cgs_jax.data import cache, completion, nifti
from cgs_jax.data.layouts import acdc as acdc_layout
from cgs_jax.data.phantom import write as write_phantoms
from cgs_jax.runtime.errors import UserError
from configs import acdc, nnunet, segthor, synapse
from layouts import lists, nnunet_folder, save


def test_bad_nnunet_descriptions(tmp_path):
    config, root = nnunet_folder(tmp_path, labels={"background": 0, "head": 1, "tail": 1})
    with pytest.raises(UserError, match=r"dataset.json: labels must be background 0"):
        completion.complete(config.data)
    config, _ = nnunet_folder(tmp_path)
    save(root / "imagesTr" / "mine_000_0001.nii.gz", np.zeros((9, 8, 4), np.float32))
    with pytest.raises(UserError, match=r"unexpected .*mine_000_0001.nii.gz: scans have 1 channel"):
        cache.prepare(config)
    (root / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"no .*dataset.json: --config.data.root must hold"):
        cache.prepare(config)


def test_bad_channels(tmp_path):
    config, root = nnunet_folder(tmp_path, channel_names={"0": "T1", "1": "T2"})
    completion.complete(config.data)
    path = root / "imagesTr" / "mine_003_0001.nii.gz"
    save(path, np.zeros((9, 8, 5), np.float32))
    with pytest.raises(UserError, match=r"mine_003_0001.nii.gz has shape \(9, 8, 5\), .*one grid"):
        cache.prepare(config)
    save(path, np.zeros((9, 8, 4), np.float32), np.diag([1, 1, 2, 1]))
    with pytest.raises(UserError, match=r"mine_003_0001.nii.gz lies up to 3.0 mm off .*_0000"):
        cache.prepare(config)
    path.unlink()
    with pytest.raises(UserError, match=r"no .*mine_003_0001.nii.gz: scans have 2"):
        cache.prepare(config)
    save(path, np.zeros((9, 8, 4), np.float32))
    path.with_name("mine_003_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"no .*mine_003_0000.nii.gz: scans have 2"):
        cache.prepare(config)


def edited(change, affine=None):
    def edit(path):
        image = nib.load(path)
        save(path, change(np.asarray(image.dataobj)), image.affine if affine is None else affine)

    return edit


def truncated(path):
    path.write_bytes(path.read_bytes()[:-900])


def removed(path):
    path.unlink()


def with_nan(x):
    return np.where(x > 1, np.nan, x).astype(np.float32)


def coloured(x):
    return np.repeat(x[..., None], 3, -1).view([(c, "u1") for c in "RGB"])[..., 0]


SCAN, LABEL = "Patient_01.nii.gz", "GT.nii.gz"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (LABEL, edited(lambda x: x + 3), r"GT.nii.gz has label value [567]; the"),
        (LABEL, edited(with_nan), "GT.nii.gz has label value nan"),
        (LABEL, edited(lambda x: x[1:]), r"GT.nii.gz has shape \(6, 24, 23\), its"),
        (LABEL, edited(np.array, np.diag([-1, -1, 1, 1])), r"GT.nii.gz lies up to \d+.\d mm off"),
        (LABEL, edited(coloured), r"GT.nii.gz holds \[.*'R'.*\] values; one label a voxel"),
        (LABEL, edited(lambda x: x + 0j), r"GT.nii.gz holds complex\d+ values; one label a"),
        (LABEL, removed, "labelled case Patient_01 has no label"),
        (SCAN, edited(with_nan), r"Patient_01.nii.gz has \d+ voxels that are NaN"),
        (SCAN, truncated, r"Patient_01.nii.gz is not a whole scan"),
        (SCAN, removed, "1 of 3 train cases .* such as Patient_01"),
    ],
)
def test_bad_scans(thorax, file, damage, message):
    config, root = thorax
    lists(root.parent / "lists", labelled_2=["Patient_01", "Patient_02"])
    damage(root / "Patient_01" / file)
    with pytest.raises(UserError, match=message):
        cache.prepare(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelled_2": ["Patient_01", "Patient_77"]}, "labelled cases .* such as Patient_77"),
        ({"labelled_2": []}, "no labelled cases for .*, 4 of 5 cases have labels"),
        ({"labelled_2": ["Patient_04"]}, "labelled case Patient_04 is not a training case"),
        ({"val": ["Patient_01"]}, "patient Patient_01 is in train and in val"),
        ({"test": ["Patient_03"]}, "test case Patient_03 has no label"),
    ],
)
def test_bad_lists(thorax, change, message):
    config, root = thorax
    lists(root.parent / "lists", **change)
    with pytest.raises(UserError, match=message):
        cache.prepare(config)


def test_a_scan_that_does_not_fit_into_memory_is_named(thorax, monkeypatch):
    def too_large(path):
        raise MemoryError

    monkeypatch.setattr(nifti, "_load", too_large)
    with pytest.raises(UserError, match=r"Patient_0\d.nii.gz does not fit into memory"):
        cache.prepare(thorax[0])


def test_missing_data(tmp_path):
    for module, layout in (
        (acdc, "data/slices/.*frame01_gt.nii.gz"),
        (segthor, "Patient_01.nii.gz.*phantom"),
        (synapse, "train_npz.*img0001"),
        (nnunet, "dataset.json"),
    ):
        config = module.get_config()
        for folder in (tmp_path, tmp_path / "missing"):
            config.data.root = str(folder)
            with pytest.raises(UserError, match=layout):
                cache.prepare(config)


def test_h5_without_its_keys(tmp_path):
    path = tmp_path / "data" / "patient001_frame01.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["image"] = np.zeros((2, 4, 4), np.float32)
    data = acdc.get_config().data
    data.root = str(tmp_path)
    with pytest.raises(UserError, match=r"frame01.h5 lacks 'image' or 'label'"):
        acdc_layout.read(acdc_layout.find(data)["patient001_frame01"], data)
    path.write_bytes(b"not an h5 file")
    with pytest.raises(UserError, match=r"frame01.h5 is not readable"):
        acdc_layout.read(acdc_layout.find(data)["patient001_frame01"], data)


def test_more_labelled_patients_than_there_are(thorax):
    config, _ = thorax
    config.data.labelled = 9
    with pytest.raises(UserError, match="data.labelled=9, but only 2 patients have labels"):
        cache.prepare(config)


def test_phantoms_never_replace_other_files(tmp_path):
    (tmp_path / "real.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="holds other files"):
        write_phantoms(tmp_path, {"Patient_01": True}, 16, 4, 0)
