"""What the console is told: lines, and how far long work is."""

import errno
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from cgs_jax.runtime import processes

EVERY = 60.0  # seconds between two lines about long work, where no bar can be drawn


def say(text: str) -> None:
    """Prints a line without breaking a progress bar; process 0 speaks for all.

    Where nobody listens any more, at a closed terminal or pipe, the work goes on.
    """
    if processes.is_first():
        try:
            tqdm.write(text.encode(errors="backslashreplace").decode())  # names may be no UTF-8
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise


def progress(items: Iterable[Any], what: str, total: int, unit: str) -> Iterable[Any]:
    """`items`, with a bar on a terminal; elsewhere, as in the log of a batch job, a line a minute
    says how many of the `total` are done."""
    bar = tqdm(items, what, total, leave=False, unit=unit, disable=None if total else True)
    return _told(items, what, total, unit) if bar.disable else bar


def _told(items: Iterable[Any], what: str, total: int, unit: str) -> Iterator[Any]:
    told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - told >= EVERY and done < total:
            say(f"{what}: {done} of {total} {unit}s")
            told = time.monotonic()
