"""Files that a kill leaves whole, local or in a bucket."""

import contextlib
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from cgs_jax.runtime.errors import UserError


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON: nan and infinity become null."""

    def clean(x):
        if isinstance(x, Mapping):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(clean(value), allow_nan=False, **options)


def folder(name: str) -> pathlib.Path:
    """A local folder, or one in a bucket, such as 'gs://bucket/run'.

    Raises:
      UserError: what reads such buckets is not installed.
    """
    if "://" not in name:
        return pathlib.Path(name)
    try:
        epath.Path(name).exists()
    except ImportError as error:
        raise UserError(f"{name}: {error}") from error
    return epath.Path(name)


def is_remote(path: pathlib.Path) -> bool:
    """Whether `path` is in a bucket: files there can not be locked, or appended to."""
    return "://" in str(path)


@contextlib.contextmanager
def writing(path: pathlib.Path | str) -> Iterator[None]:
    """An OSError in here becomes an error that names `path`; that of a full disk names no file.

    Raises:
      UserError: it can not be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"can not write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path to write to. In the end that file takes the place of `path`; after an error
    or a kill the old file is as it was.

    Raises:
      UserError: it can not be written.
    """
    # Several processes may write the same, such as the table of a sweep.
    unfinished = path.with_name(f"unfinished_{platform.node()}_{os.getpid()}_{path.name}")
    with writing(path):
        try:
            yield unfinished
            unfinished.replace(path)
        except BaseException:  # a stop, too
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file, `whole`."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file that the user wrote holds; it may begin with a byte order mark.

    Raises:
      OSError: it can not be read.
      ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(str(error)) from None


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl or times.jsonl; one that a kill broke off is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
