"""Where scans of each data set lie, and how they are read."""

import json

import h5py
import nibabel as nib
import numpy as np
import pytest

from cgs_jax.data import cache, completion, streams, tasks
from cgs_jax.data.case_lists import Splits
from cgs_jax.data.grid import resize
from cgs_jax.data.layouts import acdc as acdc_layout
from cgs_jax.data.layouts import synapse as synapse_layout
from cgs_jax.data.volume import normalise
from cgs_jax.runtime.errors import UserError
from configs import acdc, segthor, synapse
from layouts import STREAMS, everything, nnunet_folder, save


def test_acdc_layouts_agree(tmp_path):
    """The h5 layout and the challenge's NIfTI lead to the same arrays under the same names."""
    rng = np.random.default_rng(0)
    image, label = rng.random((12, 20, 18), np.float32), rng.integers(0, 4, (12, 20, 18))
    slices = tmp_path / "h5" / "data" / "slices"
    slices.mkdir(parents=True)
    for case in ("patient001_frame01", "patient001_frame02", "patient002_frame01"):
        for i in range(12):
            with h5py.File(slices / f"{case}_slice_{i + 1}.h5", "w") as file:
                file["image"], file["label"] = image[i], label[i].astype(np.uint8)
    with h5py.File(tmp_path / "h5" / "data" / "patient003_frame01.h5", "w") as file:
        file["image"], file["label"] = image, label.astype(np.uint8)
    for name in ("patient001_frame01", "patient001_frame12", "patient002_frame04"):
        path = tmp_path / "nii" / "training" / name[:10] / f"{name}.nii.gz"
        save(path, image.transpose(2, 1, 0), np.diag([-1.5, -1.5, 10, 1]))
        label_path = path.with_name(f"{name}_gt.nii.gz")
        save(label_path, label.transpose(2, 1, 0).astype(np.uint8), np.diag([-1.5, -1.5, 10, 1]))

    data = acdc.get_config().data
    volumes = {}
    for layout in ("h5", "nii"):
        data.root = str(tmp_path / layout)
        cases = acdc_layout.find(data)
        volumes[layout] = {name: acdc_layout.read(case, data) for name, case in cases.items()}
    assert set(volumes["nii"]) == set(volumes["h5"]) - {"patient003_frame01"}
    for name, volume in volumes["nii"].items():
        np.testing.assert_allclose(volume.image, volumes["h5"][name].image, atol=1e-6)
        np.testing.assert_array_equal(volume.label, label)
    np.testing.assert_array_equal(volumes["h5"]["patient003_frame01"].label, label)
    assert volumes["nii"]["patient001_frame02"].spacing == (10, 1.5, 1.5)


