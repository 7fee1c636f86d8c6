"""Reading, splitting, caching and streaming."""

import gzip
import json
import pathlib
import sys

import h5py
import nibabel as nib
import numpy as np
import pytest
from absl import flags
from layouts import lists, nnunet_folder, save
from ml_collections import config_flags
from steps import tiny

from cgs_jax.data import cache, case_lists, completion, streams
from cgs_jax.data.grid import Grid, resize
from cgs_jax.data.layouts import acdc as acdc_layout
from cgs_jax.data.layouts import nnunet as nnunet_layout
from cgs_jax.data.layouts import segthor as segthor_layout
from cgs_jax.data.layouts import synapse as synapse_layout
from cgs_jax.data.nifti import read_nifti
from cgs_jax.data.streams import Stream
from cgs_jax.data.volume import Volume, normalise
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from configs import acdc, nnunet, segthor, synapse

STREAMS = {"labelled": Stream("labelled", True, 4), "unlabelled": Stream("unlabelled", False, 3)}


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


def test_normalise():
    image = np.array([-1000.0, -400, 0, 400, 3000], np.float32)
    np.testing.assert_allclose(normalise(image, (-400, 400)), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(normalise(image, "minmax"), [0, 0.15, 0.25, 0.35, 1])
    assert np.isfinite(normalise(np.zeros(3, np.float32), "minmax")).all()
    for wrong in ("zscore", (400, -400), "(400", (1.0, 2.0, 3.0), (float("nan"), 3)):
        with pytest.raises(UserError, match="give .low, high., minmax or percentile"):
            normalise(image, wrong)


def everything(data):
    """Images and labels of all training slices."""
    rows = data.rows(data.splits.train)
    return data.images(rows), data.labels(rows)


@pytest.fixture
def reads(monkeypatch):
    """Names of the cases that the layouts read, as they are read."""
    seen = []
    for layout in (segthor_layout, nnunet_layout):

        def read(case, data, read=layout.read):
            seen.append(case.name)
            return read(case, data)

        monkeypatch.setattr(layout, "read", read)
    return seen


def test_prepared_slices_and_volumes(thorax):
    config, root = thorax
    data = cache.prepare(config)
    images, labels = everything(data)
    assert images.shape == (18, 16, 16, 1)
    assert labels.shape == (18, 16, 16)
    np.testing.assert_array_equal(data.rows(["Patient_02"]), range(6, 12))
    assert (labels[12:] == cache.NO_LABEL).all()  # the image-only patient
    assert labels[:12].max() == 4
    assert data.volume("Patient_03").label is None
    volume = data.volume("Patient_02")  # slices are those of the volume, resized
    np.testing.assert_array_equal(images[6:12, ..., 0], resize(volume.image[0], 16, 16))
    np.testing.assert_array_equal(labels[6:12], resize(volume.label, 16, 16))
    volume = data.volume("Patient_05")
    assert volume.image.shape == (1, 6, 24, 24)
    truth = np.asarray(nib.load(root / "Patient_05" / "GT.nii.gz").dataobj)
    # stored LPS, read RAS
    np.testing.assert_array_equal(volume.label, truth[::-1, ::-1].transpose(2, 1, 0))
    assert volume.spacing == pytest.approx((176 / 6, 380 / 24, 380 / 24))


def test_cache_knows_its_sources(thorax, reads):
    config, root = thorax
    cache.prepare(config)
    assert len(reads) == 5
    cache.prepare(config)
    assert len(reads) == 5
    config.data.size = 32
    cache.prepare(config)
    assert len(reads) == 10
    config.data.size = 16
    scan = root / "Patient_02" / "Patient_02.nii.gz"
    scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes()), mtime=1))
    cache.prepare(config)
    assert reads[10:] == ["Patient_02"]
    (root / "Patient_01" / "GT.nii.gz").touch()
    cache.prepare(config)
    assert reads[11:] == ["Patient_01"]


