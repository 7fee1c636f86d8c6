"""Weak view, strong view and CutMix boxes: pure functions of a key, run on the device.

Keys come from (seed, step), so views repeat exactly on resume and do not depend on loader workers.
The recipe is that of the ACDC literature (SSL4MIS, UniMatch, CGS).
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data.cache import LEVELS


def to_image(slices: jax.Array) -> jax.Array:
    """uint16 [B, *S, C] -> float32 [B, *S, C] in [0, 1]."""
    return slices.astype(jnp.float32) / LEVELS


# Slices that are longer by more, in either direction, are turned as if they were so much longer.
# Ratios of ACDC are .69 to 1.57; a wider bound costs every step more, see `_rotate`.
MOST_LENGTHENED = 1.6


def weak(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array | None,
    config: ConfigDict,
    aspect: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Moves image [B, *S, C] and label [B, *S] together, each image by its own draw, and all slices
    of a volume alike.

    With probability `flip` a mirror image (rot90^k, then a flip); else with probability `rotate` a
    rotation by up to `degrees`; else unchanged. Nearest neighbour, zero outside, as the literature.
    `aspect` [B] is height by width of the slices before they were resized to squares: they are
    turned as if that came after.
    """
    draws = jax.random.uniform(key, (5, len(image)))
    mirror = draws[0] < config.flip
    swap, rows = mirror & (draws[1] < 0.5), mirror & (draws[2] < 0.5)
    columns = mirror & (rows == swap)
    rotate = ~mirror & (draws[3] < config.rotate)
    turn = rotate * (2 * draws[4] - 1)

    def move(x):
        if x.ndim == 4:
            return jax.vmap(move, 1, 1)(x)  # slice by slice
        x = jnp.where(swap[:, None, None], x.swapaxes(1, 2), x)
        x = jnp.where(rows[:, None, None], x[:, ::-1], x)
        x = jnp.where(columns[:, None, None], x[:, :, ::-1], x)
        return _rotate(x, turn, config.degrees, aspect)

    if aspect is not None:
        aspect = jnp.clip(aspect, 1 / MOST_LENGTHENED, MOST_LENGTHENED)
    channels = [move(image[..., c]) for c in range(image.shape[-1])]
    return jnp.stack(channels, -1), None if label is None else move(label)


def _rotate(
    x: jax.Array, turn: jax.Array, degrees: float, aspect: jax.Array | None = None
) -> jax.Array:
    """Rotates [B, H, W] about the centre by turn [B] in -1..1 times `degrees`, zero outside; with
    `aspect` [B] as the slice would be turned, were it that much higher than wide.

    Three shears, each moving whole rows or columns by whole pixels (Paeth, Graphics Interface
    1986): no pixel is doubled or lost inside, and no gather is needed, which TPUs do one pixel at a
    time. Stretched by `aspect`, a shear along the rows has that much more slope, one along the
    columns that much less.
    """
    if not degrees:
        return x
    size, limit = x.shape[1], np.deg2rad(degrees)
    angle = turn[:, None] * limit
    half, most = (size - 1) / 2, 1.0 if aspect is None else MOST_LENGTHENED
    ratio = 1.0 if aspect is None else aspect[:, None]
    # the first shear leaves the image so far
    margin = int(np.ceil(np.tan(limit / 2) * half * most))
    across = jnp.round(ratio * jnp.tan(angle / 2) * (jnp.arange(size) - half)).astype(jnp.int32)
    column = jnp.arange(-margin, size + margin) - half
    down = jnp.round(-jnp.sin(angle) / ratio * column).astype(jnp.int32)
    x = jnp.pad(x, ((0, 0), (0, 0), (margin, margin)))
    x = _shift_rows(x, across, margin)
    furthest = int(np.ceil(np.sin(limit) * (half + margin) * most))
    x = _shift_rows(x.swapaxes(1, 2), down, furthest).swapaxes(1, 2)
    return _shift_rows(x, across, margin)[:, :, margin : margin + size]


