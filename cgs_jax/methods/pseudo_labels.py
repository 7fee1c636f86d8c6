"""Labels that generalist and specialists make for each other, and the masks that doubt them.

Relabelling, merging, inter-head error detection (IHED) and agreement of CGS (Wang et al., IEEE TMI
2025). K targets are 1..K. A specialist's classes are background, target and remaining; a binary
one's, as the paper ablates them, are target and all else.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cgs_jax.models.network import Outputs

BACKGROUND, TARGET, REMAINING = 0, 1, 2


def relabel(labels: jax.Array, num_targets: int, num_classes: int = 3) -> jax.Array:
    """Multi-class labels [B, *S] -> labels of each specialist [B, *S, K]."""
    labels = labels[..., None]
    targets = jnp.arange(1, num_targets + 1)
    others = jnp.asarray(REMAINING if num_classes == 3 else BACKGROUND, labels.dtype)
    rest = jnp.where(labels == 0, jnp.asarray(BACKGROUND, labels.dtype), others)
    return jnp.where(labels == targets, jnp.asarray(TARGET, labels.dtype), rest)


def merge(specialist_probs: jax.Array) -> jax.Array:
    """Probabilities of the specialists [B, *S, K, 3 or 2] -> scores [B, *S, K + 1].

    Background scores the mean of all heads, target k what its specialist gives it; the scores are
    not renormalised. Of binary heads, background scores the least that any gives to all else: a
    head that sees its organ lowers the background, whatever the other heads say.
    """
    background = specialist_probs[..., BACKGROUND]
    binary = specialist_probs.shape[-1] == 2
    background = jnp.min(background, -1) if binary else jnp.mean(background, -1)
    return jnp.concatenate([background[..., None], specialist_probs[..., TARGET]], -1)


def within(probs: jax.Array, members: jax.Array | None) -> jax.Array:
    """Probabilities of all classes [B, *S, 1 + K] where only the organs `members` [K] can be: what
    the others have is background's. None: all can be."""
    if members is None:
        return probs
    organs = jnp.where(members, probs[..., 1:], 0)
    others = jnp.sum(jnp.where(members, 0, probs[..., 1:]), -1, keepdims=True)
    return jnp.concatenate([probs[..., :1] + others, organs], -1)


def ihed_mask(votes: jax.Array, num_classes: int = 3) -> jax.Array:
    """True where the specialists' votes [B, *S, K] fit together: [B, *S].

    Either all say background, or exactly one says target and all others say remaining. Since 2K - 1
    is one below the largest sum, the sum of the votes tells both cases. Binary heads contradict
    each other only where more than one says target.
    """
    total = jnp.sum(votes, -1)
    if num_classes == 2:
        return total <= 1
    return (total == 0) | (total == 2 * votes.shape[-1] - 1)


class PseudoLabels(NamedTuple):
    """What a teacher says of unlabelled images, batch first.

    Without specialists only the first two are there.
    """

    generalist: jax.Array  # y_g [B, *S]
    confident: jax.Array  # M_g [B, *S]: its probability exceeds tau
    specialists: jax.Array | None = None  # y_s [B, *S]: argmax of the merged specialists
    votes: jax.Array | None = None  # z_k [B, *S, K]: each specialist's own classes
    consistent: jax.Array | None = None  # M_d [B, *S]: the IHED mask


def from_teacher(teacher: Outputs, tau: float) -> PseudoLabels:
    """Pseudo-labels and masks of one forward pass; `tau` is the confidence that M_g asks for."""
    generalist, sure = confident(teacher.generalist, tau)
    if teacher.specialists is None:
        return PseudoLabels(generalist, sure)
    specialists = specialist_probs(teacher)
    votes = _argmax(specialists)
    return PseudoLabels(
        generalist=generalist,
        confident=sure,
        specialists=_argmax(merge(specialists)),
        votes=votes,
        consistent=ihed_mask(votes, specialists.shape[-1]),
    )


def specialist_probs(outputs: Outputs) -> jax.Array:
    """Probabilities of all specialists, [B, *S, K, 3 or 2]."""
    return jax.nn.softmax(jnp.concatenate(outputs.specialists, -2).astype(jnp.float32))


def confident(logits: jax.Array, tau: float) -> tuple[jax.Array, jax.Array]:
    """Labels, and where their probability exceeds `tau`: [B, *S] each."""
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    return _argmax(probs), jnp.max(probs, -1) > tau


def largest_components(labels: jax.Array, num_targets: int) -> jax.Array:
    """[B, *S] with only the largest component, connected through corners too, of every target in
    every image."""
    targets = jnp.arange(1, num_targets + 1).reshape(-1, *[1] * labels.ndim)
    mask = labels == targets  # [K, B, *S]
    window = (1, 1, *[3] * (labels.ndim - 1))
    size = labels[0].size
    ids = jnp.where(mask, jnp.arange(1, size + 1).reshape(labels.shape[1:]), 0)

    def spread(state):
        """Every pixel takes the largest number among its neighbours of the same class."""
        before, _ = state
        strides = [1] * before.ndim
        after = jax.lax.reduce_window(before, 0, jax.lax.max, window, strides, "SAME")
        return jnp.where(mask, after, 0), before

    ids, _ = jax.lax.while_loop(
        lambda state: jnp.any(state[0] != state[1]), spread, (ids, jnp.zeros_like(ids))
    )
    count = jax.vmap(jax.vmap(lambda x: jnp.bincount(x.ravel(), length=size + 1)))(ids)
    largest = jnp.argmax(count.at[..., 0].set(0), -1)
    largest = jnp.expand_dims(largest, range(2, ids.ndim))
    kept = mask & (ids == largest)
    return jnp.sum(kept * targets, 0).astype(labels.dtype)


def _argmax(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, -1).astype(jnp.uint8)