def test_other_splits_prepare_nothing(thorax, reads):
    config, root = thorax
    before = everything(cache.prepare(config))
    reads.clear()
    names = [f"Patient_0{i}" for i in (5, 2, 3, 4, 1)]
    lists(root.parent / "lists", train=names[:3], val=names[3:4], test=names[4:])
    other = cache.prepare(config)
    assert not reads
    for mine, its in zip(before, everything(other), strict=True):
        np.testing.assert_array_equal(its[6:], mine[6:])  # Patient_02 and Patient_03
    assert other.volume("Patient_01").image.shape == (1, 6, 24, 24)


def test_one_more_scan_prepares_only_that_one(tmp_path, reads):
    config, root = nnunet_folder(tmp_path)
    completion.complete(config.data)
    cache.prepare(config)
    assert len(reads) == 12
    save(root / "imagesTr" / "mine_100_0000.nii.gz", np.zeros((9, 8, 4), np.float32))
    assert len(cache.prepare(config).splits.train) == 10
    assert reads[12:] == ["mine_100"]


def test_broken_off_preparation_is_not_taken_for_whole(thorax, monkeypatch, reads):
    config, root = thorax
    rename, renamed = cache.pathlib.Path.rename, []

    def breaks(*paths):
        renamed.append(paths)
        if len(renamed) == 3:
            raise KeyboardInterrupt
        return rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(cache.pathlib.Path, "rename", breaks)
        with pytest.raises(KeyboardInterrupt):
            cache.prepare(config)
    assert len(list((root / "cgs_cache").iterdir())) == 2
    assert everything(cache.prepare(config))[0].shape == (18, 16, 16, 1)
    assert reads == [f"Patient_0{i}" for i in (1, 2, 3, 3, 4, 5)]


def test_many_cases_share_few_open_files(thorax, monkeypatch):
    config, _ = thorax
    expected = everything(cache.prepare(config))
    monkeypatch.setattr(cache, "MAPPED", 1)
    for few, all_of_them in zip(everything(cache.prepare(config)), expected, strict=True):
        np.testing.assert_array_equal(few, all_of_them)


def test_cache_that_can_not_be_written(thorax, tmp_path):
    config, _ = thorax
    (tmp_path / "a_file").write_text("")
    config.data.cache = str(tmp_path / "a_file")
    with pytest.raises(UserError, match="can not write to .*a_file .*--config.data.cache"):
        cache.prepare(config)


def test_stream_is_a_function_of_seed_and_step(thorax):
    config, _ = thorax
    data = cache.prepare(config)
    whole, rest = (streams.batches(data, config, STREAMS, start) for start in (0, 10))
    assert len(whole) == 40
    assert len(rest) == 30
    for i in (0, 7, 29):
        for name in STREAMS:
            np.testing.assert_array_equal(rest[i][name]["image"], whole[i + 10][name]["image"])
    config.seed = 1
    other = streams.batches(data, config, STREAMS, 0)
    assert any(
        (other[i]["labelled"]["image"] != whole[i]["labelled"]["image"]).any() for i in (0, 1)
    )
    loaded = list(streams.prefetched(rest, lambda batch: batch))
    assert len(loaded) == 30
    np.testing.assert_array_equal(loaded[5]["labelled"]["label"], rest[5]["labelled"]["label"])


def test_order_of_the_slices_stays(thorax):
    """It decides the results of every seed, so no change may touch it."""
    config, _ = thorax
    data = cache.prepare(config)
    row = {x.tobytes(): i for i, x in enumerate(everything(data)[0])}
    batches = streams.batches(data, config, STREAMS, 0)
    for step, labelled, unlabelled in (
        (0, [4, 11, 2, 6], [15, 12, 16]),
        (7, [8, 11, 6, 3], [14, 13, 15]),
        (39, [4, 10, 7, 3], [15, 12, 17]),
    ):
        batch = batches[step]
        assert [row[x.tobytes()] for x in batch["labelled"]["image"]] == labelled
        assert [row[x.tobytes()] for x in batch["unlabelled"]["image"]] == unlabelled
        np.testing.assert_array_equal(batch["labelled"]["label"], data.labels(np.array(labelled)))