def _shift_rows(x: jax.Array, shift: jax.Array, furthest: int) -> jax.Array:
    """out[b, r, i] = x[b, r, i + shift[b, r]], zero outside; |shift| <= furthest.

    A shift by any number is a row of shifts by powers of two, each done or left out.
    """
    width = x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (furthest, furthest)))
    shift = (shift + furthest)[..., None]
    for bit in range((2 * furthest).bit_length()):
        moved = jnp.pad(x[..., 1 << bit :], ((0, 0), (0, 0), (0, 1 << bit)))
        x = jnp.where(shift >> bit & 1, moved, x)
    return x[..., :width]


def strong(key: jax.Array, image: jax.Array, config: ConfigDict) -> jax.Array:
    """Colour jitter of [B, *S, C] in [0, 1]: brightness and contrast in random order, clamped.

    Applied with probability `jitter`; each factor is uniform in 1 +- `strength` and the same for
    all channels of an image, the contrast about the mean of each channel.
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
        jittered = [
            jnp.where(order, stretch(brighten(channel)), brighten(stretch(channel)))
            for channel in jnp.split(x, x.shape[-1], -1)
        ]
        jittered = jnp.concatenate(jittered, -1)
        return jnp.where(jax.random.bernoulli(k_apply, config.jitter), jittered, x)

    return jax.vmap(one)(jax.random.split(key, image.shape[0]), image)


def cutmix_keep(key: jax.Array, shape: tuple[int, ...], probability: float = 1.0) -> jax.Array:
    """One CutMix box an image, with `probability`: of `shape` [B, *S], False inside the box.

    Area uniform in .02 to .4 of the image, aspect uniform in .3 to 1/.3 as far as the box fits,
    position uniform inside the image. In a volume that is the share of its voxels, and the box has
    a share of the slices that is uniform in .5 to 1.
    """
    batch, *depth, _, size = shape

    def one(key):
        k_area, k_aspect, k_y, k_x = jax.random.split(key, 4)
        area = jax.random.uniform(k_area, minval=0.02, maxval=0.4)
        if depth:
            k_share, k_z = jax.random.split(jax.random.fold_in(key, 4))
            share = jax.random.uniform(k_share, minval=0.5, maxval=1)
            slices = jnp.ceil(depth[0] * share).astype(jnp.int32)
            z = jax.random.randint(k_z, (), 0, depth[0] - slices + 1)
            area = area * depth[0] / slices
        low, high = jnp.maximum(0.3, area), jnp.minimum(1 / 0.3, 1 / area)
        aspect = jax.random.uniform(k_aspect, minval=low, maxval=high)
        height = jnp.floor(size * jnp.sqrt(area * aspect)).astype(jnp.int32)
        width = jnp.floor(size * jnp.sqrt(area / aspect)).astype(jnp.int32)
        y = jax.random.randint(k_y, (), 0, size - height + 1)
        x = jax.random.randint(k_x, (), 0, size - width + 1)
        box = [y, x, height, width]
        if depth:
            box = [z, y, x, slices, height, width]
        return box_keep(jnp.stack(box), shape[1:])

    keep = jax.vmap(one)(jax.random.split(key, batch))
    if probability == 1:
        return keep
    ones = (batch, *[1] * len(shape[1:]))
    without = jax.random.uniform(jax.random.fold_in(key, batch), ones) >= probability
    return keep | without


def box_keep(box: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of `shape`, False inside `box`: its first pixel along every axis, then its sides, in pixels,
    (y, x, height, width) in a slice."""
    inside = jnp.ones(shape, bool)
    places = jnp.meshgrid(*map(jnp.arange, shape), indexing="ij", sparse=True)
    for place, first, side in zip(places, *jnp.split(jnp.asarray(box), 2), strict=True):
        inside &= (place >= first) & (place < first + side)
    return ~inside
