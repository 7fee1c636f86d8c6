"""Weak view, strong view and CutMix boxes: pure functions of a key, run on the device.

Keys come from (seed, step), so views repeat exactly on resume and do not depend on loader workers.
The recipe is that of the ACDC literature (SSL4MIS, UniMatch, CGS).
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


def weak(
    key: jax.Array, image: jax.Array, label: jax.Array | None, config: ConfigDict
) -> tuple[jax.Array, jax.Array | None]:
    """Moves image [B, H, W, 1] and label [B, H, W] together, each image by its own draw.

    With probability `flip` a mirror image (rot90^k, then a flip); else with probability `rotate` a
    rotation by up to `degrees`; else unchanged. Nearest neighbour, zero outside, as the literature.
    """
    size = image.shape[1]
    matrices = jax.vmap(lambda k: _weak_matrix(k, config))(jax.random.split(key, image.shape[0]))
    centre = (size - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(size) - centre] * 2, indexing="ij"))
    # One gather serves mirror images and rotations.
    source = jnp.round(jnp.einsum("bij,jhw->bihw", matrices, grid) + centre).astype(jnp.int32)
    inside = jnp.all((source >= 0) & (source < size), axis=1)
    index = jnp.clip(source[:, 0], 0, size - 1) * size + jnp.clip(source[:, 1], 0, size - 1)

    def move(x):
        flat = x.reshape(x.shape[0], size * size)
        moved = jnp.take_along_axis(flat, index.reshape(index.shape[0], -1), axis=1)
        return jnp.where(inside, moved.reshape(index.shape), 0).reshape(x.shape)

    return move(image), None if label is None else move(label)


def _weak_matrix(key: jax.Array, config: ConfigDict) -> jax.Array:
    """[2, 2] matrix from output to input coordinates (rows, columns) around the centre."""
    k_flip, k_rotate, k_turns, k_axis, k_angle = jax.random.split(key, 5)
    quarter = jax.random.randint(k_turns, (), 0, 4)
    cos, sin = jnp.array([1.0, 0, -1, 0])[quarter], jnp.array([0.0, 1, 0, -1])[quarter]
    turn = jnp.array([[cos, -sin], [sin, cos]])
    axis = jax.random.bernoulli(k_axis)
    mirror = turn * jnp.where(axis, jnp.array([1.0, -1]), jnp.array([-1.0, 1]))
    angle = jnp.deg2rad(config.degrees) * jax.random.uniform(k_angle, minval=-1, maxval=1)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    rotate = jnp.where(jax.random.bernoulli(k_rotate, config.rotate), rotation, jnp.eye(2))
    return jnp.where(jax.random.bernoulli(k_flip, config.flip), mirror, rotate)


def strong(key: jax.Array, image: jax.Array, config: ConfigDict) -> jax.Array:
    """Colour jitter of [B, H, W, 1] in [0, 1]: brightness and contrast in random order, clamped.

    Applied with probability `jitter`; each factor is uniform in 1 +- `strength`.
    """

    def one(key, x):
        k_apply, k_bright, k_contrast, k_order = jax.random.split(key, 4)
        low, high = 1 - config.strength, 1 + config.strength
        bright = jax.random.uniform(k_bright, minval=low, maxval=high)
        contrast = jax.random.uniform(k_contrast, minval=low, maxval=high)

        def brighten(x):
            return jnp.clip(x * bright, 0, 1)

        def stretch(x):
            mean = jnp.mean(x)
            return jnp.clip(mean + contrast * (x - mean), 0, 1)

        order = jax.random.bernoulli(k_order)
        jittered = jnp.where(order, stretch(brighten(x)), brighten(stretch(x)))
        return jnp.where(jax.random.bernoulli(k_apply, config.jitter), jittered, x)

    return jax.vmap(one)(jax.random.split(key, image.shape[0]), image)


def cutmix_keep(key: jax.Array, batch: int, size: int) -> jax.Array:
    """One CutMix box an image: [batch, size, size], False inside the box.

    Area uniform in .02 to .4 of the image, aspect uniform in .3 to 1/.3 as far as the box fits,
    position uniform inside the image.
    """

    def one(key):
        k_area, k_aspect, k_y, k_x = jax.random.split(key, 4)
        area = jax.random.uniform(k_area, minval=0.02, maxval=0.4)
        low, high = jnp.maximum(0.3, area), jnp.minimum(1 / 0.3, 1 / area)
        aspect = jax.random.uniform(k_aspect, minval=low, maxval=high)
        height = jnp.floor(size * jnp.sqrt(area * aspect)).astype(jnp.int32)
        width = jnp.floor(size * jnp.sqrt(area / aspect)).astype(jnp.int32)
        y = jax.random.randint(k_y, (), 0, size - height + 1)
        x = jax.random.randint(k_x, (), 0, size - width + 1)
        return box_keep(jnp.stack([y, x, height, width]), size)

    return jax.vmap(one)(jax.random.split(key, batch))


def box_keep(box: jax.Array, size: int) -> jax.Array:
    """[size, size], False inside `box` = (y, x, height, width) in pixels."""
    y, x, height, width = box
    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None]
    inside = (rows >= y) & (rows < y + height) & (columns >= x) & (columns < x + width)
    return ~inside