def test_a_method_may_ask_for_any_streams(thorax):
    config, _ = thorax
    two = {"exemplar": Stream("labelled", True, 1), "images": Stream("labelled", False, 2)}
    batch = streams.batches(cache.prepare(config), config, two, 0)[0]
    shapes = {name: {key: x.shape for key, x in part.items()} for name, part in batch.items()}
    image, label = (16, 16, 1), (16, 16)
    assert shapes == {
        "exemplar": {"image": (1, *image), "aspect": (1,), "label": (1, *label)},
        "images": {"image": (2, *image), "aspect": (2,)},
    }


def test_every_slice_once_an_epoch_and_no_label_in_the_unlabelled_stream(thorax):
    config, _ = thorax
    data = cache.prepare(config)
    images, _ = everything(data)
    batches = streams.batches(data, config, STREAMS, 0)
    assert set(batches[0]["unlabelled"]) == {"image", "aspect"}
    labelled = np.concatenate([batches[i]["labelled"]["image"] for i in range(6)])
    for epoch in (labelled[:12], labelled[12:]):  # 12 slices, 4 a step
        assert {x.tobytes() for x in epoch} == {x.tobytes() for x in images[:12]}
    unlabelled = np.concatenate([batches[i]["unlabelled"]["image"] for i in range(2)])
    assert {x.tobytes() for x in unlabelled} == {x.tobytes() for x in images[12:]}


def test_labels_may_be_stored_otherwise_than_their_image(thorax):
    """As floats off by rounding, and in another orientation that its own affine tells."""
    config, root = thorax
    _, expected = everything(cache.prepare(config))
    path = root / "Patient_01" / "GT.nii.gz"
    label = nib.as_closest_canonical(nib.load(path))
    save(path, np.asarray(label.dataobj) * np.float32(0.9999999), label.affine)
    np.testing.assert_array_equal(everything(cache.prepare(config))[1], expected)


def test_fewer_labelled_slices_than_the_batch_repeat(thorax):
    config, _ = thorax
    many, one = ({"labelled": Stream("labelled", True, count)} for count in (30, 1))
    batches = streams.batches(cache.prepare(config), config, many, 0)
    assert batches[0]["labelled"]["image"].shape == (30, 16, 16, 1)
    assert len({x.tobytes() for x in batches[0]["labelled"]["image"]}) == 12
    single = streams.batches(cache.prepare(config), config, one, 0)
    assert single[39]["labelled"]["label"].shape == (1, 16, 16)


def test_processes_share_one_global_batch(thorax):
    config, _ = thorax
    data = cache.prepare(config)

    def images(*mine):
        return streams.batches(data, config, STREAMS, 0, *mine)[3]["labelled"]["image"]

    halves = [images(lambda n, i=i: np.array_split(np.arange(n), 2)[i]) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), images())


def test_published_splits():
    for config, sizes, labelled in (
        (acdc.get_config("labelled=3"), (140, 20, 40), 6),
        (acdc.get_config("labelled=7"), (140, 20, 40), 14),
        (segthor.get_config("labelled=3"), (28, 4, 8), 3),
        (segthor.get_config("labelled=6"), (28, 4, 8), 6),
        (synapse.get_config("labelled=4"), (16, 2, 12), 4),
    ):
        folder = case_lists.pathlib.Path(case_lists.__file__).parent / "published"
        names = [
            name
            for path in (folder / config.data.name).glob("*.txt")
            for name in case_lists.read_list(path)
        ]
        cases = {name: case_lists.Case(name, (), ("label",)) for name in names}
        splits = case_lists.split(cases, config.data, seed=0)
        case_lists.check(splits, cases, config.data)
        assert tuple(map(len, splits[:3])) == sizes
        assert len(splits.labelled) == labelled
    patients = {case[:10] for case in case_lists.read_list(folder / "acdc" / "labelled_7.txt")}
    assert patients == {f"patient{p}" for p in ("099", "038", "050", "021", "049", "058", "100")}


