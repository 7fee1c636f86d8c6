"""From the grid of a scan to that of the network, and back."""

import numpy as np
import pytest
from layouts import nnunet_folder, save
from steps import tiny

from cgs_jax.data import cache, streams
from cgs_jax.data.grid import Grid, resize
from cgs_jax.data.streams import Stream
from cgs_jax.data.volume import Volume
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from configs import acdc


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
    config.data.spacing, config.data.patch = 0.5, 16
    data = cache.prepare(resolve(config))
    rows = data.rows(data.splits.labelled)
    for image, label in zip(
        data.examples("image", rows), data.examples("label", rows), strict=True
    ):
        assert label.shape == image.shape[1:]
        np.testing.assert_allclose(label.shape, 64, atol=1)  # 32 mm by .5
        np.testing.assert_allclose(np.ptp(np.argwhere(label), 0) + 1, 32, atol=2)
        assert abs((image[0] > 32768).sum() - (label > 0).sum()) < 0.05 * label.sum()
    assert data.aspects(rows[:2]).tolist() == [1, 1]
    config.data.spacing = "median"
    found = resolve(config).data.spacing
    assert found == 0.6
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
        config.spacing = float(rng.uniform(0.5, 1.2))
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
    config.data.spacing = 1.0
    with pytest.raises(UserError, match=r"give data.patch"):
        resolve(config)
    config.data.patch = 16
    for wrong in ("wide", (1.0, 1.0), -1.0, float("nan")):
        config.data.spacing = wrong
        with pytest.raises(UserError, match=r"data.spacing="):
            resolve(config)
    config = acdc.get_config()
    config.data.update(root=str(tmp_path), spacing=1.0, patch=16)
    with pytest.raises(UserError, match="voxel size"):
        Grid.of(config.data).shape((3, 10, 10), None)
