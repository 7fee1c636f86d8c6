"""Reading and caching."""

import gzip
import json
import os
import pathlib
import sys

import nibabel as nib
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from cgs_jax.data import cache, completion, fingerprint
from cgs_jax.data.fingerprint import Facts
from cgs_jax.data.grid import Grid, resize
from cgs_jax.data.layouts import nnunet as nnunet_layout
from cgs_jax.data.layouts import segthor as segthor_layout
from cgs_jax.data.volume import NO_LABEL, Volume, normalise
from cgs_jax.runtime import threads
from cgs_jax.runtime.errors import UserError
from cgs_jax.scoring import summaries
from cgs_jax.training.resolve import resolve
from configs import nnunet, segthor
from layouts import everything, lists, nnunet_folder, save


def test_median_spacing_has_significant_digits():
    facts = {str(x): Facts((4, 4, 4), (5.0, x, x), None, []) for x in (4e-4, 4.4e-4, 5e-4)}
    assert fingerprint.median(facts, "spacing") == 4.4e-4
    assert fingerprint.median(facts, "slice_spacing") == 5.0


def test_normalise():
    image = np.array([-1000.0, -400, 0, 400, 3000], np.float32)
    np.testing.assert_allclose(normalise(image, (-400, 400)), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(normalise(image, "minmax"), [0, 0.15, 0.25, 0.35, 1])
    assert np.isfinite(normalise(np.zeros(3, np.float32), "minmax")).all()
    percentiles = normalise(np.arange(1001.0), "percentile")  # 5 and 995
    np.testing.assert_allclose(percentiles[[4, 5, 104, 500, 995, 996]], [0, 0, 0.1, 0.5, 1, 1])
    for wrong in ("zscore", (400, -400), "(400", (1.0, 2.0, 3.0), (float("nan"), 3)):
        with pytest.raises(UserError, match="give .low, high., minmax or percentile"):
            normalise(image, wrong)


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
    assert (labels[12:] == NO_LABEL).all()  # the image-only patient
    assert labels[:12].max() == 4
    (unlabelled,) = (root / "cgs_cache").glob("Patient_03_*")
    assert {path.name for path in unlabelled.iterdir()} == {"image_16.npy", "case.json"}
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
    other = {"slicing": "coronal", "normalise": "minmax", "trust_shapes": True}
    for name, value in (other | {"slice_spacing": 2.0, "spacing": 9.0}).items():
        with config.unlocked():
            before, config.data[name] = config.data[name], value
        reads.clear()
        cache.prepare(config)
        assert len(reads) == (4 if name == "trust_shapes" else 5), name  # four have labels
        config.data[name] = before


def test_slices_know_how_much_higher_than_wide_they_were(tmp_path):
    config, _ = nnunet_folder(tmp_path)  # of 8 rows and 9 columns
    data = cache.prepare(resolve(config))
    rows = data.rows(data.splits.train)
    np.testing.assert_allclose(data.aspects(rows), 8 / 9, rtol=1e-6)
    assert len(rows) > 0
    assert data.images(rows).shape[1:3] == (16, 16)


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
    rename = cache.pathlib.Path.rename

    def breaks(*paths):
        if paths[1].name.startswith("Patient_03"):
            raise KeyboardInterrupt
        return rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(cache.pathlib.Path, "rename", breaks)
        patched.setattr(cache, "shuffled", list)
        with pytest.raises(KeyboardInterrupt):
            cache.prepare(config)
    folders = {folder.name.rpartition("_")[0] for folder in (root / "cgs_cache").iterdir()}
    assert {"Patient_01", "Patient_02"} <= folders <= {f"Patient_0{i}" for i in (1, 2, 4, 5)}
    assert everything(cache.prepare(config))[0].shape == (18, 16, 16, 1)
    assert sorted(reads) == [f"Patient_0{i}" for i in (1, 2, 3, 3, 4, 5)]


def test_scans_that_can_not_be_used_are_told_together(thorax, reads, monkeypatch):
    """The others are prepared; where many are wrong, the rest is not tried."""
    config, root = thorax
    scan = root / "Patient_0{}" / "Patient_0{}.nii.gz"
    damaged = [pathlib.Path(str(scan).format(i, i)) for i in (2, 3)]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(whole[0][:300])
    with pytest.raises(UserError, match=f"{damaged[0]}.*; .*{damaged[1]}"):
        cache.prepare(config)
    assert sorted(reads) == [f"Patient_0{i}" for i in (1, 2, 3, 4, 5)]
    for path, contents in zip(damaged, whole, strict=True):
        path.write_bytes(contents)
    reads.clear()
    cache.prepare(config)
    assert sorted(reads) == ["Patient_02", "Patient_03"]
    config.data.size = 32
    monkeypatch.setattr(cache, "MOST_PROBLEMS", 1)
    monkeypatch.setattr(cache, "shuffled", sorted)
    monkeypatch.setattr(threads, "MOST", 1)
    for path in damaged:
        path.write_bytes(whole[0][:300])
    with pytest.raises(UserError) as told:
        cache.prepare(config)
    assert str(damaged[0]) in str(told.value)
    assert str(damaged[1]) not in str(told.value)


def test_a_folder_may_move(thorax, reads, tmp_path):
    """What was prepared in it is found in its new place."""
    config, root = thorax
    before = everything(cache.prepare(config))
    reads.clear()
    config.data.root = str(root.rename(tmp_path / "moved"))
    for mine, its in zip(before, everything(cache.prepare(config)), strict=True):
        np.testing.assert_array_equal(its, mine)
    assert not reads
    config.data.cache = str(tmp_path / "shared")
    cache.prepare(config)
    config.data.root = str(pathlib.Path(config.data.root).rename(root))
    cache.prepare(config)  # a cache of several folders tells them apart
    assert len(reads) == 10


def test_damaged_entries_are_made_anew(thorax, reads):
    """Of an old kill's leftovers nothing stays; what another process may be writing does."""
    config, root = thorax
    expected = everything(cache.prepare(config))
    found = {path.name.rpartition("_")[0]: path for path in (root / "cgs_cache").iterdir()}
    os.truncate(found["Patient_01"] / "image.npy", 100)
    (found["Patient_02"] / "label.npy").unlink()
    (found["Patient_03"] / "case.json").write_text("{")
    old, young = (root / "cgs_cache" / f"unfinished_{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    reads.clear()
    for again, first in zip(everything(cache.prepare(config)), expected, strict=True):
        np.testing.assert_array_equal(again, first)
    assert sorted(reads) == ["Patient_01", "Patient_02", "Patient_03"]
    assert young.exists()
    assert not old.exists()


def test_who_is_slower_leaves_whole_entries(tmp_path):
    """Of two processes that prepare one case the first has it; what is damaged is replaced."""
    folder, grid = tmp_path / "case", Grid(8)
    first, second = (Volume(np.full((1, 2, 8, 8), i, np.uint16), None, None) for i in (1, 2))
    for volume in (first, second):
        cache.write(folder, volume, grid)
        assert np.load(folder / "image.npy").max() == 1
    os.truncate(folder / "image.npy", 9)
    cache.write(folder, second, grid)
    assert np.load(folder / "image.npy").max() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["case"]


def test_a_scan_is_more_than_its_voxels(tmp_path):
    """Runs know the voxel size, and the organs that a label marks, too."""
    config, root = nnunet_folder(tmp_path)
    (root / "partial_labels.json").write_text(json.dumps({"mine_001": ["head"]}))

    def digests():
        now = config.copy_and_resolve_references()
        completion.complete(now.data)
        return cache.prepare(now).digests()

    before = digests()
    assert digests() == before
    (root / "partial_labels.json").write_text(json.dumps({"mine_001": ["tail"]}))
    other = {case for case, found in digests().items() if found != before[case]}
    assert other == {"mine_001"}
    for name in ("imagesTr/mine_002_0000", "labelsTr/mine_002"):
        scan = nib.load(root / f"{name}.nii.gz")
        save(root / f"{name}.nii.gz", np.asarray(scan.dataobj), np.diag([2, 1, 1, 1]))
    other = {case for case, found in digests().items() if found != before[case]}
    assert other == {"mine_001", "mine_002"}


def test_many_cases_share_few_open_files(thorax, monkeypatch):
    config, _ = thorax
    expected = everything(cache.prepare(config))
    monkeypatch.setattr("cgs_jax.data.prepared.MAPPED", 1)
    for few, all_of_them in zip(everything(cache.prepare(config)), expected, strict=True):
        np.testing.assert_array_equal(few, all_of_them)


def test_what_no_validation_case_has_is_told(thorax):
    config, root = thorax
    path = root / "Patient_04" / "GT.nii.gz"
    label = nib.load(path)
    numbers = np.asarray(label.dataobj)
    save(path, np.where(numbers == 3, 0, numbers).astype(np.uint8), label.affine)
    prepared = cache.prepare(config)
    assert summaries.absent(prepared, prepared.splits.val) == ["trachea"]
    assert not summaries.absent(prepared, ["Patient_04", "Patient_05"])


def test_label_maps_without_an_organ_are_found(thorax):
    """A scan that nobody annotated may have come with one."""
    config, root = thorax
    path = root / "Patient_04" / "GT.nii.gz"
    label = nib.load(path)
    save(path, np.zeros(label.shape, np.uint8), label.affine)
    prepared = cache.prepare(config)
    splits = prepared.splits
    held = [*splits.labelled, *splits.val, *splits.test]
    assert summaries.empty(prepared, held) == ["Patient_04"]


@pytest.mark.parametrize("spacing", [0.0001, 1000])
def test_a_scan_that_would_be_too_large_or_a_point_is_named(thorax, spacing):
    config, _ = thorax
    config.data.spacing, config.data.patch = spacing, 16
    with pytest.raises(UserError, match=r"Patient_0\d.nii.gz: a scan of .* voxels .* would"):
        cache.prepare(config)


def test_cache_that_can_not_be_written(thorax, tmp_path):
    config, _ = thorax
    (tmp_path / "a_file").write_text("")
    config.data.cache = str(tmp_path / "a_file")
    with pytest.raises(UserError, match="can not write to .*a_file .*--config.data.cache"):
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
