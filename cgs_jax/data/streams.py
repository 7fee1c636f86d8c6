"""The stream of training batches: a function of (seed, step), with grain.

Labelled and unlabelled rows are shuffled anew in each epoch and repeat for ever, so few labelled
slices fill a batch by repetition. Of each a window is cut, or it is taken whole (`patches.py`).
Every process knows the same global order and loads its part.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain.python as grain
import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import patches
from cgs_jax.data.cache import Prepared


def rows_of(prepared: Prepared) -> dict[str, np.ndarray]:
    """Rows of the labelled and the unlabelled training slices.

    Where every training case is labelled, its images serve as unlabelled ones, too.
    """
    splits = prepared.splits
    rest = [case for case in splits.train if case not in set(splits.labelled)]
    return {
        "labelled": prepared.rows(splits.labelled),
        "unlabelled": prepared.rows(rest or splits.train),
    }


def batches(
    prepared: Prepared,
    config: ConfigDict,
    sizes: dict[str, int],
    start: int,
    mine: Callable[[int], np.ndarray] = np.arange,
) -> grain.MapDataset:
    """Batches of steps `start` to `config.total_steps`.

    Args:
      sizes: slices of each stream per step, over all processes.
      mine: size of a batch -> the rows of it that this process loads.

    Returns:
      {'labelled': {'image' uint16 [B, H, W], 'label' uint8 [B, H, W]}, 'unlabelled': {'image'}},
      H = W = `patches.side`: there is no label in the unlabelled stream that could leak.
    """
    rows = rows_of(prepared)
    seed, data = config.seed, config.data

    def load(step: int) -> dict[str, dict[str, np.ndarray]]:
        batch, patch = {}, patches.side(data, step, config.total_steps)
        for i, (name, size) in enumerate(sizes.items()):
            places = step * size + mine(size)
            at = rows[name][_shuffled(places, len(rows[name]), (seed, i))]
            batch[name] = {"image": prepared.images[at]}
            if name == "labelled":
                batch[name]["label"] = prepared.labels[at]
            if patch < data.size:
                labels = batch[name].get("label", [None] * len(at))
                corners = [
                    patches.corner(np.random.RandomState((seed, i, place)), data, patch, label)
                    for place, label in zip(places, labels, strict=True)
                ]
                batch[name] = {k: patches.cut(x, corners, patch) for k, x in batch[name].items()}
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
