"""MetaImage and NRRD files are read and written as NIfTI files are."""

import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from cgs_jax import predict
from cgs_jax.data import cache, completion, fingerprint, nifti
from cgs_jax.runtime.errors import UserError
from layouts import nnunet_folder


@pytest.fixture(params=[".mha", ".nrrd"])
def pair(request, tmp_path):
    """One oblique scan as NIfTI, and as another file that SimpleITK made of it."""
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(3, 3)))[0] * (1.5, 2, 3)
    affine = nib.affines.from_matvec(turned, (10, -20, 30))
    array = rng.integers(-1000, 1000, (12, 10, 4)).astype(np.int16)
    paths = tmp_path / "scan.nii.gz", tmp_path / f"scan{request.param}"
    nib.save(nib.Nifti1Image(array, affine), paths[0])
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(paths[0])), str(paths[1]), useCompression=True)
    return paths


@pytest.mark.parametrize("slicing", ["axial", "coarsest", "stored"])
def test_scans_are_the_same(pair, slicing):
    ours, theirs = (nifti.read_nifti(path, slicing) for path in pair)
    np.testing.assert_array_equal(ours.array, theirs.array)
    assert ours.spacing == pytest.approx(theirs.spacing)
    np.testing.assert_allclose(ours.corners(), theirs.corners(), atol=1e-5)


def test_label_maps_lie_on_their_scans(pair, tmp_path):
    """Another program finds the label map where the scan is."""
    scan = nifti.read_nifti(pair[1], "axial")
    label = (scan.array > 0).astype(np.uint8)
    (tmp_path / "out").mkdir()
    predict.write(scan, label, tmp_path / "out" / pair[1].name)
    (written,) = (tmp_path / "out").iterdir()
    source, found = (SimpleITK.ReadImage(str(path)) for path in (pair[1], written))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(found, fact)(), getattr(source, fact)(), atol=1e-5)
    arrays = map(SimpleITK.GetArrayFromImage, (source, found))
    np.testing.assert_array_equal(next(arrays) > 0, next(arrays) == 1)


def test_damaged_files_are_one_line(pair, tmp_path):
    path = pair[1]
    data = path.read_bytes()
    flipped = data[:-20] + bytes([data[-20] ^ 255]) + data[-19:]
    for damaged in (data[:-100], b"", flipped, data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name} is not a whole scan") as caught:
            nifti.read_nifti(path, "axial")
        assert "\n" not in str(caught.value)
    for image, problem in (
        (SimpleITK.Image(4, 4, SimpleITK.sitkUInt8), "one 3D volume per file is read"),
        (SimpleITK.Image([4] * 4, 1), "one 3D volume per file is read"),
        (SimpleITK.Image([4] * 2, SimpleITK.sitkVectorUInt8, 3), "holds 3 numbers a voxel"),
        (SimpleITK.Image([4] * 3, SimpleITK.sitkVectorUInt8, 3), "holds 3 numbers a voxel"),
    ):
        SimpleITK.WriteImage(image, str(path))
        with pytest.raises(UserError, match=problem):
            nifti.read_nifti(path, "axial")


def test_a_fourth_axis_of_length_1_stays_an_axis(pair):
    """Label maps of such scans are of their shape, not of one with vectors."""
    path = pair[1]
    SimpleITK.WriteImage(SimpleITK.Image([5, 4, 3, 1], SimpleITK.sitkInt16), str(path))
    scan = nifti.read_nifti(path, "axial")
    assert scan.array.shape == (3, 4, 5)
    stored = scan.to_stored(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    nifti.save(nib.Nifti1Image(stored, scan.nifti.affine), path)
    read = SimpleITK.ReadImage(str(path))
    assert (read.GetSize(), read.GetNumberOfComponentsPerPixel()) == ((5, 4, 3), 1)
    np.testing.assert_array_equal(
        nifti.read_nifti(path, "axial").array, np.arange(60).reshape(3, 4, 5)
    )


def test_without_the_package(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(UserError, match=f"{pair[1].name} is read by SimpleITK.*pip install"):
        nifti.read_nifti(pair[1], "axial")


def test_an_nnunet_folder(tmp_path):
    """The same arrays, facts and names as of NIfTI files."""
    config, root = nnunet_folder(tmp_path)
    completion.complete(config.data)
    before = cache.prepare(config)
    facts = fingerprint.of_training(config.data)
    for path in root.glob("*Tr/*.nii.gz"):
        image = SimpleITK.ReadImage(str(path))
        SimpleITK.WriteImage(image, str(path.with_name(path.name.replace(".nii.gz", ".mha"))))
        path.unlink()
    description = root / "dataset.json"
    description.write_text(description.read_text().replace(".nii.gz", ".mha"))
    after = cache.prepare(config)
    assert after.splits == before.splits
    for case in (*before.splits.labelled, *before.splits.val):
        ours, theirs = before.volume(case), after.volume(case)
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.label, theirs.label)
    rows = before.rows(before.splits.train)
    np.testing.assert_array_equal(before.images(rows), after.images(rows))
    np.testing.assert_array_equal(before.labels(rows), after.labels(rows))
    assert str(fingerprint.of_training(config.data)) == str(facts)
    found = predict.find(root / "imagesTr", tmp_path / "out", False, 1)
    assert "mine_003.mha" in found