def test_random_split_keeps_patients_together():
    data = nnunet.get_config("labelled=3").data
    cases = {
        f"p{i}_frame{f:02d}": case_lists.Case(
            f"p{i}_frame{f:02d}", (), ("label",) if i < 20 else None
        )
        for i in range(30)
        for f in (1, 2)
    }
    splits = case_lists.split(cases, data, seed=0)
    assert [len(part) for part in splits] == [28 + 20, 4, 8, 6]
    assert splits == case_lists.split(cases, data, seed=0)
    assert splits != case_lists.split(cases, data, seed=1)
    patients = [{case.split("_")[0] for case in part} for part in splits[:3]]
    assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]


def test_lists_without_validation_hold_out_patients_with_labels(tmp_path):
    """The published Synapse lists are such: selection must not use the test cases."""
    data = nnunet.get_config("labelled=2").data
    cases = {f"c{i}": case_lists.Case(f"c{i}", (), ("x",) if i < 5 else None) for i in range(9)}
    data.splits = lists(tmp_path, train=[f"c{i}" for i in range(1, 9)], test=["c0"])
    for seed in range(10):
        if seed == 5:
            lists(tmp_path, labelled_2=["c1", "c3"])
        splits = case_lists.split(cases, data, seed)
        case_lists.check(splits, cases, data)
        assert (len(splits.train), len(splits.val), splits.test) == (7, 1, ["c0"])
        assert seed < 5 or splits.labelled == ["c1", "c3"]


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


def test_unlabelled_pool_falls_back_to_the_labelled_images(thorax):
    config, root = thorax
    lists(root.parent / "lists", train=["Patient_01", "Patient_02"])
    data = cache.prepare(config)
    (labelled,), (unlabelled,) = data.source("labelled"), data.source("unlabelled")
    assert labelled.tolist() == unlabelled.tolist() == list(range(12))


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
    batch = streams.batches(data, config, STREAMS, 0)[0]
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [("(-200,400)", (-200, 400)), ("minmax", "minmax"), ((-200.0, 400.0), (-200.0, 400.0))],
)
def test_intensities_are_chosen_on_the_command_line_and_in_python(value, expected, monkeypatch):
    for name, module in (("segthor", segthor), ("nnunet", nnunet)):
        config = module.get_config()
        if isinstance(value, str):
            values = flags.FlagValues()
            path = pathlib.Path(module.__file__)
            line = ["program", f"--config={path}", f"--config.data.normalise={value}"]
            monkeypatch.setattr(sys, "argv", line)  # there the fields are looked for
            config_flags.DEFINE_config_file("config", flag_values=values)
            values(line)
            config = values["config"].value
        else:
            config.data.normalise = value
        assert config.data.normalise == expected, name


def spaced(tmp_path, spacing=(0.8, 0.4, 2.0)):
    """A disc of 16 mm in scans of 32 x 32 mm whose pixels are high and wide by turns."""
    labels = {"background": 0, "disc": 1}
    config, root = nnunet_folder(tmp_path, labels, cases=8)
    for i, path in enumerate(sorted((root / "imagesTr").iterdir())):
        x, y, z = spacing if i % 2 else (spacing[1], spacing[0], spacing[2])
        at = np.moveaxis(np.mgrid[: round(32 / x), : round(32 / y), :4], 0, -1) * (x, y, z)
        disc = np.hypot(at[..., 0] - 16, at[..., 1] - 16) < 8
        affine = np.diag([x, y, z, 1])
        save(path, (100 * disc).astype(np.float32), affine)
        label = root / "labelsTr" / path.name.replace("_0000", "")
        if label.exists():
            save(label, disc.astype(np.uint8), affine)
    config.data.normalise = "minmax"
    return config, root