def test_synapse_layouts(tmp_path):

    data = synapse.get_config().data
    rng = np.random.default_rng(0)
    image, label = rng.random((3, 8, 8), np.float32), rng.integers(0, 9, (3, 8, 8))
    for folder in ("train_npz", "test_vol_h5"):
        (tmp_path / "arrays" / folder).mkdir(parents=True)
    for i in range(3):
        path = tmp_path / "arrays" / "train_npz" / f"case0005_slice{i:03d}.npz"
        np.savez(path, image=image[i], label=label[i].astype(np.float32))
    with h5py.File(tmp_path / "arrays" / "test_vol_h5" / "case0008.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
    data.root = str(tmp_path / "arrays")
    for case in synapse_layout.find(data).values():
        volume = synapse_layout.read(case, data)
        np.testing.assert_allclose(volume.image, image[None])  # scaled already: no window
        np.testing.assert_array_equal(volume.label, label)

    raw = np.arange(14).reshape(14, 1, 1) * np.ones((14, 2, 2))
    save(tmp_path / "raw" / "img" / "img0005.nii.gz", 400 * raw / 13 - 125)
    save(tmp_path / "raw" / "label" / "label0005.nii.gz", raw.astype(np.uint8))
    data.root = str(tmp_path / "raw")
    volume = synapse_layout.read(synapse_layout.find(data)["case0005"], data)
    np.testing.assert_allclose(volume.image[0, 0, 0], np.arange(14) / 13, atol=1e-6)
    # BTCV: 1 spleen, 2 right kidney, 3 left kidney, 4 gallbladder, 6 liver, 7 stomach, 8 aorta, 11
    # pancreas
    expected = [0, 7, 4, 3, 2, 0, 5, 8, 1, 0, 0, 6, 0, 0]
    np.testing.assert_array_equal(volume.label[0, 0], expected)


@pytest.mark.parametrize(
    ("config", "files"),
    [
        (synapse, ("Training/img/img0001.nii.gz", "pred/img0001.nii.gz")),
        (segthor, ("Patient_01/Patient_01.nii.gz", "pred/Patient_01/Patient_01.nii.gz")),
        (acdc, ("a/patient001_frame01.nii.gz", "pred/patient001_frame01.nii.gz")),
    ],
)
def test_two_files_of_one_name_are_refused(tmp_path, config, files):
    """One may be a prediction, which would be taken for the scan."""
    data = config.get_config().data
    data.root = str(tmp_path)
    for file in files:
        save(tmp_path / file, np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(UserError, match=f"{files[0]} and .*{files[1]} are both .*0?1"):
        tasks.layout(data).find(data)


def test_nnunet_layout(tmp_path):
    config, root = nnunet_folder(tmp_path)
    completion.complete(config.data)
    assert config.data.classes == ("head", "tail")
    data = cache.prepare(config)
    assert [len(part) for part in data.splits] == [6 + 3, 1, 2, 6]
    assert {"mine_009", "mine_010", "mine_011"} <= set(data.splits.train)
    # a test set of its own is kept apart; without labels it is not used at all
    save(root / "imagesTs" / "mine_100_0000.nii.gz", np.zeros((9, 8, 4), np.float32))
    save(root / "labelsTs" / "mine_100.nii.gz", np.ones((9, 8, 4), np.uint8))
    save(root / "imagesTs" / "mine_101_0000.nii.gz", np.zeros((9, 8, 4), np.float32))
    splits = cache.prepare(config).splits
    assert splits.test == ["mine_100"]
    assert "mine_101" not in splits.train
    config.data.classes = ()
    old = {"labels": {"0": "background", "1": "head", "2": "tail"}}
    (root / "dataset.json").write_text(json.dumps(old))
    completion.complete(config.data)
    assert config.data.classes == ("head", "tail")


def test_nnunet_cases_may_lie_elsewhere(tmp_path, monkeypatch):
    """`dataset` in dataset.json names the files; the same scans are the same cases."""
    config, root = nnunet_folder(tmp_path)
    completion.complete(config.data)
    before = cache.prepare(config)
    monkeypatch.setenv("ARCHIVE", str(tmp_path / "elsewhere"))
    (root / "imagesTr").rename(tmp_path / "elsewhere")
    (root / "labelsTr").rename(root / "own")
    named = {
        case: {"images": [f"$ARCHIVE/{case}_0000.nii.gz"], "label": f"own/{case}.nii.gz"}
        for case in sorted({*before.splits.train, *before.splits.val, *before.splits.test})
    }
    for case in ("mine_009", "mine_010", "mine_011"):
        del named[case]["label"]
    described = json.loads((root / "dataset.json").read_text())

    def write(dataset):
        (root / "dataset.json").write_text(json.dumps(described | {"dataset": dataset}))

    write(named)
    after = cache.prepare(config)
    assert after.splits == before.splits
    assert after.digests() == before.digests()
    case = next(iter(named))
    for files, problem in (
        ({"images": []}, f"images, a list of 1 .* see {case}"),
        ({"label": "own/a.nii.gz"}, f"images, a list of 1 .* see {case}"),
        ({"images": [1]}, f"images, a list of 1 .* see {case}"),
        ("own/a.nii.gz", f"images, a list of 1 .* see {case}"),
        ({"images": ["own/a.nii.gz"]}, f"{case} names .*own/a.nii.gz, which is not there"),
        ({"images": ["dataset.json"]}, "dataset.json, which does not end with .nii.gz"),
    ):
        write(named | {case: files})
        with pytest.raises(UserError, match=problem):
            cache.prepare(config)
    write([])
    with pytest.raises(UserError, match="dataset must map each case"):
        cache.prepare(config)
    write(named)
    save(root / "imagesTs" / f"{case}_0000.nii.gz", np.zeros((9, 8, 4), np.float32))
    with pytest.raises(UserError, match=f"{case} is in dataset.json and in imagesTs"):
        cache.prepare(config)


def test_labels_that_belong_to_no_scan_are_refused(tmp_path):
    """Else their cases would train as unlabelled ones, or not at all."""
    config, root = nnunet_folder(tmp_path)
    completion.complete(config.data)
    label = min((root / "labelsTr").iterdir())
    case = label.name.removesuffix(".nii.gz")
    for name in (f"{case}_0000.nii.gz", "other.nii.gz"):
        wrong = label.rename(root / "labelsTr" / name)
        with pytest.raises(UserError, match=f"{name} belongs to no scan: .*labelsTr/CASE.nii.gz"):
            cache.prepare(config)
        wrong.rename(label)
    label.rename(tmp_path / "away")
    for name in (f"{case}.nii", f"{case}.seg.nrrd", f"{case}.png"):
        (root / "labelsTr" / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"{name} is not read: labels end with .nii.gz"):
            cache.prepare(config)
        (root / "labelsTr" / name).unlink()
    (root / "labelsTr" / f"{case}.json").write_bytes(b"{}")  # what some tools write of a file
    assert not cache.prepare(config).has_label(case)
    label.symlink_to("lost")
    with pytest.raises(UserError, match=f"{label.name} is a link to a file that is not there"):
        cache.prepare(config)
    (tmp_path / "away").replace(label)
    (root / "labelsTs").mkdir(exist_ok=True)
    stray = root / "labelsTs" / "test.nii.gz"
    stray.write_bytes(b"")
    with pytest.raises(UserError, match="labelsTs/test.nii.gz belongs to no scan"):
        cache.prepare(config)
    stray.unlink()
    image = root / "imagesTr" / "more_0000.nii"
    image.write_bytes(b"")
    with pytest.raises(
        UserError, match="more_0000.nii: dataset.json says that files end with .nii.gz"
    ):
        cache.prepare(config)


def test_channels_of_array_files(tmp_path):
    """Where image files have an axis more than their label, it is that of the channels."""
    rng = np.random.default_rng(0)
    image, label = rng.random((2, 3, 8, 6), np.float32) * 9, rng.integers(0, 9, (3, 8, 6))
    slices, volumes = tmp_path / "data" / "slices", tmp_path / "data"
    slices.mkdir(parents=True)
    for i in range(3):
        with h5py.File(slices / f"patient001_frame01_slice_{i}.h5", "w") as file:
            file["image"], file["label"] = image[:, i], label[i]
    with h5py.File(volumes / "patient002_frame01.h5", "w") as file:
        file["image"], file["label"] = image, label
    data = acdc.get_config().data
    data.root = str(tmp_path)
    cases = acdc_layout.find(data)
    assert len(cases) == 2
    for case in cases.values():
        volume = acdc_layout.read(case, data)
        np.testing.assert_array_equal(volume.image, [normalise(x, "minmax") for x in image])
        np.testing.assert_array_equal(volume.label, label)


def test_faulty_slices_are_named(tmp_path, capsys):
    """Files of one slice each: which of them has a wrong label, and which is not there."""
    slices, config = tmp_path / "data" / "slices", acdc.get_config()
    slices.mkdir(parents=True)
    for i in range(1, 5):
        with h5py.File(slices / f"patient001_frame01_slice_{i}.h5", "w") as file:
            file["image"], file["label"] = np.eye(8), np.full((8, 8), 9 if i == 3 else 1)
    for i in (2, 3):
        with h5py.File(tmp_path / "data" / f"patient00{i}_frame01.h5", "w") as file:
            file["image"], file["label"] = np.ones((2, 8, 8)), np.ones((2, 8, 8))
    train, val, test = ([f"patient00{i}_frame01"] for i in (1, 2, 3))
    config.data.root, config.data.size = str(tmp_path), 8
    with pytest.raises(UserError, match="slice_3.h5 has label value 9"):
        cache.prepare(config, Splits(train, val, test, train))
    assert "WARNING" not in capsys.readouterr().out
    (slices / "patient001_frame01_slice_3.h5").unlink()
    prepared = cache.prepare(config, Splits(train, val, test, train))
    told = f"WARNING: slice 3 of patient001_frame01 is not in {slices}; it is passed over"
    assert capsys.readouterr().out.count(told) == 1
    assert prepared.taught() == {config.data.classes[0]}


def test_channels_of_nnunet(tmp_path):
    """A file a channel; each is scaled on its own, and all move together."""
    config, root = nnunet_folder(tmp_path, channel_names={"0": "T1", "1": "T2"})
    completion.complete(config.data)
    assert config.data.channels == 2
    data = cache.prepare(config)
    case = data.splits.labelled[0]
    volume = data.volume(case)
    for i, channel in enumerate(volume.image):
        stored = np.asarray(nib.load(root / "imagesTr" / f"{case}_000{i}.nii.gz").dataobj)
        expected = cache.quantise(normalise(stored.transpose(2, 1, 0), "percentile"))
        np.testing.assert_array_equal(channel, expected)
    assert (volume.image[0] != volume.image[1]).any()
    batch = streams.batches(data, config, STREAMS)[0]
    assert batch["labelled"]["image"].shape == (4, 16, 16, 2)
    images, _ = everything(data)
    whole = images[data.rows([case])]
    np.testing.assert_array_equal(np.moveaxis(whole, -1, 0), resize(volume.image, 16, 16))
    old = {"labels": {"background": 0, "head": 1, "tail": 2}, "modality": {"0": "T1", "1": "T2"}}
    (root / "dataset.json").write_text(json.dumps(old))
    config.data.channels = 0
    completion.complete(config.data)
    assert config.data.channels == 2
    config.data.channels = 1
    with pytest.raises(UserError, match=r"_0000.nii.gz has 2 channel.*--config.data.channels=2"):
        cache.prepare(config)


def test_labels_may_be_stored_otherwise_than_their_image(thorax):
    """As floats off by rounding, and in another orientation that its own affine tells."""
    config, root = thorax
    _, expected = everything(cache.prepare(config))
    path = root / "Patient_01" / "GT.nii.gz"
    label = nib.as_closest_canonical(nib.load(path))
    save(path, np.asarray(label.dataobj) * np.float32(0.9999999), label.affine)
    np.testing.assert_array_equal(everything(cache.prepare(config))[1], expected)
