"""From the grid of a scan to that of the network, and back."""

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cgs_jax import predict
from cgs_jax.data import cache, nifti, streams
from cgs_jax.data.grid import Grid
from cgs_jax.data.streams import Stream
from cgs_jax.data.volume import Volume
from cgs_jax.inference.predictor import Predictor, Scoring
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from configs import acdc
from layouts import nnunet_folder, save
from steps import tiny

LINEAR = Scoring("linear", False)


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
    batch = streams.batches(data, resolve(config), two_streams())[0]["labelled"]
    assert batch["image"].shape == (2, 16, 16, 1)


def two_streams():
    return {"labelled": Stream("labelled", True, 2)}


GRIDS = {
    "squares": {"data.size": 64},
    "millimetres": {"data.spacing": 0.6, "data.patch": 16, "window": 16},
    "volumes": {"data.depth": 8, "data.spacing": 0.7, "data.slice_spacing": 0.9, "data.patch": 16},
}


@pytest.mark.parametrize("grid", GRIDS)
def test_labels_come_back_to_the_scan(grid, tmp_path):
    """Of 40 scans that lie askew, mirrored and with axes in any order, voxels of any shape: what is
    read, seen through windows and written marks the same voxels, of shapes of five and more."""
    config = tiny(**GRIDS[grid])
    config.inference, config.eval_batch = "generalist", 4
    config.data.slicing, config.data.classes = "axial", ("ball",)
    predictor = Predictor(lambda x: np.eye(2)[(x[..., 0] > 32768).astype(int)], config)
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape, zooms = rng.integers(18, 44, 3), rng.uniform(0.5, 2.5, 3)
        turn = Rotation.from_euler("xyz", rng.uniform(-30, 30, 3), degrees=True).as_matrix()
        axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = turn @ axes * zooms, rng.uniform(-90, 90, 3)
        centre, radii = shape * rng.uniform(0.3, 0.7, 3), np.maximum(shape * 0.25, 3)
        places = np.indices(shape).transpose(1, 2, 3, 0)
        ball = (np.sum(((places - centre) / radii) ** 2, -1) < 1).astype(np.uint8)
        corner = tuple(rng.choice([0, -1], 3))
        ball[corner] = 1
        save(tmp_path / "scan.nii.gz", ball.astype(np.float32), affine)
        scan = nifti.read_nifti(tmp_path / "scan.nii.gz", "axial")
        assert np.prod(scan.spacing) == pytest.approx(np.prod(zooms), rel=1e-4)
        image = cache.quantise(scan.array[None].astype(np.float32))
        ((_, (label,)),) = predictor.labels([("", Volume(image, None, scan.spacing))], LINEAR)
        predict.write(scan, label, tmp_path / "label.nii.gz")
        written = nib.load(tmp_path / "label.nii.gz")
        np.testing.assert_allclose(written.affine, affine, atol=1e-4)
        found = np.asarray(written.dataobj)
        assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > 0.95
        assert found[corner] == 1


def test_spacing_that_can_not_be(tmp_path):
    config, _ = spaced(tmp_path)
    config.data.spacing = 1.0
    with pytest.raises(UserError, match=r"give data.patch"):
        resolve(config)
    config.data.patch = 16
    for wrong in ("wide", (1.0, 1.0), -1.0, float("nan"), True):
        config.data.spacing = wrong
        with pytest.raises(UserError, match=r"data.spacing="):
            resolve(config)
    config = acdc.get_config()
    config.data.update(root=str(tmp_path), spacing=1.0, patch=16)
    with pytest.raises(UserError, match="voxel size"):
        Grid.of(config.data).shape((3, 10, 10), None)
