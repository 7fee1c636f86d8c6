"""Volumes: the same methods, streams and predictions with one axis more."""

import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from cgs_jax import main, predict
from cgs_jax.data import cache, case_lists, streams, tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.prepared import Entry, Prepared
from cgs_jax.data.streams import Stream
from cgs_jax.data.volume import Volume
from cgs_jax.methods import augment, pseudo_labels, synthesis, versemi
from cgs_jax.models import packed, unet3d
from cgs_jax.runtime import devices
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.resolve import check
from configs import nnunet
from configs.models import unet3d as options_of_unet3d
from steps import tiny

METHODS = "cgs supervised mean_teacher ua_mt ict cps urpc fixmatch unimatch ad_mt bcp versemi cmems"
METHODS += " cgs:mean_teacher"  # CGS over another


def volumes(method="cgs", **fields):
    """The tiny configuration, for volumes of 8 x 16 x 16 voxels."""
    config = tiny(method)
    options_of_unet3d.update(config)
    config.model.update(name="unet3d", channels=(4, 4, 8), dropout=(0.1, 0.1, 0.1))
    del config.model["lanes"]
    config.model.depth_strides, config.data.depth = (1, 2), 8
    config.batch.unlabelled = 0 if method == "supervised" else 2
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("sides", [(3, 3, 3), (1, 3, 3), (1, 1, 1)])
def test_convolution_of_volumes(sides):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 6, 7, 2)), rng.normal(size=(*sides, 2, 3))
    expected = np.zeros((2, 5, 6, 7, 3))
    for b, c, d in np.ndindex(2, 2, 3):
        expected[b, ..., d] += ndimage.correlate(x[b, ..., c], kernel[..., c, d], mode="constant")
    x, kernel = jnp.float32(x), jnp.float32(kernel)
    np.testing.assert_allclose(packed.conv(x, kernel, 1), expected, atol=1e-4)
    np.testing.assert_allclose(packed._convolution(x, kernel), expected, atol=1e-4)

    def gradients(conv):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(conv(*args))), (0, 1))(x, kernel)

    own = gradients(lambda x, kernel: packed.conv(x, kernel, 1))
    for a, b in zip(own, gradients(packed._convolution), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_and_upsampling_of_volumes(stride):
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 8, 3)).astype(np.float32)
    blocks = x.reshape(2, 4 // stride, stride, 3, 2, 4, 2, 3)
    backbone = unet3d.Backbone(depth_strides=(stride, 1, 1))
    np.testing.assert_array_equal(backbone.pool(jnp.asarray(x), 0, 1), blocks.max((2, 4, 6)))
    expected = ndimage.zoom(x, (1, stride, 2, 2, 1), order=1)  # grids whose corners meet
    upsampled = backbone.upsample(jnp.asarray(x), 0, 1, False)
    np.testing.assert_allclose(upsampled, expected, atol=1e-5)


def test_all_slices_of_a_volume_move_alike():
    config = tiny().augment
    image = np.random.default_rng(0).random((6, 1, 16, 16, 1), np.float32)
    label = (image[..., 0] > 0.5).astype(np.uint8)
    stack = np.repeat(image, 3, 1)
    weak = jax.jit(lambda *pair: augment.weak(jax.random.key(1), *pair, config))
    moved, own = jax.device_get(weak(stack, np.repeat(label, 3, 1)))
    flat, of_slice = jax.device_get(weak(image[:, 0], label[:, 0]))
    assert (flat != image[:, 0]).any()
    for i in range(3):
        np.testing.assert_array_equal(moved[:, i], flat)
        np.testing.assert_array_equal(own[:, i], of_slice)
    jitter = tiny(**{"augment.jitter": 1.0}).augment
    strong = jax.jit(lambda key: augment.strong(key, stack, jitter))
    assert (np.asarray(strong(jax.random.key(0))) != stack).any()


def test_boxes_of_volumes():
    keep = jax.jit(lambda key: augment.cutmix_keep(key, (300, 12, 32, 32)))(jax.random.key(0))
    inside = ~np.asarray(keep)
    shares, extents = inside.mean((1, 2, 3)), []
    assert 0.01 < shares.min() < 0.04
    assert 0.3 < shares.max() < 0.42
    for axes in ((2, 3), (1, 3), (1, 2)):
        extents.append(inside.any(axes).sum(1))
    np.testing.assert_array_equal(np.prod(extents, 0), inside.sum((1, 2, 3)))  # boxes, no less
    assert set(extents[0]) == set(range(7, 13))  # more than half of the slices
    for axes in ((2, 3), (1, 3), (1, 2)):
        assert inside.any((0, *axes)).all()  # up to every side of the volume
    keep = jax.jit(lambda key: versemi.boxes(key, (40, 6, 12, 12), (0.5, 0.5)))(jax.random.key(0))
    assert set((~np.asarray(keep)).sum((1, 2, 3)).tolist()) == {3 * 6 * 6}


def test_largest_component_of_volumes():
    labels = np.zeros((1, 4, 6, 6), np.uint8)
    labels[0, :3, 1, 1], labels[0, 3, 2, 2] = 1, 1  # one piece, through a corner
    labels[0, 0, 4, 3:6] = 1
    found = pseudo_labels.largest_components(jnp.asarray(labels), 1)
    labels[0, 0, 4, 3:6] = 0
    np.testing.assert_array_equal(found, labels)


def test_organs_are_pasted_in_all_slices_alike():
    options = tiny("cmems").method
    key, shape = jax.random.key(3), (1, 3, 16, 16)
    image = np.random.default_rng(0).random((*shape, 1), np.float32)
    image[:] = image[:, :1]
    label = np.zeros(shape, np.uint8)
    label[..., 4:9, 5:11] = 1
    paste = jax.jit(lambda *images: synthesis.copy_paste(key, *images, 1, options))
    found = jax.device_get(paste(image, label, np.zeros_like(image)))
    flat = jax.device_get(paste(image[:, 0], label[:, 0], np.zeros_like(image[:, 0])))
    for own, of_slice in zip(found, flat, strict=True):
        assert np.any(own)
        for i in range(3):
            np.testing.assert_allclose(own[:, i], of_slice, atol=1e-6)


@pytest.mark.parametrize("method", METHODS.split())
def test_every_method_sees_volumes(method):
    """Shapes of a whole step; nothing is compiled."""
    config = volumes(method)
    check(config)
    made, mesh = train_step.make_method(config), devices.make_mesh(config)
    step = train_step.make_train_step(made, mesh)
    inputs = train_step.abstract_inputs(made, mesh)
    state, metrics = jax.eval_shape(step, *inputs)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, inputs[0])
    assert "loss" in metrics.names
    image = jax.ShapeDtypeStruct((1, 8, 16, 16, 1), np.float32)
    scores = jax.eval_shape(made.predict, state, image)
    assert scores.shape[1:] == (1, 8, 16, 16, 3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three volumes of several sizes, all voxels of which differ; the label follows the image."""
    folder, rng, entries = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0), {}
    config = volumes(**{"data.spacing": 1.0, "data.slice_spacing": 2.0, "data.patch": 8}).data
    task = tasks.find(config, "")
    for i, depth in enumerate((5, 9, 12)):
        shape = (depth, 12 + i, 14)
        image = rng.permutation(np.prod(shape)).astype(np.uint16).reshape(1, *shape)
        entries[f"c{i}"] = Entry(folder / f"c{i}", task)
        volume = Volume(image, (image[0] % 3).astype(np.uint8), (2.0, 1.0, 1.0))
        cache.write(entries[f"c{i}"].folder, volume, Grid.of(config))
    splits = case_lists.Splits(list(entries), [], [], ["c0", "c1"])
    return Prepared(entries, splits, config.classes, volumes=True)


def test_windows_of_volumes(prepared):
    config = volumes(**{"data.spacing": 1.0, "data.slice_spacing": 2.0, "data.patch": 8})
    wanted = {"labelled": Stream("labelled", True, 4), "unlabelled": Stream("unlabelled", False, 2)}
    whole, rest = (streams.batches(prepared, config, wanted)[start:] for start in (0, 10))
    corners = set()
    for step in range(40):
        image, label = (whole[step]["labelled"][name] for name in ("image", "label"))
        assert image.shape == (4, 8, 8, 8, 1)
        np.testing.assert_array_equal(image[..., 0] % 3, label)
        third = whole[step]["unlabelled"]["image"]  # of c2 alone, which has depth to spare
        assert (third > 0).mean() > 0.99
        corners |= {int(x) for x in third[:, 0, 0, 0, 0]}
    jax.tree.map(np.testing.assert_array_equal, whole[13], rest[3])
    volume = prepared.volume("c2").image[0]
    slices = {int(np.argwhere(volume == corner)[0, 0]) for corner in corners}
    assert slices == set(range(12 - 8 + 1))


def test_places_of_organs_are_looked_up_once(prepared):
    fields = {"data.spacing": 1.0, "data.slice_spacing": 2.0, "data.patch": 8}
    config = volumes(**fields, **{"data.patch_anywhere": 0.0, "data.patch_foreground": 1.0})
    steps = streams.batches(prepared, config, {"labelled": Stream("labelled", True, 4)})
    for step in range(10):
        assert (steps[step]["labelled"]["label"] > 0).any((1, 2, 3)).all()
    assert prepared._places_of.cache_info().misses == len(prepared.splits.labelled)


def test_volumes_that_can_not_be():
    flat = tiny(**{"data.depth": 8})
    with pytest.raises(UserError, match=r"data.depth=8: unet sees slices"):
        check(flat)
    with pytest.raises(UserError, match="volumes: it must|volumes, so it must be above 0"):
        check(volumes(**{"data.depth": 0}))
    for depth in (9, -8):
        with pytest.raises(UserError, match=f"data.depth={depth}: .* divide by 2"):
            check(volumes(**{"data.depth": depth}))
    with pytest.raises(UserError, match=r"model.depth_strides=\(1, 3\)"):
        check(volumes(**{"model.depth_strides": (1, 3)}))
    with pytest.raises(UserError, match=r"data.slice_spacing is for volumes"):
        check(tiny(**{"data.slice_spacing": 2.0}))
    with pytest.raises(UserError, match=r"data.exemplar is a slice"):
        check(volumes(**{"data.exemplar": "auto"}))
    with pytest.raises(UserError, match=r"mesh.space"):
        check(volumes(**{"mesh.space": 2}))


def test_nnunet_volumes_end_to_end(tmp_path):
    """Trained on windows, predicted on scans of other sizes, with their geometry."""
    root, rng = tmp_path / "Dataset001_Ball", np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "ball": 1}}
    (root / "dataset.json").write_text(json.dumps(description | {"file_ending": ".nii.gz"}))
    affines = []
    for i in range(6):
        shape = 16 + i, 18, 9 + i % 3
        affines.append(np.diag([1.0, 1.1, 2.0 + 0.1 * i, 1]))
        places = np.indices(shape).transpose(1, 2, 3, 0)
        ball = np.linalg.norm((places - np.array(shape) / 2) * (1, 1, 2), axis=-1) < 6
        image = (200 * ball + rng.normal(0, 10, shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affines[-1]), root / "imagesTr" / f"s{i}_0000.nii.gz")
        if i < 4:
            label = nib.Nifti1Image(ball.astype(np.uint8), affines[-1])
            nib.save(label, root / "labelsTr" / f"s{i}.nii.gz")
    config = nnunet.get_config("method=cgs,model=unet3d,labelled=2")
    config.data.root = str(root)
    config.data.spacing = config.data.slice_spacing = "median"
    config.data.patch, config.data.depth = 16, 8
    config.model.update(channels=(8, 16), dropout=(0.0, 0.0), depth_strides=(1,))
    config.total_steps = config.eval_every = 40
    config.optimizer.lr = 0.05
    summary = main.run(config, tmp_path / "run")
    assert summary["test"]["mean"]["dice"] > 0.8
    out = tmp_path / "out"
    predict.predict([tmp_path / "run"], root / "imagesTr", out)
    for i in range(6):
        found = nib.load(out / f"s{i}.nii.gz")
        np.testing.assert_allclose(found.affine, affines[i])
        assert found.shape == (16 + i, 18, 9 + i % 3)
        assert np.asarray(found.dataobj).any()
