"""Parts of a network that see some images at a time, so that the maps that they make on the way are
never there for the whole batch: neither at once nor, since they are made again, for the gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_pieces(function: Callable[[jax.Array, Any], Any], count: int) -> Callable:
    """`function(x, weights)` of `count` pieces of the batch, one after the other.

    XLA runs what does not depend on each other in any order, and on CPUs it merges a second
    computation with the first in spite of `jax.checkpoint`. So the weights of a piece have a
    summand that is 0, and that is known only when the piece before is done.

    Args:
      function: x [B, ...] and any pytree -> pytree of arrays whose first axis may be cut as the
        batch, or is 1.
      count: of pieces, which must divide B; 1 leaves the function as it is.

    Returns:
      What takes x and weights as `function`; of an array whose first axis is 1 it makes `count`.
    """
    if count == 1:
        return function

    def forward(x, weights):
        made, after = [], jnp.zeros(())
        for i in range(count):
            made.append(function(_piece(x, i, count), _after(after, weights)))
            after = _nothing(made[-1])
        return jax.tree.map(lambda *parts: _join(parts), *made), (x, weights)

    def backward(kept, gradients):
        x, weights = kept
        of_x, of_weights, after = [], [], jnp.zeros(())
        for i in range(count):
            own = jax.tree.map(lambda g, i=i: _piece(g, i, count), gradients)
            after = after + _nothing(own)
            _, pull_back = jax.vjp(function, _piece(x, i, count), _after(after, weights))
            made = pull_back(own)
            after = _nothing(made)
            of_x.append(made[0])
            of_weights.append(made[1])
        return _join(of_x), jax.tree.map(lambda *parts: sum(parts), *of_weights)

    mapped = jax.custom_vjp(lambda *inputs: forward(*inputs)[0])
    mapped.defvjp(forward, backward)
    return mapped


def _piece(x, i, count):
    """Every `count`-th of the batch, so that each device has a share of each piece."""
    return x.reshape(-1, count, *x.shape[1:])[:, i]


def _join(parts):
    return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


def _nothing(tree):
    """0, which is known when all arrays of `tree` are."""
    return sum(0 * x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(tree))


def _after(nothing, tree):
    return jax.tree.map(lambda x: x + nothing.astype(x.dtype), tree)
