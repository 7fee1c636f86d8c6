"""Synthetic labelled images: the organs of a labelled image, moved and pasted on a background.

Transformed copy-paste is how CMEMS (En and Guo, 2404.11812) makes a labelled set of one annotated
image. How the organs move is not known from the paper; the draws and their ranges are ours. All are
pure functions of a key, run on the device. Images are resampled by a gather, which is slow on TPUs,
so only those images that become synthetic should be given.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from ml_collections import ConfigDict

from cgs_jax.methods import augment, base
from cgs_jax.runtime.errors import UserError

SHARES = ("shift", "flip", "jitter", "exemplar_backgrounds")


class Move(NamedTuple):
    """A mirror image, then a rotation and a scaling, all about the centre of mass of what is moved,
    then a shift; within slices, of a volume all alike."""

    mirror: jax.Array  # bool: columns change sides
    angle: jax.Array  # radians, clockwise
    scale: jax.Array  # above 1 enlarges
    shift: jax.Array  # [2], rows and columns, in pixels


def check(options: ConfigDict) -> None:
    """Raises UserError where an option of the synthesis has a value that can not be."""
    if not base.is_range(options.scale) or options.scale[0] <= 0:
        raise UserError(f"method.scale={options.scale}: the least and the greatest, both above 0")
    for name in SHARES:
        if not 0 <= options[name] <= 1:
            raise UserError(f"method.{name}={options[name]} must be between 0 and 1")


def copy_paste(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    background: jax.Array,
    organs: int,
    options: ConfigDict,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pastes the organs of each image on the background of the same row.

    The whole foreground moves as one. With `options.per_organ` each organ moves on its own; they
    are pasted in random order, and a later one covers an earlier one.

    Args:
      image: [B, *S, C] in [0, 1], the source of the organs.
      label: [B, *S], at most `organs`; what is above 0 is pasted.
      background: [B, *S, C] in [0, 1].
      options: `rotation` in degrees, `scale`, `shift` as a share of the side, `flip`, `jitter` and
        `per_organ`; see configs/methods/cmems.py.

    Returns:
      image: [B, *S, C].
      label: [B, *S] of what was pasted; 0 elsewhere, whatever the background shows there.
      pasted: bool [B, *S].
    """

    def one(key, image, label, background):
        ones = [1] * label.ndim
        each = label == jnp.arange(1, organs + 1).reshape(-1, *ones)
        parts = jnp.where(each if options.per_organ else label[None] > 0, label, 0)  # [parts, *S]
        k_order, *keys = jax.random.split(key, 1 + len(parts))
        moves = jax.vmap(lambda k: draw(k, label.shape[-2:], options))(jnp.stack(keys))
        images, labels = jax.vmap(moved, (0, None, 0))(moves, image, parts)
        place = jax.random.permutation(k_order, len(parts)).reshape(-1, *ones)
        last = jnp.argmax(jnp.where(labels > 0, place, -1), 0)[None]
        label = jnp.take_along_axis(labels, last, 0)[0]
        image = jnp.take_along_axis(images, last[..., None], 0)[0]
        pasted = label > 0
        return jnp.where(pasted[..., None], image, background), label, pasted

    k_jitter, k_rows = jax.random.split(key)
    jitter = ConfigDict({"jitter": 1.0, "strength": options.jitter})
    image = augment.strong(k_jitter, image, jitter)
    return jax.vmap(one)(jax.random.split(k_rows, len(image)), image, label, background)


def draw(key: jax.Array, shape: tuple[int, int], options: ConfigDict) -> Move:
    """A random move in slices of `shape`."""
    mirror, angle, scale, *shift = jax.random.uniform(key, (5,))
    least, greatest = options.scale
    limit = options.shift * jnp.array(shape)
    return Move(
        mirror=mirror < options.flip,
        angle=jnp.deg2rad(options.rotation) * (2 * angle - 1),
        scale=least + (greatest - least) * scale,
        shift=limit * (2 * jnp.stack(shift) - 1),
    )


def moved(move: Move, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is labelled above 0, moved: image [*S, C], linear, and label [*S], nearest.

    The label is 0 where a pixel comes from outside of the image.
    """
    places = jnp.mgrid[: label.shape[-2], : label.shape[-1]].astype(jnp.float32)
    own = jnp.sum(label > 0, range(label.ndim - 2))  # pixels in all slices
    centre = jnp.sum(places * own, (1, 2)) / jnp.maximum(jnp.sum(own), 1)
    # Where every pixel comes from: the move undone, its last part first.
    y, x = places - (centre + move.shift)[:, None, None]
    cos, sin = jnp.cos(move.angle) / move.scale, jnp.sin(move.angle) / move.scale
    y, x = cos * y - sin * x, sin * y + cos * x
    source = y + centre[0], jnp.where(move.mirror, -x, x) + centre[1]

    def resample(x, order, mode):
        if x.ndim == 3:
            return jax.vmap(lambda of_slice: resample(of_slice, order, mode))(x)
        return map_coordinates(x, source, order=order, mode=mode)

    channels = [resample(image[..., c], 1, "nearest") for c in range(image.shape[-1])]
    return jnp.stack(channels, -1), resample(label, 0, "constant")
