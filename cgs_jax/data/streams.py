"""The streams of training batches: functions of (seed, step), with grain.

The slices of each stream are shuffled anew in each epoch and repeat for ever, so few labelled
slices fill a batch by repetition. Of each a window is cut, or it is taken whole (`patches.py`).
Every process knows the same global order and loads its part.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import patches
from cgs_jax.data.cache import Prepared
from cgs_jax.data.case_lists import Splits


class Stream(NamedTuple):
    """What a method takes of the training data in every step."""

    source: str  # 'labelled' or 'unlabelled': whose slices
    with_labels: bool
    count: int  # slices a step, over all devices


def sources(splits: Splits) -> dict[str, list[str]]:
    """Training cases of each source.

    Where every training case is labelled, its images serve as unlabelled ones, too.
    """
    rest = [case for case in splits.train if case not in set(splits.labelled)]
    return {"labelled": splits.labelled, "unlabelled": rest or splits.train}


def batches(
    prepared: Prepared,
    config: ConfigDict,
    streams: dict[str, Stream],
    start: int,
    mine: Callable[[int], np.ndarray] = np.arange,
) -> grain.MapDataset:
    """Batches of steps `start` to `config.total_steps`.

    Args:
      streams: by name; the random order of one depends on its position among them.
      mine: size of a batch -> the rows of it that this process loads.

    Returns:
      By name {'image': uint16 [B, H, W, C]} and, of streams with labels, 'label' uint8 [B, H, W],
      H = W = `patches.side`: the others have no label that could leak.
    """
    seed, data = config.seed, config.data
    rows = {source: prepared.rows(cases) for source, cases in sources(prepared.splits).items()}

    def load(step: int) -> dict[str, dict[str, np.ndarray]]:
        batch, side = {}, patches.side(data, step, config.total_steps)
        for i, (name, (source, with_labels, count)) in enumerate(streams.items()):
            places, corners = step * count + mine(count), None
            at = rows[source][_shuffled(places, len(rows[source]), (seed, i))]
            if side < data.size:
                corners, rng = [], np.random.RandomState()
                labels = prepared.slices("label", at) if with_labels else [None] * len(at)
                for place, label in zip(places, labels, strict=True):
                    rng.seed((seed, i, place))  # quicker than to make another
                    corners.append(patches.corner(rng, data, side, label))
            batch[name] = {"image": prepared.images(at, corners, side)}
            if with_labels:
                batch[name]["label"] = prepared.labels(at, corners, side)
        return batch

    return grain.MapDataset.range(start, config.total_steps).map(load)


def _shuffled(places: np.ndarray, count: int, seed: tuple[int, int]) -> np.ndarray:
    """What stands at `places` of an endless row of shuffled epochs of `count` items."""
    epochs, within = places // count, places % count
    # RandomState, not Generator: numpy promises that it draws the same for ever.
    orders = {e: np.random.RandomState((*seed, e)).permutation(count) for e in set(epochs)}
    return np.array([orders[e][w] for e, w in zip(epochs, within, strict=True)])


def prefetched(dataset: grain.MapDataset, put: Callable[[Any], Any]) -> Iterator[Any]:
    """Iterates with reading and `put`, the transfer to the devices, ahead of the step."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    loaded = dataset.to_iter_dataset(options).map(put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(loaded, prefetch_buffer_size=2))
