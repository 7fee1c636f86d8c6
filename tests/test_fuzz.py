"""Hundreds of damaged files: each is one clear line or a right result, and takes no other along."""

import gzip
import json
import os
import re

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict

from cgs_jax import predict
from cgs_jax.data import cache
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime import run_folder
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from layouts import nnunet_folder


def nifti(rng, shape=(12, 10, 4), dtype=np.int16, affine=None):
    array = rng.integers(-500, 500, shape).astype(dtype)
    return nib.Nifti1Image(array, np.diag([-1.0, -1, 3, 1]) if affine is None else affine)


def header(**fields):
    """A damaged header field of an otherwise good file."""

    def damage(data):
        image = bytearray(data)
        types = nib.Nifti1Header.template_dtype
        for name, value in fields.items():
            dtype, offset = types.fields[name][:2]
            image[offset : offset + dtype.itemsize] = np.array(value, dtype.base).tobytes()
        return bytes(image)

    return damage


DAMAGES = {
    "empty": lambda data: b"",
    "no_header": lambda data: b"not a scan" * 60,
    "header_alone": lambda data: data[:348],
    "half": lambda data: data[: len(data) // 2],
    "one_byte_short": lambda data: data[:-1],
    "huge": header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
    "zero_sized": header(dim=[3, 0, 10, 4, 1, 1, 1, 1]),
    "negative_size": header(dim=[3, -12, 10, 4, 1, 1, 1, 1]),
    "five_axes": header(dim=[5, 12, 10, 2, 1, 2, 1, 1]),
    "no_axes": header(dim=[0, 12, 10, 4, 1, 1, 1, 1]),
    "unknown_type": header(datatype=7),
    "wrong_type": header(datatype=64, bitpix=64),
    "colours": header(datatype=128, bitpix=24),
    "complex": header(datatype=32, bitpix=64),
    "nan_affine": header(srow_x=[np.nan, 0, 0, 0]),
    "infinite_affine": header(srow_y=[0, np.inf, 0, 0]),
    "flat_affine": header(srow_z=[0, 0, 0, 0]),
    "nan_spacing": header(pixdim=[1, np.nan, 1, 1, 1, 1, 1, 1]),
    "negative_spacing": header(pixdim=[1, -1, 1, 3, 1, 1, 1, 1]),
    "zero_spacing": header(pixdim=[1, 0, 1, 3, 1, 1, 1, 1]),
    "damaged_qform": header(qform_code=1, quatern_b=0.9, quatern_c=0.9, quatern_d=0.9),
    "damaged_qform_alone": header(qform_code=1, sform_code=0, quatern_b=5, quatern_c=5),
    "nan_slope": header(scl_slope=np.nan, scl_inter=np.nan),
    "infinite_slope": header(scl_slope=np.inf, scl_inter=0),
    "offset_behind_the_end": header(vox_offset=1e9),
    "negative_offset": header(vox_offset=-100),
    "magic": header(magic=b"xxx"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """300 files, and which of them are good."""
    folder, rng = tmp_path_factory.mktemp("fuzz") / "scans", np.random.default_rng(0)
    folder.mkdir()
    good = {f"good_{i}.nii.gz" for i in range(3)}
    for name in good:
        nib.save(nifti(rng), folder / name)
    for name, damage in DAMAGES.items():
        for ending, packed in ((".nii", bytes), (".nii.gz", gzip.compress)):
            (folder / f"{name}{ending}").write_bytes(packed(damage(nifti(rng).to_bytes())))
    special = {
        "nan_voxels": nifti(rng, dtype=np.float32),
        "float64": nifti(rng, dtype=np.float64),
        "uint8": nifti(rng, dtype=np.uint8),
        "one_voxel": nifti(rng, (1, 1, 1)),
        "one_slice": nifti(rng, (12, 10, 1)),
        "two_axes": nifti(rng, (12, 10)),
        "four_axes": nifti(rng, (12, 10, 4, 2)),
        "time_axis_of_one": nifti(rng, (12, 10, 4, 1)),
        "constant": nib.Nifti1Image(np.full((12, 10, 4), 7, np.int16), np.eye(4)),
        "sheared": nifti(
            rng, affine=np.array([[1, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
        ),
    }
    special["nan_voxels"].get_fdata()
    special["nan_voxels"] = nib.Nifti1Image(np.full((12, 10, 4), np.nan, np.float32), np.eye(4))
    for name, image in special.items():
        nib.save(image, folder / f"{name}.nii.gz")
    packed = gzip.compress(nifti(rng).to_bytes())
    (folder / "checksum.nii.gz").write_bytes(packed[:-8] + b"\0\0\0\0" + packed[-4:])
    (folder / "gz_cut.nii.gz").write_bytes(packed[:-20])
    (folder / "not_packed.nii.gz").write_bytes(nifti(rng).to_bytes())
    (folder / "packed.nii").write_bytes(packed)
    (folder / "loop.nii.gz").symlink_to(folder / "loop.nii.gz")
    (folder / "dangling.nii.gz").symlink_to(folder / "nowhere")
    (folder / "a_folder.nii.gz").mkdir()
    (folder / os.fsdecode(b"caf\xe9.nii.gz")).write_bytes(packed)
    count = len(list(folder.iterdir()))
    for i in range(count, 300):  # bytes of the header flipped, or cut anywhere
        data = bytearray(nifti(rng).to_bytes())
        for at in rng.integers(0, 352, rng.integers(1, 4)):
            data[at] ^= 1 << int(rng.integers(8))
        data = data if i % 3 else data[: rng.integers(len(data))]
        ending, pack = ((".nii", bytes), (".nii.gz", gzip.compress))[i % 2]
        (folder / f"random_{i}{ending}").write_bytes(pack(bytes(data)))
    return folder, good | {"one_voxel.nii.gz", "one_slice.nii.gz", "float64.nii.gz", "uint8.nii.gz"}


@pytest.mark.parametrize("resampled", [False, True])
def test_damaged_scans(trained, damaged, tmp_path, monkeypatch, resampled):
    """`resampled`: to millimetres, by what the damaged headers say, and seen through windows."""
    folder, good = damaged
    if resampled:
        config = ConfigDict(run_folder.load(trained[0])[0])
        with config.data.ignore_type():
            config.data.update(spacing=1.5, slice_spacing=2.0, patch=16, depth=4)
        config.window = 0
        even = lambda images: np.zeros((*images.shape[:-1], 1 + len(config.data.classes)))  # noqa: E731
        predictor = Predictor(even, config)
        monkeypatch.setattr(Predictor, "restore", lambda *_: predictor)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 300
    with pytest.raises(UserError) as caught:
        predict.predict([trained[0]], folder, tmp_path / "out")
    message = str(caught.value)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert good <= written
    for name in names - written:
        assert re.search(rf"/{re.escape(name)}(?!\.gz)", message), name
    for name in written:
        source, label = nib.load(folder / name), nib.load(tmp_path / "out" / name)
        assert label.shape == source.shape, name
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_allclose(label.affine, source.affine, err_msg=name)
    for name in (
        "checksum.nii.gz",
        "nan_affine.nii",
        "huge.nii.gz",
        "loop.nii.gz",
        "gz_cut.nii.gz",
    ):
        assert name not in written
    assert "\n" not in message


JSONS = [
    "",
    "{",
    "[" * 100_000,
    "[]",
    "null",
    "3",
    '"text"',
    '{"labels": null}',
    '{"labels": []}',
    '{"labels": {}}',
    '{"labels": {"background": 0}}',
    '{"labels": {"background": 0, "liver": 2}}',
    '{"labels": {"background": 0, "liver": -1}}',
    '{"labels": {"background": 0, "liver": "one"}}',
    '{"labels": {"background": 0, "liver": 1.5}}',
    '{"labels": {"background": 0, "liver": true}}',
    '{"labels": {"background": 0, "liver": 1, "spleen": 1}}',
    '{"labels": {"background": 0, "liver": [1, "2"], "tumour": 2}}',
    '{"labels": {"0": "background", "1": 5}}',
    '{"labels": {"0": "background", "one": "liver"}}',
    '{"labels": {"background": 0, "liver": 1}, "file_ending": ".xyz"}',
    '{"labels": {"background": 0, "liver": 1}, "file_ending": 3}',
    '{"labels": {"background": 0, "liver": 1}, "channel_names": 5}',
    '{"labels": {"background": 0, "liver": 1}, "channel_names": {}}',
    '{"labels": {"background": 0, "liver": 1}, "channel_names": ["a", "b"]}',
    '{"labels": {"background": 0, "ignore": 2, "liver": 2}}',
    '\ufeff{"labels": {"background": 0, "liver": 1}}',
]


@pytest.mark.parametrize("text", JSONS)
def test_damaged_descriptions(tmp_path, text):
    """The scans have labels 0 to 2, so none of these fits; what is wrong is said of a file."""
    config, root = nnunet_folder(tmp_path, cases=8)
    (root / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset\.json|labelsTr|imagesTr|_000\d"):
        cache.prepare(resolve(config))


def test_a_description_that_is_no_text(tmp_path):
    config, root = nnunet_folder(tmp_path, cases=8)
    (root / "dataset.json").write_bytes(json.dumps({"labels": {"café": 1}}).encode() + b"\xff\xfe")
    with pytest.raises(UserError, match=r"dataset\.json"):
        resolve(config)
