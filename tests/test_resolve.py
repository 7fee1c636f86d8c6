"""The configuration is completed and checked once, and stays as it is from there on."""

import nibabel as nib
import numpy as np
import pytest

from cgs_jax import sweep
from cgs_jax.data import cache, tasks
from cgs_jax.evaluate import scans
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import check, resolve
from configs import synapse
from layouts import nnunet_folder, save
from runs import TINY
from steps import tiny


def test_a_completed_copy_that_nobody_changes(tmp_path):
    config, root = nnunet_folder(tmp_path)
    resolved = resolve(config)
    assert resolved.data.classes == ("head", "tail")
    assert config.data.classes == ()
    with pytest.raises(AttributeError):
        resolved.data.size = 32
    prepared = scans(resolved, None, str(root), str(tmp_path / "elsewhere"))
    assert prepared.splits.labelled
    assert (resolved.data.cache, config.data.cache) == ("", "")


def test_runs_of_a_sweep_are_resolved(tmp_path):
    """So a run whose classes come with its data is known again."""
    _, root = nnunet_folder(tmp_path)
    rows = tmp_path / "rows.py"
    rows.write_text("def get_sweep(config):\n    return {'a': ('', {})}")
    fields = TINY | {"data.root": str(root)}
    _, (run,) = sweep.plan("configs/nnunet.py", fields, str(rows), tmp_path / "runs", 1)
    assert run.config.data.classes == ("head", "tail")
    assert not [word for word in run.command if word.startswith("--config.data.classes")]


def test_mirror_images_are_off_where_names_tell_sides(tmp_path, capsys):
    sided = (
        ("RightParotid", "LeftParotid"),
        ("kidney_l", "kidney_r"),
        ("left lung", "right lung"),
        ("anterior", "posterior"),
        ("LEFT_EYE", "RIGHT_EYE"),
        ("lung upper lobe left", "lung lower lobe left"),
    )
    for organs in sided:
        assert set(tasks.both_sides(("liver", *organs))) == set(organs)
    for organs in (
        ("LV", "RV", "Myo"),
        ("left atrium", "liver"),
        ("cleft", "bright"),
        ("left", "r"),
        (),
    ):
        assert tasks.both_sides(organs) is None
    labels = {"background": 0, "kidney_l": 1, "kidney_r": 2}
    config, _ = nnunet_folder(tmp_path / "sided", labels)
    assert resolve(config).augment.flip == 0
    assert "would confuse kidney_l and kidney_r" in capsys.readouterr().out
    config.augment.flip = 0.25
    assert resolve(config).augment.flip == 0.25
    config, _ = nnunet_folder(tmp_path / "plain")
    assert resolve(config).augment.flip == 0.5
    assert resolve(synapse.get_config()).augment.flip == 0  # two kidneys
    config.augment.flip = "often"
    with pytest.raises(UserError, match="augment.flip=often"):
        resolve(config)


@pytest.mark.parametrize(
    ("method", "fields", "warns"),
    [
        ("cgs", {"batch.unlabelled": 1}, True),
        ("cgs", {"batch.labelled": 1}, False),
        ("cgs", {"batch.unlabelled": 1, "method.plan": "full"}, False),
        ("versemi", {"batch.labelled": 1}, True),
        ("ict", {"batch.unlabelled": 1}, True),
        ("ad_mt", {"batch.unlabelled": 1}, True),
        ("cgs", {"batch.unlabelled": 1, "method.cutmix": 0.0}, False),
        ("unimatch", {"batch.unlabelled": 1}, True),
        ("unimatch", {"batch.unlabelled": 1, "method.cutmix": 0.0}, False),
        ("cps", {"batch.unlabelled": 1, "method.cutmix": 0.5}, True),
        ("cps", {"batch.unlabelled": 1}, False),
        ("supervised", {"batch.labelled": 1, "method.cutmix": 0.5}, True),
        ("supervised", {"batch.labelled": 1}, False),
        ("mean_teacher", {"batch.unlabelled": 1}, False),
    ],
)
def test_one_image_meets_nobody(method, fields, warns, capsys):
    config = tiny(method, **fields)
    check(config)
    assert ("WARNING: images are mixed" in capsys.readouterr().out) == warns


@pytest.mark.parametrize(("unlabelled", "warns"), [(0, False), (6, True)])
def test_images_that_nobody_takes_are_told(unlabelled, warns, capsys):
    check(tiny("supervised", **{"batch.unlabelled": unlabelled}))
    assert ("batch.unlabelled=6 is left out, for supervised" in capsys.readouterr().out) == warns


def test_shapes_may_be_trusted(tmp_path):
    config, root = nnunet_folder(tmp_path)
    path = root / "labelsTr" / "mine_000.nii.gz"
    save(path, np.asarray(nib.load(path).dataobj), np.diag([1, 1, 5, 1]))
    with pytest.raises(UserError, match=r"affines; if only the affine is wrong, give .*trust_sh"):
        cache.prepare(resolve(config))
    config.data.trust_shapes = True
    assert cache.prepare(resolve(config)).has_label("mine_000")
    # A scan that is stored the other way round, whose label has lost that: voxels lie on voxels.
    path = root / "imagesTr" / "mine_000_0000.nii.gz"
    marks = np.asarray(nib.load(root / "labelsTr" / "mine_000.nii.gz").dataobj)
    save(path, (marks * 10).astype(np.float32), np.diag([-1.0, -1.0, 3.0, 1.0]))
    data = cache.prepare(resolve(config))
    volume = data.volume("mine_000")
    np.testing.assert_array_equal(volume.image[0] > 0, volume.label > 0)
    save(root / "labelsTr" / "mine_000.nii.gz", marks[:-1], np.eye(4))
    with pytest.raises(UserError, match="mine_000.nii.gz has shape"):
        cache.prepare(resolve(config))


def test_a_run_that_goes_on_keeps_what_was_found_of_its_scans(tmp_path):
    config, root = nnunet_folder(tmp_path, channel_names={"0": "CT"})
    config.data.spacing, config.data.patch = "median", 16
    saved = resolve(config)
    for path in (root / "imagesTr").iterdir():
        image = nib.load(path)
        save(path, np.asarray(image.dataobj) + 100, np.diag([2, 2, 3, 1]))
        label = root / "labelsTr" / path.name.replace("_0000", "")
        if label.exists():
            save(label, np.asarray(nib.load(label).dataobj), np.diag([2, 2, 3, 1]))
    again, other = resolve(config, saved), resolve(config)
    for field in ("spacing", "normalise"):
        assert again.data[field] == saved.data[field] != other.data[field]
