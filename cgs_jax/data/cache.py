"""Raw scans -> arrays that training and evaluation read, once, cached: a folder a case.

Its name carries a fingerprint of the case's files and of the options that shape its arrays, and
nothing of the splits: other lists prepare nothing, one more scan prepares only that one. A folder
is written under another name and renamed when whole. It holds

- `image.npy` uint16 [C, D, H, W], and `label.npy` uint8 [D, H, W] where there is a label file;
- `image_SIZE.npy` and `label_SIZE.npy`, slices resized to the training grid, where that is another;
- `case.json`: shape, whether there is a label, and spacing.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from cgs_jax.data import case_lists, patches
from cgs_jax.data.grid import resize
from cgs_jax.data.volume import Case, Volume, check_label
from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError

VERSION = 2  # of the cache layout
LEVELS = 65535  # images are uint16: half the bytes of float32 on disk, in memory and on the wire
NO_LABEL = 255
# of data, that the arrays depend on
OPTIONS = ("name", "size", "normalise", "slicing", "classes", "channels")
MAPPED = 400  # arrays at most: each holds a file open, and most systems allow a process 1,024


class Prepared:
    """A prepared data set: the training slices as rows, and every case as a volume.

    Attributes:
      splits: the case lists.
    """

    def __init__(self, folders: dict[str, pathlib.Path], splits: case_lists.Splits, size: int):
        """`folders` holds the cache entry of every case of `splits`."""
        self.splits, self._folders, self._size = splits, folders, size
        self._about = {c: json.loads((f / "case.json").read_text()) for c, f in folders.items()}
        depths = [self._about[case]["shape"][1] for case in splits.train]
        self._first = np.cumsum([0, *depths])
        self._mapped = functools.lru_cache(MAPPED)(self._map)

    def rows(self, cases: Iterable[str]) -> np.ndarray:
        """Rows, one a slice, of those training cases that are in `cases`."""
        wanted = set(cases)
        taken = [case in wanted for case in self.splits.train]
        return np.flatnonzero(np.repeat(taken, np.diff(self._first)))

    def images(self, rows: np.ndarray, corners: Any = None, side: int = 0) -> np.ndarray:
        """uint16 [B, H, W, C], intensity times 65535: the slices `rows` on the training grid, or
        of each the window of `side` x `side` pixels that begins at its corner."""
        stack = patches.cut(self.slices("image", rows), corners, side)
        return np.ascontiguousarray(np.moveaxis(stack, 1, -1))

    def labels(self, rows: np.ndarray, corners: Any = None, side: int = 0) -> np.ndarray:
        """The same of the labels, uint8 [B, H, W]; 255 where a case has none."""
        return patches.cut(self.slices("label", rows), corners, side)

    def slices(self, what: str, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Memory-mapped slices on the training grid: of 'image' uint16 [C, size, size], of 'label'
        uint8 [size, size]."""
        cases = np.searchsorted(self._first, rows, "right") - 1
        places = rows - self._first[cases]
        for case, at in zip(cases.tolist(), places.tolist(), strict=True):
            yield self._mapped(self.splits.train[case], what, self._size)[..., at, :, :]

    def has_label(self, case: str) -> bool:
        """Whether there is a label file."""
        return self._about[case]["label"]

    def volume(self, case: str) -> Volume:
        """A case on its own grid: image uint16 [C, D, H, W] and label uint8 [D, H, W], or None
        where there is none, memory-mapped."""
        spacing = self._about[case]["spacing"]
        label = self._mapped(case, "label") if self.has_label(case) else None
        return Volume(self._mapped(case, "image"), label, tuple(spacing) if spacing else None)

    def _map(self, case: str, what: str, size: int = 0) -> np.ndarray:
        path, (_, *shape) = self._folders[case] / f"{what}.npy", self._about[case]["shape"]
        if what == "label" and not self.has_label(case):
            return np.broadcast_to(np.uint8(NO_LABEL), (shape[0], size, size))
        if size and shape[1:] != [size, size]:
            path = path.with_stem(f"{what}_{size}")
        return np.asarray(np.load(path, mmap_mode="r"))  # views of a plain array are made faster


def quantise(image: np.ndarray) -> np.ndarray:
    """[0, 1] float -> uint16."""
    return np.round(image * LEVELS).astype(np.uint16)


def layout(data: ConfigDict) -> ModuleType:
    """The module of `data.name`."""
    return load_by_name("cgs_jax.data.layouts", data.name, "data set")


def from_files(data: ConfigDict) -> dict[str, Any]:
    """Values of the fields that are empty in `data` and that its files name."""
    module = layout(data)
    return {
        field: getattr(module, field)(data)
        for field in ("classes", "channels")
        if not data[field] and hasattr(module, field)
    }


def prepare(config: ConfigDict, splits: case_lists.Splits | None = None) -> Prepared:
    """Finds the scans, splits them unless `splits` is given, and makes the arrays that are new.

    Raises:
      UserError: scans are missing, broken or do not fit the configuration.
    """
    module, data = layout(config.data), config.data
    cases = module.find(data)
    splits = splits or case_lists.split(cases, data, data.split_seed)
    case_lists.check(splits, cases, data)
    cache = pathlib.Path(data.cache or pathlib.Path(data.root) / "cgs_cache")
    names = [*splits.train, *splits.val, *splits.test]
    folders = {name: cache / f"{name}_{_fingerprint(cases[name], data)}" for name in names}
    new = [name for name, folder in folders.items() if not folder.exists()]
    try:
        for name in tqdm(new, "preparing scans", unit="scan", disable=None if new else True):
            write(folders[name], _read(module, cases[name], data), data.size)
    except OSError as error:
        raise UserError(
            f"can not write to {cache} ({error.strerror}); choose a folder with --config.data.cache"
        ) from error
    return Prepared(folders, splits, data.size)


def _fingerprint(case: Case, data: ConfigDict) -> str:
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in (*case.image, *(case.label or ()))
    ]
    text = json.dumps([VERSION, {k: data[k] for k in OPTIONS}, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(module: ModuleType, case: Case, data: ConfigDict) -> Volume:
    image, label, spacing = module.read(case, data)
    if len(image) != data.channels:
        raise UserError(
            f"{case.image[0]} has {len(image)} channel(s); give --config.data.channels={len(image)}"
        )
    if label is not None:
        label = check_label(label, image, case.label[0], data.classes)
    return Volume(quantise(image), label, spacing)


def write(folder: pathlib.Path, volume: Volume, size: int) -> None:
    """Makes the cache entry `folder` of a volume with image uint16 [C, D, H, W] for training slices
    of size x size pixels."""
    image, label, spacing = volume
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix="unfinished_", dir=folder.parent))
    try:
        for what, array in (("image", image), ("label", label)):
            if array is None:
                continue
            np.save(unfinished / f"{what}.npy", np.ascontiguousarray(array))
            if array.shape[-2:] != (size, size):
                small = np.ascontiguousarray(resize(array, size, size))
                np.save(unfinished / f"{what}_{size}.npy", small)
        about = {"shape": image.shape, "label": label is not None, "spacing": spacing}
        (unfinished / "case.json").write_text(json.dumps(about))
        os.chmod(unfinished, 0o755)
        if not folder.exists():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
