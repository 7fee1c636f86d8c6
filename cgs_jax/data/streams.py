"""The streams of training batches: functions of (seed, step), with grain.

The slices of each stream, or its volumes, are shuffled anew in each epoch and repeat for ever, so
few labelled ones fill a batch by repetition. Of each a window is cut, or it is taken whole
(`patches.py`). Every process knows the same global order and loads its part.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cgs_jax.data import patches, tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.prepared import Prepared
from cgs_jax.runtime import devices, threads

BLOCK = 64  # slices in which every data set of a collection has its share of a stream


class Stream(NamedTuple):
    """What a method takes of the training data in every step."""

    source: str  # 'labelled' or 'unlabelled': whose slices
    with_labels: bool
    count: int  # slices or volumes a step, over all devices


def batches(
    prepared: Prepared,
    config: ConfigDict,
    streams: dict[str, Stream],
    mine: Callable[[int], np.ndarray] = np.arange,
) -> grain.MapDataset:
    """Batches of all `config.total_steps` steps.

    Args:
      streams: by name; the random order of one depends on its position among them.
      mine: size of a batch -> the rows of it that this process loads.

    Returns:
      By name {'image': uint16 [B, *S, C], 'aspect': float32 [B], height by width of the slices
      before they were made square} and, of streams with labels, 'label' uint8 [B, *S], S being
      `patches.shape`: the others have no label that could leak. With `data.partial` there is
      'annotated' bool [B, *1s, K] beside a label: the organs that it marks; and 'member', those
      that its data set has.
    """
    seed, data = config.seed, config.data
    partly = (
        set(prepared.organs(case)) != set(prepared.task(case).data.classes)
        for case in prepared.splits.labelled
    )
    if not data.partial and any(partly):
        raise TypeError("cases are annotated for some organs only: the layout needs partial(data)")
    rows = prepared.sources()
    grids = [Grid.of(own) for own in tasks.members(data).values()]

    def load(step: int) -> dict[str, dict[str, np.ndarray]]:
        batch, shape = {}, patches.shape(data, step, config.total_steps)
        for i, (name, (source, with_labels, count)) in enumerate(streams.items()):
            places, corners = step * count + mine(count), None
            at = drawn(places, rows[source], (seed, i))
            if data.depth or any(grid.pixel or grid.size != shape[-1] for grid in grids):
                corners, rng = [], np.random.RandomState()
                for place, row, x in zip(places, at, prepared.examples("image", at), strict=True):
                    rng.seed((seed, i, place))  # quicker than to make another
                    organs = functools.partial(prepared.places, row) if with_labels else None
                    whole = x.shape[-len(shape) :]
                    corners.append(patches.corner(rng, data, whole, shape, organs))
            image = prepared.images(at, corners, shape)
            batch[name] = {"image": image, "aspect": prepared.aspects(at)}
            if with_labels:
                batch[name]["label"] = prepared.labels(at, corners, shape)
                if data.partial:
                    batch[name]["annotated"] = prepared.annotated(at)
                    batch[name]["member"] = prepared.member(at)
        return batch

    return grain.MapDataset.range(config.total_steps).map(load)


def drawn(places: np.ndarray, rows: Sequence[np.ndarray], seed: tuple[int, int]) -> np.ndarray:
    """The rows at `places` of an endless stream from the `rows` of one or several data sets.

    Each is shuffled anew in each of its epochs. Several are drawn in proportion to the root of
    their numbers of slices, so that large ones count, but do not drown the small (as MultiTalent
    does, Ulrich et al., 2303.14444): every block of BLOCK places has the same share of each, in an
    order of its own.
    """
    if len(rows) == 1:
        return rows[0][_shuffled(places, len(rows[0]), seed)]
    counts = shares([len(own) for own in rows])
    taken = np.zeros(len(places), int)
    orders = {block: _shuffled_block(block, counts, seed) for block in set(places // BLOCK)}
    for i, place in enumerate(places):
        block, within = divmod(int(place), BLOCK)
        which = orders[block][within]
        before = block * counts[which] + np.count_nonzero(orders[block][:within] == which)
        (at,) = _shuffled(np.array([before]), len(rows[which]), (*seed, which))
        taken[i] = rows[which][at]
    return taken


def shares(sizes: Sequence[int]) -> np.ndarray:
    """How many of BLOCK draws each of several data sets has: in proportion to the roots of their
    sizes, one at least."""
    exact = 1 + np.sqrt(sizes) / np.sum(np.sqrt(sizes)) * (BLOCK - len(sizes))
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    return counts


def _shuffled_block(block, counts, seed):
    """Which data set has each place of a block."""
    return np.random.RandomState((*seed, len(counts), block)).permutation(
        np.repeat(np.arange(len(counts)), counts)
    )


def _shuffled(places: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """The items at `places` of an endless sequence of epochs, each of which has all `count` items
    in an order of its own."""
    epochs, within = places // count, places % count
    return np.array([_order(count, (*seed, e))[w] for e, w in zip(epochs, within, strict=True)])


@functools.lru_cache(32)
def _order(count, seed):
    # RandomState, not Generator: numpy promises that it draws the same for ever.
    return np.random.RandomState(seed).permutation(count)


def prefetched(dataset: grain.MapDataset, put: Callable[[Any], Any]) -> Iterator[Any]:
    """Iterates with reading and `put`, the transfer to the devices, ahead of the step."""
    ahead = 8
    count = min(max(2, len(threads.cores())), ahead)  # on a network most of the time is waiting
    options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=ahead)
    loaded = dataset.to_iter_dataset(options).map(put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(loaded, prefetch_buffer_size=2))


def device_batches(dataset: grain.MapDataset, mesh: Mesh) -> Iterator[Any]:
    """Batches on the devices, read ahead."""
    return prefetched(dataset, lambda batch: devices.put_batch(mesh, batch))
