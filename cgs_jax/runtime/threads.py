"""Work on many files at once."""

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cgs_jax.runtime import processes
from cgs_jax.runtime.console import progress

MOST = 8
MEMORY = 6e9  # bytes for each thread: a large CT takes 4 while it is prepared
# Linux's control groups, which have the limits of containers and batch jobs, and this process's
GROUPS, OWN_GROUPS = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/proc/self/cgroup")


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count() -> int:
    """How many scans are worked on at once: unpacking and numpy leave Python's lock meanwhile."""
    each = memory() / int(os.environ.get(processes.HERE, 1))
    return max(1, min(MOST, len(cores()), int(each / MEMORY)))


def memory() -> int:
    """Bytes that this process may use: the machine's, or what its container or job is limited to;
    0 where the system does not say."""
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")]
    except (OSError, ValueError):
        return 0
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    files = [GROUPS / "memory.max", GROUPS / "memory" / "memory.limit_in_bytes"]
    for line in lines:  # NUMBER:CONTROLLERS:/GROUP, without controllers in the second version
        _, controllers, group = line.split(":", 2)
        group = pathlib.Path(group.lstrip("/"))
        for part in (group, *group.parents):
            if not controllers:
                files.append(GROUPS / part / "memory.max")
            elif "memory" in controllers.split(","):
                files.append(GROUPS / "memory" / part / "memory.limit_in_bytes")
    for file in files:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(limits)


def each(function: Callable[[Any], Any], items: Iterable[Any], what: str) -> list[Any]:
    """`function` of all items, in their order, in threads, with a progress bar titled `what`.

    The first error ends it; what has begun is waited for.
    """
    items = list(items)
    pool = ThreadPoolExecutor(count())
    try:
        results = pool.map(function, items)
        return list(progress(results, what, len(items), "scan"))
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """`items`, of which the next is made in a thread while one is in use."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
