"""Scans and arrays labelled by a finished run."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from cgs_jax import predict
from cgs_jax.data.grid import upsampled_labels
from cgs_jax.data.nifti import read_nifti
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime.errors import UserError
from runs import command, start


def test_predict_keeps_grid_header_and_name(trained, scans, tmp_path):
    workdir, _ = trained
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    source = nib.load(scans / "scans" / "Patient_06" / "Patient_06.nii.gz")
    nib.save(source, inputs / "a.nii.gz")
    turned = source.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt("SRA")
        )
    )
    turned.header.set_xyzt_units("mm", "sec")
    turned.header["descrip"] = b"turned"
    nib.save(turned, inputs / "b.nii")
    odd = np.asarray(source.dataobj)[:17, :11, :, None].astype(np.float32)
    tilt = nib.eulerangles.euler2mat(0.1, 0.2, 0.05) @ np.diag([1.5, 2, 3])
    nib.save(nib.Nifti1Image(odd, nib.affines.from_matvec(tilt, [5, 6, 7])), inputs / "c.nii.gz")
    line = command(scans, workdir, program="predict")
    line += ["--input", str(inputs), "--output", str(tmp_path / "labels")]
    done = start(line)
    assert done.returncode == 0, done.stderr
    for name in ("a.nii.gz", "b.nii", "c.nii.gz"):
        image, label = nib.load(inputs / name), nib.load(tmp_path / "labels" / name)
        assert label.shape == image.shape
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(label.affine, image.affine)
        for key in ("qform_code", "sform_code", "pixdim", "xyzt_units", "descrip", "quatern_b"):
            np.testing.assert_array_equal(label.header[key], image.header[key], key)
    # the same anatomy stored another way gets the same labels
    first = nib.as_closest_canonical(nib.load(tmp_path / "labels" / "a.nii.gz"))
    second = nib.as_closest_canonical(nib.load(tmp_path / "labels" / "b.nii"))
    np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    again = start(line)
    assert again.returncode == 1
    assert "a.nii.gz exists; choose another --output or give --overwrite" in again.stderr
    assert start([*line, "--overwrite"]).returncode == 0
    with pytest.raises(UserError, match="would replace the input"):
        predict.predict([workdir], inputs, inputs, overwrite=True)
    (inputs / "b.nii").write_bytes(b"damaged")
    (tmp_path / "labels" / "c.nii.gz").unlink()
    with pytest.raises(UserError, match=r"b.nii is not a whole scan.*; 2 others are written to"):
        predict.predict([workdir], inputs, tmp_path / "labels", overwrite=True)
    assert (tmp_path / "labels" / "c.nii.gz").exists()
    _check_resume(workdir, inputs, tmp_path / "labels")
    with pytest.raises(UserError, match="no such file or folder"):
        predict.predict([workdir], tmp_path / "nothing", tmp_path / "labels")
    with pytest.raises(UserError, match="holds no run"):
        predict.predict([tmp_path], inputs, tmp_path / "new")
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    with pytest.raises(UserError, match="can not write to --output"):
        predict.predict([workdir], inputs, blocked / "labels")


def _check_resume(workdir, inputs, labels):
    """After an interruption what is there stays, and the rest comes."""
    expected = (labels / "c.nii.gz").read_bytes()
    (labels / "c.nii.gz").unlink()
    (labels / "a.nii.gz").write_bytes(b"stays")
    (inputs / "b.nii").unlink()
    assert predict.predict([workdir], inputs, labels, resume=True) == [labels / "c.nii.gz"]
    assert (labels / "c.nii.gz").read_bytes() == expected
    assert (labels / "a.nii.gz").read_bytes() == b"stays"
    assert predict.predict([workdir], inputs, labels, resume=True) == []
    with pytest.raises(UserError, match="--overwrite and --resume contradict each other"):
        predict.predict([workdir], inputs, labels, overwrite=True, resume=True)


def test_arrays_in_arrays_out(trained, scans, tmp_path):
    """Three lines of Python give what `predict` writes."""
    workdir, path = trained[0], scans / "scans" / "Patient_06" / "Patient_06.nii.gz"
    scan = read_nifti(path, "axial")
    predictor = Predictor.restore(workdir)
    labels = predictor.segment(scan.array, scan.spacing)
    assert (labels.dtype, labels.shape) == (np.uint8, scan.array.shape)
    (written,) = predict.predict([workdir], path, tmp_path)
    np.testing.assert_array_equal(scan.to_stored(labels), np.asarray(nib.load(written).dataobj))
    scores = predictor.scores(scan.array)
    assert scores.shape == (5, 32, 32, 5)
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(upsampled_labels(scores, *labels.shape[1:]), labels)
    before = scan.array[::2, :11].astype(np.float64)  # of another shape and kind, and left as it is
    given = before.copy()
    assert predictor.segment(given).shape == given.shape
    np.testing.assert_array_equal(given, before)
    for array, message in (
        (scan.array[0], r"the array has shape \(20, 20\); volumes are \[1, D, H, W\]"),
        (scan.array[:0], r"the array has shape \(0, 20, 20\); volumes are \[1, D, H, W\]"),
        (np.full((1, 4, 4), np.nan), "the array has 16 voxels that are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            predictor.segment(array)
    for spacing in ((1.5, 1.5), (3, np.nan, 1), (3, 0, 1), (3, -1, 1), "abc"):
        with pytest.raises(UserError, match="spacing=.*: give millimetres along D, H and W"):
            predictor.segment(scan.array, spacing)
    with pytest.raises(UserError, match="unknown option 'window_size' of prediction; there are: "):
        Predictor.restore([workdir], {"window_size": 3})
    with pytest.raises(UserError, match="window=31 does not divide by 2"):
        Predictor.restore([workdir], {"window": 31})
    with pytest.raises(UserError, match="an option of prediction has another type: .*window"):
        Predictor.restore([workdir], {"window": "16"})
    in_windows = Predictor.restore(workdir, {"window": 16, "upsample": "nearest"})
    assert in_windows.config.window == 16
    assert (in_windows.segment(scan.array) == labels).mean() > 0.8


def test_names_that_may_be_mistaken(trained, scans, tmp_path, capsys):
    """A second channel of a run that takes one, and endings in capitals."""
    workdir, source = trained[0], scans / "scans" / "Patient_06" / "Patient_06.nii.gz"
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("new_0000.nii.gz", "new_0001.nii.gz", "other_0002.nii.gz"):
        shutil.copy(source, inputs / name)
    written = predict.predict([workdir], inputs, tmp_path / "labels")
    assert sorted(path.name for path in written) == [
        "new.nii.gz",
        "new_0001.nii.gz",
        "other_0002.nii.gz",
    ]
    printed = capsys.readouterr().out
    assert printed.count("WARNING") == 1
    assert "WARNING: new_0001.nii.gz is segmented as a scan of its own: the run has one" in printed
    (inputs / "new_0001.nii.gz").rename(inputs / "new_0001.NII.GZ")
    with pytest.raises(UserError, match=r"_0001.NII.GZ: write its ending in small letters, .nii"):
        predict.predict([workdir], inputs, tmp_path / "more")


def test_prediction_scores_as_the_evaluation_says(trained, scans, tmp_path):
    """Labels written as NIfTI against the ground truth give the Dice of summary.json."""
    workdir, _ = trained
    cases = json.loads((workdir / "summary.json").read_text())["test"]["cases"]
    case = max(cases, key=lambda name: cases[name]["heart"]["dice"])
    source = scans / "scans" / case
    written = predict.predict([workdir], source / f"{case}.nii.gz", tmp_path)
    label = np.asarray(nib.load(written[0]).dataobj)
    truth = np.asarray(nib.load(source / "GT.nii.gz").dataobj)
    assert cases[case]["heart"]["dice"] > 0.3
    for i, organ in enumerate(("esophagus", "heart", "trachea", "aorta"), 1):
        total = (label == i).sum() + (truth == i).sum()
        dice = 2 * ((label == i) & (truth == i)).sum() / total if total else None
        assert dice == pytest.approx(cases[case][organ]["dice"])
