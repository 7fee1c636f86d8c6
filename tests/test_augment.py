"""Weak and strong views and CutMix boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import augment
from steps import tiny


def test_image_and_label_move_together():
    config = tiny().augment
    label = np.zeros((16, 32, 32), np.uint8)
    label[:, 5:20, 8:14] = 1
    label[:, 22:25, 3:30] = 2
    image = label[..., None] / 2.0
    weak = jax.jit(lambda key: augment.weak(key, image, label, config))
    moved, moved_label = weak(jax.random.key(3))
    np.testing.assert_array_equal(np.round(moved[..., 0] * 2), moved_label)
    changed = (np.asarray(moved_label) != label).any((1, 2))
    assert 8 <= changed.sum() < 16  # a quarter stays as it is


def test_channels_move_and_change_together():
    """The second channel is half the first; one draw moves and jitters both."""
    config = tiny().augment
    first = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1), minval=0.4, maxval=0.6)
    both = jnp.concatenate([first, 0.5 * first], -1)
    config.strength = 0.2  # so that nothing is clamped
    moved, _ = jax.jit(lambda key: augment.weak(key, both, None, config))(jax.random.key(1))
    alone, _ = jax.jit(lambda key: augment.weak(key, first, None, config))(jax.random.key(1))
    np.testing.assert_array_equal(moved[..., :1], alone)
    np.testing.assert_array_equal(moved[..., 1], 0.5 * moved[..., 0])
    jittered = jax.jit(lambda key: augment.strong(key, both, config))(jax.random.key(2))
    alone = jax.jit(lambda key: augment.strong(key, first, config))(jax.random.key(2))
    np.testing.assert_allclose(jittered[..., :1], alone, rtol=1e-6)
    np.testing.assert_allclose(jittered[..., 1], 0.5 * jittered[..., 0], rtol=1e-5)
    assert (np.asarray(jittered) != np.asarray(both)).any((1, 2, 3)).sum() > 8


@pytest.mark.parametrize("ratio", [1.0, 1.5, 0.7])
def test_rotation_is_about_the_centre_and_nearest(ratio):
    """What a pixel holds came from within two pixels of where an exact rotation takes it from; of
    slices that were `ratio` times as high as wide, one before they were made square."""
    size, degrees = 64, 20.0
    rows, columns = (x.astype(np.float32) for x in np.mgrid[1 : size + 1, 1 : size + 1])
    turn = np.array([-1.0, -0.37, 0.0, 0.5, 1.0], np.float32)
    aspect = None if ratio == 1 else jnp.full(5, ratio)
    rotate = jax.jit(lambda x, turn: augment._rotate(x, turn, degrees, aspect))
    got_rows, got_columns = (np.asarray(rotate(jnp.stack([x] * 5), turn)) for x in (rows, columns))
    centre = (size + 1) / 2
    for i, angle in enumerate(np.deg2rad(degrees) * turn):
        y, x = rows - centre, columns - centre
        exact = np.stack(
            [
                y * np.cos(angle) - x / ratio * np.sin(angle),
                y * ratio * np.sin(angle) + x * np.cos(angle),
            ]
        )
        exact += centre
        inside = got_rows[i] > 0
        error = np.hypot(got_rows[i] - exact[0], got_columns[i] - exact[1])[inside]
        assert error.max() < 2
        assert error.mean() < 0.8
        clearly = ((exact > 3) & (exact < size - 2)).all(0)
        assert inside[clearly].all()
        pairs = np.stack([got_rows[i][inside], got_columns[i][inside]], 1)
        assert len(np.unique(pairs, axis=0)) == len(pairs)  # no pixel doubled


def test_mirror_images_keep_every_pixel():
    config = tiny().augment
    config.flip = 1.0
    image = jax.random.uniform(jax.random.key(0), (32, 8, 8, 1))
    moved, _ = jax.jit(lambda key: augment.weak(key, image, None, config))(jax.random.key(1))
    image, moved = np.asarray(image)[..., 0], np.asarray(moved)[..., 0]
    mirrors = [lambda x: x[::-1], lambda x: x[:, ::-1], np.transpose, lambda x: x[::-1, ::-1].T]
    hits = np.array([[np.array_equal(m(a), b) for m in mirrors] for a, b in zip(image, moved)])  # noqa: B905
    assert (hits.sum(1) == 1).all()
    assert (hits.sum(0) > 0).all()


def test_jitter_stays_in_range_and_keeps_some_images():
    config = tiny().augment
    image = jax.random.uniform(jax.random.key(0), (64, 8, 8, 1))
    jittered = jax.jit(lambda key: augment.strong(key, image, config))(jax.random.key(1))
    assert jittered.min() >= 0
    assert jittered.max() <= 1
    same = (np.asarray(jittered) == np.asarray(image)).all((1, 2, 3)).mean()
    assert 0.05 < same < 0.4


def test_jitter_by_hand():
    """Of images of two values contrast and brightness change each by its own draw: by contrast
    their distance, about their mean, and by brightness both, before or after."""
    config = tiny(**{"augment.jitter": 1.0, "augment.strength": 0.2}).augment
    image = jnp.broadcast_to(jnp.array([0.45, 0.55]).reshape(1, 1, 2, 1), (400, 2, 2, 1))
    made = np.asarray(jax.jit(lambda key: augment.strong(key, image, config))(jax.random.key(0)))
    low, high = made[:, 0, 0, 0], made[:, 0, 1, 0]
    brightness, both = (low + high) / 1.0, (high - low) / 0.1
    contrast = both / brightness
    for factor in (brightness, contrast):
        assert 0.8 <= factor.min() + 1e-5 < 0.81
        assert 1.19 < factor.max() <= 1.2 + 1e-5
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.2


def test_cutmix_boxes_are_boxes_of_the_right_size():
    keep = jax.jit(lambda key: augment.cutmix_keep(key, (400, 64, 64)))(jax.random.key(0))
    inside = ~np.asarray(keep)
    areas = inside.mean((1, 2))
    assert 0.01 < areas.min() < 0.05
    assert 0.3 < areas.max() <= 0.4
    height, width = inside.any(2).sum(1), inside.any(1).sum(1)
    np.testing.assert_array_equal(height * width, inside.sum((1, 2)))
    assert inside[:, 4:-4, 4:-4].any(0).all()
    assert all(
        edge.any() for edge in (inside[:, 0], inside[:, -1], inside[..., 0], inside[..., -1])
    )
