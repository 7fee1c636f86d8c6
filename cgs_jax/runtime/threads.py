"""Work on many files at once."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

MOST = 4
MEMORY = 6e9  # bytes of the machine for each thread: a large CT takes 4 while it is prepared


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count() -> int:
    """How many scans are worked on at once: unpacking and numpy leave Python's lock meanwhile."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(MOST, len(cores()), int(memory / MEMORY)))


def each(function: Callable[[Any], Any], items: Iterable[Any], what: str) -> list[Any]:
    """`function` of all items, in their order, in threads, with a progress bar titled `what`.

    The first error ends it; what has begun is waited for.
    """
    items = list(items)
    pool = ThreadPoolExecutor(count())
    try:
        results = pool.map(function, items)
        quiet = None if items else True
        return list(tqdm(results, what, len(items), unit="scan", leave=False, disable=quiet))
    finally:
        pool.shutdown(cancel_futures=True)
