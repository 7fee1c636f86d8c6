"""Volumes -> slices -> scores of classes -> labels on the volumes' own grids."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cgs_jax.data.cache import LEVELS
from cgs_jax.data.grid import likeliest, resize
from cgs_jax.data.volume import keep_largest
from cgs_jax.methods.base import Method
from cgs_jax.runtime import devices, run_folder

# uint16 [B, size, size, channels] -> scores of classes [B, size, size, C]; the highest names it
Predict = Callable[[np.ndarray], np.ndarray]


class Scoring(NamedTuple):
    """From scores on the training grid to labels on a scan's own."""

    upsample: str  # 'linear': scores are interpolated; 'nearest': labels are
    largest_component: bool  # only the largest piece of each organ is kept


LITERATURE = Scoring("nearest", False)  # how published figures were made


def to_image(slices: jax.Array) -> jax.Array:
    """uint16 [B, H, W, C] -> float32 [B, H, W, C] in [0, 1]."""
    return slices.astype(jnp.float32) / LEVELS


def combine(probs: jax.Array, how: str) -> jax.Array:
    """Scores [B, H, W, C] of several predictions [M, B, H, W, C]; the highest names the class.

    'average' of the probabilities; 'confidence': at each pixel the surest prediction decides;
    'vote': the most named class, of equally often named ones the likelier.
    """
    if how == "confidence":
        surest = jnp.argmax(jnp.max(probs, -1), 0)[None, ..., None]
        return jnp.take_along_axis(probs, surest, 0)[0]
    scores = jnp.mean(probs, 0)
    if how == "vote":
        scores += jnp.sum(jax.nn.one_hot(jnp.argmax(probs, -1), probs.shape[-1]), 0)
    return scores


def make_predict(*methods: Method) -> Callable[..., Predict]:
    """Compiles states -> `Predict` for this process's devices.

    The predictions of several methods, a state each, are combined as the first's config says.
    """
    mesh, config = devices.local_mesh(), methods[0].config

    def predict(states, slices):
        image = to_image(slices)
        probs = [m.predict(state, image) for m, state in zip(methods, states, strict=True)]
        return combine(jnp.concatenate(probs), config.combine)

    compiled = devices.jit(predict, mesh)

    def with_states(*states):
        states = devices.localise(mesh, states)

        def run(slices):
            padded = np.pad(slices, ((0, -len(slices) % mesh.size), (0, 0), (0, 0), (0, 0)))
            return np.asarray(compiled(states, devices.put_batch(mesh, padded)))[: len(slices)]

        return run

    return with_states


def segment(
    predict: Predict, stacks: Iterable[np.ndarray], config: Any, *scorings: Scoring
) -> Iterator[tuple[np.ndarray, ...]]:
    """Segments volumes, slices of all of them batched to one fixed shape.

    Args:
      stacks: uint16 [C, D, H, W], each on its own grid.
      scorings: how labels are made of the scores; the scores are computed once for all.

    Yields:
      For each volume in order, uint8 labels [D, H, W] on its own grid by each scoring.
    """
    size, batch = config.data.size, config.eval_batch
    depths, grids, done = deque(), deque(), deque()  # of volumes, of slices to do, labels of slices
    todo = np.empty((0, size, size, config.data.channels), np.uint16)

    def run(count):
        nonlocal todo
        part, todo = todo[:count], todo[count:]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
        for scores in predict(padded)[: len(part)]:
            done.append([_on_grid(scores, s.upsample, *grids[0]) for s in scorings])
            grids.popleft()

    def finished():
        while depths and len(done) >= depths[0]:
            slices = [done.popleft() for _ in range(depths.popleft())]
            labels = map(np.stack, zip(*slices, strict=True))
            yield tuple(
                keep_largest(label, len(config.data.classes)) if s.largest_component else label
                for label, s in zip(labels, scorings, strict=True)
            )

    for stack in stacks:
        _, depth, *grid = stack.shape
        depths.append(depth)
        grids.extend([grid] * depth)
        todo = np.concatenate([todo, np.moveaxis(resize(stack, size, size), 0, -1)])
        while len(todo) >= batch:
            run(batch)
        yield from finished()
    if len(todo):
        run(len(todo))
    yield from finished()


def _on_grid(scores, upsample, height, width):
    if upsample == "linear":
        return likeliest(scores[None], height, width)[0]
    return resize(np.argmax(scores, -1).astype(np.uint8)[None], height, width)[0]


def scoring(config: Any) -> Scoring:
    """That of `config`."""
    return Scoring(config.upsample, config.largest_component)


def prediction_options(config: Any) -> dict[str, Any]:
    """Those fields of `config` that say how a trained network predicts."""
    return {name: config[name] for name in run_folder.PREDICTION}
