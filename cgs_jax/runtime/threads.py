"""Work on many files at once."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

# Unpacking and numpy leave Python's lock while they work. A scan of 512 x 512 x 300 voxels takes
# two gigabytes while it is read, so large machines do not get a thread a core.
THREADS = min(4, os.cpu_count() or 1)


def each(function: Callable[[Any], Any], items: Iterable[Any], what: str) -> list[Any]:
    """`function` of all items, in their order, with a progress bar that says `what` scans are
    done. The first error ends it; what has begun is waited for."""
    items = list(items)
    pool = ThreadPoolExecutor(THREADS)
    try:
        results = pool.map(function, items)
        quiet = None if items else True
        return list(tqdm(results, what, len(items), unit="scan", leave=False, disable=quiet))
    finally:
        pool.shutdown(cancel_futures=True)
