"""Parts of a network that see some images at a time, so that the maps that they make on the way are
never there for the whole batch: neither at once nor, since they are made again, for the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_pieces(function: Callable[[jax.Array, Any], Any], count: int) -> Callable:
    """`function(x, weights)` of `count` pieces of the batch, one after the other; for the gradient,
    which is written out, each piece is computed again.

    XLA orders independent work as it likes, and on CPUs it merges a second computation with the
    first in spite of `jax.checkpoint`. So to the weights of a piece a 0 is added that is known only
    when the piece before is done.

    Args:
      function: x [B, ...] and a pytree of floats -> pytree of arrays [B, ...], or [1, ...] of what
        is summed over the batch.
      count: of pieces; 1 leaves the function as it is. On several devices pieces would have to be
        sent around.

    Returns:
      What takes x and weights as `function`, and makes [count, ...] of its [1, ...].
    """
    if count == 1:
        return function

    def forward(x, weights):
        made, after = [], jnp.zeros(())
        for piece in jnp.array_split(x, count):
            made.append(function(piece, _after(after, weights)))
            after = _nothing(made[-1])
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *made), (x, weights)

    def backward(kept, gradients):
        x, weights = kept
        of_x, of_weights, after = [], [], jnp.zeros(())
        for i, piece in enumerate(jnp.array_split(x, count)):
            own = jax.tree.map(lambda g, i=i: jnp.array_split(g, count)[i], gradients)
            after = after + _nothing(own)  # nor is a piece made before its gradient has come
            _, pull_back = jax.vjp(function, piece, _after(after, weights))
            made = pull_back(own)
            after = _nothing(made)
            of_x.append(made[0])
            of_weights.append(made[1])
        return jnp.concatenate(of_x), jax.tree.map(lambda *parts: sum(parts), *of_weights)

    mapped = jax.custom_vjp(lambda *inputs: forward(*inputs)[0])
    mapped.defvjp(forward, backward)
    return mapped


def _nothing(tree):
    """0, which is known when all arrays of `tree` are."""
    some = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(tree))
    return jnp.where(jnp.isfinite(some), 0 * some, 0)


def _after(nothing, tree):
    return jax.tree.map(lambda x: x + nothing.astype(x.dtype), tree)
