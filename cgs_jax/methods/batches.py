"""Batches joined, taken apart and mixed: trees of arrays whose first axis is the image."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def join(labelled: Any, unlabelled: Any) -> Any:
    """Both batches as one, dealt in turn: so each device's rows of both stay on that device."""

    def both(a, b):
        groups = math.gcd(len(a), len(b))
        parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (a, b)]
        return jnp.concatenate(parts, 1).reshape(-1, *a.shape[1:])

    return jax.tree.map(both, labelled, unlabelled)


def split(outputs: Any, labelled: int) -> tuple[Any, Any]:
    """What was made of `join`ed batches, apart again."""

    def parts(x):
        groups = math.gcd(labelled, len(x) - labelled)
        dealt = jnp.split(x.reshape(groups, -1, *x.shape[1:]), [labelled // groups], axis=1)
        return [part.reshape(-1, *x.shape[1:]) for part in dealt]

    leaves, shape = jax.tree.flatten(outputs)
    return tuple(map(shape.unflatten, zip(*map(parts, leaves), strict=True)))


def cutmix(keep: jax.Array, own: Any, partner: Any) -> Any:
    """Images, labels, masks or outputs, [B, *S, ...] each: `own` where `keep` [B, *S] is true, else
    `partner`."""

    def mix(a, b):
        return jnp.where(keep.reshape(*keep.shape, *[1] * (a.ndim - keep.ndim)), a, b)

    return jax.tree.map(mix, own, partner)


def rolled(tree: Any) -> Any:
    """Of each image what belongs to its neighbour in the batch."""
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), tree)
