"""The stream of training batches: a function of (seed, step), with grain.

Labelled and unlabelled rows are shuffled anew in each epoch and repeat for ever, so few labelled
slices fill a batch by repetition. Every host computes the same global order and gathers its part.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain.python as grain
import jax
import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data.prepare import Prepared


def streams(prepared: Prepared) -> dict[str, np.ndarray]:
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
    prepared: Prepared, config: ConfigDict, sizes: dict[str, int], start: int
) -> grain.MapDataset:
    """Batches of steps `start` to `config.total_steps`, this host's rows.

    Args:
      sizes: slices of each stream per step, over all hosts; 0 leaves the stream out.

    Returns:
      {'labelled': {'image' uint16 [B, H, W], 'label' uint8 [B, H, W]}, 'unlabelled': {'image'}}:
      there is no label in the unlabelled stream that could leak.
    """
    rows = streams(prepared)
    process, processes = jax.process_index(), jax.process_count()

    def stream(i: int, name: str, size: int) -> grain.MapDataset:
        def gather(batch: list[int]) -> dict[str, np.ndarray]:
            mine = np.asarray(batch).reshape(processes, -1)[process]
            at = rows[name][mine]
            arrays = {"image": prepared.images[at]}
            return arrays | ({"label": prepared.labels[at]} if name == "labelled" else {})

        order = grain.MapDataset.range(len(rows[name])).seed(2 * config.seed + i).shuffle()
        return (
            order.repeat()
            .batch(size, drop_remainder=True, batch_fn=list)[start : config.total_steps]
            .map(gather)
        )

    parts = {k: stream(i, k, n) for i, (k, n) in enumerate(sizes.items()) if n}
    zipped = grain.experimental.ZipMapDataset(list(parts.values()))
    return zipped.map(lambda arrays: dict(zip(parts, arrays, strict=True)))


def prefetched(dataset: grain.MapDataset, put: Callable[[Any], Any]) -> Iterator[Any]:
    """Iterates with reading and `put`, the transfer to the devices, ahead of the step."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    loaded = dataset.to_iter_dataset(options).map(put)
    return iter(grain.experimental.ThreadPrefetchIterDataset(loaded, prefetch_buffer_size=2))
