"""Scans as they are stored: orientation, units, and what a header tells."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict

from cgs_jax.data import nifti
from cgs_jax.data.nifti import read_nifti
from cgs_jax.runtime.errors import UserError
from layouts import save


def test_orientation_round_trip(tmp_path):
    """A scan stored in any orientation is read alike, and labels go back to its own axes."""
    array = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16)
    ras = nib.Nifti1Image(array, np.diag([1.0, 2, 3, 1]))
    nib.save(ras, tmp_path / "ras.nii.gz")
    reference = read_nifti(tmp_path / "ras.nii.gz", "axial")
    np.testing.assert_array_equal(reference.array, array.transpose(2, 1, 0))
    assert reference.spacing == (3, 2, 1)
    for codes in ("LPS", "SAR", "PIL", "ASL"):
        target = nib.orientations.axcodes2ornt(codes)
        turned = ras.as_reoriented(
            nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target)
        )
        nib.save(turned, tmp_path / "turned.nii.gz")
        scan = read_nifti(tmp_path / "turned.nii.gz", "axial")
        np.testing.assert_array_equal(scan.array, reference.array)
        assert scan.spacing == reference.spacing
        np.testing.assert_array_equal(scan.to_stored(scan.array), np.asarray(turned.dataobj))
    assert read_nifti(tmp_path / "ras.nii.gz", "coarsest").array.shape == (6, 5, 4)
    assert read_nifti(tmp_path / "ras.nii.gz", "coronal").array.shape == (5, 6, 4)
    save(tmp_path / "sagittal.nii", array, np.diag([5.0, 1, 1, 1]))
    assert read_nifti(tmp_path / "sagittal.nii", "coarsest").array.shape == (4, 6, 5)


def test_voxels_are_as_large_as_the_affine_says(tmp_path):
    """Tools that write the affine alone leave other sizes in pixdim."""
    affine = np.array([[0, 0, 2.5, 0], [0.7, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 1]])
    raw = bytearray(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine).to_bytes())
    raw[80:92] = np.ones(3, np.float32).tobytes()
    (tmp_path / "scan.nii").write_bytes(raw)
    assert nib.load(tmp_path / "scan.nii").header.get_zooms() == (1, 1, 1)
    read = read_nifti(tmp_path / "scan.nii", "coarsest")
    assert read.array.shape == (5, 4, 6)
    assert read.spacing == pytest.approx((5, 0.7, 2.5))


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3), ("mm", 1)])
def test_other_units_become_millimetres(tmp_path, unit, factor):
    affine = np.diag([0.7 * factor, 0.7 * factor, 5 * factor, 1])
    scan = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    scan.header.set_xyzt_units(unit, "sec")
    nib.save(scan, tmp_path / "scan.nii")
    read = read_nifti(tmp_path / "scan.nii", "axial")
    assert read.spacing == pytest.approx((5, 0.7, 0.7))
    np.testing.assert_allclose(read.corners()[-1] - read.corners()[0], [0.7 * 3, 0, 0], atol=1e-6)


def test_places_are_compared_in_millimetres(tmp_path):
    """Voxels of 500 micrometres: a label that is half a voxel off lies elsewhere, one that is a
    micrometre off does not."""
    scan = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([500, 500, 500, 1]))
    scan.header.set_xyzt_units("micron", "sec")
    data = ConfigDict({"slicing": "axial", "trust_shapes": False})
    nib.save(scan, tmp_path / "scan.nii")

    def read_label(off):
        affine = np.diag([500.0, 500, 500, 1])
        affine[0, 3] = off
        label = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), affine, scan.header)
        nib.save(label, tmp_path / "label.nii")
        paths = tmp_path / "label.nii", tmp_path / "scan.nii"
        return nifti.read_label(*paths, read_nifti(paths[1], "axial"), data)

    assert read_label(1).shape == (4, 4, 4)
    with pytest.raises(UserError, match="lies up to 0.3 mm off"):
        read_label(300)


def test_the_coarsest_axis_of_a_microscope(tmp_path):
    scan = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([2.0, 0.5, 0.5, 1]))
    scan.header.set_xyzt_units("micron", "sec")
    nib.save(scan, tmp_path / "scan.nii")
    assert read_nifti(tmp_path / "scan.nii", "coarsest").spacing == pytest.approx(
        (2e-3, 5e-4, 5e-4)
    )


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_header_tells_what_the_whole_file_tells(name, tmp_path):
    path = tmp_path / name
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, -3, 2], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 1), np.int16), affine), path)
    whole, header = (read_nifti(path, "axial", values) for values in (True, False))
    assert whole.array.shape == header.array.shape
    assert whole[1:4] == header[1:4]
    np.testing.assert_array_equal(whole.corners(), header.corners())
    assert not header.array.any()
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if name.endswith(".gz") else raw
    huge = raw[:42] + np.int16(30000).tobytes() + raw[44:]  # its first side
    path.write_bytes(gzip.compress(huge) if name.endswith(".gz") else huge)
    for values in (True, False):
        with pytest.raises(UserError, match=f"{name} is not a whole scan.*header says"):
            read_nifti(path, "axial", values)