def test_a_grid_in_millimetres_shows_all_scans_at_one_scale(tmp_path):
    config, _ = spaced(tmp_path)
    config.data.spacing, config.data.patch = (0.5, 1.0), 16
    data = cache.prepare(resolve(config))
    rows = data.rows(data.splits.labelled)
    for image, label in zip(data.slices("image", rows), data.slices("label", rows), strict=True):
        assert label.shape == image.shape[1:]
        assert abs(label.shape[0] - 64) <= 1  # 32 mm in rows of .5
        assert abs(label.shape[1] - 32) <= 1
        there = np.argwhere(label)
        np.testing.assert_allclose(np.ptp(there, 0) + 1, (32, 16), atol=2)
        assert abs((image[0] > 32768).sum() - (label > 0).sum()) < 0.05 * label.sum()
    assert data.aspects(rows[:2]).tolist() == [0.5, 0.5]
    config.data.spacing = "median"
    found = resolve(config).data.spacing
    assert found == (0.6, 0.6)
    batch = streams.batches(data, resolve(config), two_streams(), 0)[0]["labelled"]
    assert batch["image"].shape == (2, 16, 16, 1)


def two_streams():
    return {"labelled": Stream("labelled", True, 2)}


def test_labels_come_back_to_the_grid_of_the_scan():
    """To millimetres and back; what the windows of a grid say is put together."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        depth, height, width = rng.integers((2, 40, 40), (4, 90, 90))
        spacing = tuple(rng.uniform(0.5, 2, 3))
        centre, y, x = rng.uniform(0.35, 0.65, 2), *np.mgrid[:height, :width]
        label = np.zeros((depth, height, width), np.uint8)
        label[:] = np.hypot(y / height - centre[0], x / width - centre[1]) < 0.25
        config = tiny().data
        config.spacing = (float(rng.uniform(0.5, 1.2)),)
        grid = Grid.of(config)
        there = grid.label(label, spacing)
        back = resize(there, height, width)
        assert 2 * (back & label).sum() / (back.sum() + label.sum()) > 0.95
        config = tiny(**{"window": 16, "data.spacing": config.spacing, "data.patch": 16})
        config.inference, config.eval_batch = "generalist", 4
        predictor = Predictor(lambda x: np.eye(3)[(x[..., 0] > 32768).astype(int)], config)
        image = label[None] * np.uint16(65535)
        ((_, (found,)),) = predictor.labels([("", Volume(image, None, spacing))], predictor.scoring)
        assert 2 * (found & label).sum() / (found.sum() + label.sum()) > 0.95


def test_spacing_that_can_not_be(tmp_path):
    config, _ = spaced(tmp_path)
    config.data.spacing = (1.0,)
    with pytest.raises(UserError, match=r"give data.patch"):
        resolve(config)
    config.data.patch = 16
    for wrong in ("wide", (0.0,), (1.0, 1.0, 1.0), (-1, 1), ("a", "b")):
        config.data.spacing = wrong
        with pytest.raises(UserError, match=r"data.spacing="):
            resolve(config)
    config = acdc.get_config()
    config.data.update(root=str(tmp_path), spacing=(1.0,), patch=16)
    with pytest.raises(UserError, match="voxel size"):
        Grid.of(config.data).shape((10, 10), None)


def test_folds_of_nnunet(tmp_path):
    config, root = nnunet_folder(tmp_path)
    names = [f"mine_{i:03d}" for i in range(9)]
    folds = [{"train": names[:7], "val": names[7:]}, {"train": names[2:], "val": names[:2]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    config.data.fold = 1
    splits = cache.prepare(resolve(config)).splits
    assert splits.test == names[:2]
    assert len(splits.val) == 1
    assert {*splits.val, *splits.labelled} == set(names[2:])
    assert set(splits.train) - set(splits.labelled) == {f"mine_{i:03d}" for i in (9, 10, 11)}
    for sort, folder in (("images", "imagesTs"), ("labels", "labelsTs")):
        ending = "_0000.nii.gz" if sort == "images" else ".nii.gz"
        save(root / folder / f"mine_100{ending}", np.zeros((9, 8, 4), np.float32))
    splits = cache.prepare(resolve(config)).splits
    assert (splits.test, splits.val) == (["mine_100"], names[:2])
    config.data.fold = 2
    with pytest.raises(UserError, match=r"data.fold=2: .*splits_final.json has no such fold"):
        cache.prepare(resolve(config))
