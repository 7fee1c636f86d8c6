"""Raw scans -> arrays that training and evaluation read, once, cached.

A cache folder holds the training slices at training size as two flat files, and the validation and
test volumes on their own grids. Its name carries a fingerprint of the options and of every source
file, so a change prepares anew; it is written under another name and renamed when whole.
"""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from cgs_jax.data import case_lists
from cgs_jax.data.grid import resize
from cgs_jax.data.volume import Case, Volume, check_label
from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError

VERSION = 1  # of the cache layout


LEVELS = 65535  # images are uint16: half the bytes of float32 on disk, in memory and on the wire


NO_LABEL = 255


OPTIONS = ("name", "size", "normalise", "slicing", "classes")  # of data, that the arrays depend on


class Prepared:
    """A prepared data set.

    Attributes:
      images: [N, size, size] uint16 training slices, intensity times 65535, memory-mapped.
      labels: [N, size, size] uint8; 255 where a case has no label.
      splits: the case lists.
    """

    def __init__(self, folder: pathlib.Path, splits: case_lists.Splits, size: int):
        self.folder, self.splits = folder, splits
        index = json.loads((folder / "index.json").read_text())
        self._first, self._spacing = index["first_slice"], index["spacing"]
        shape = (self._first[-1][1], size, size)
        self.images = np.memmap(folder / "images.u16", np.uint16, "r", shape=shape)
        self.labels = np.memmap(folder / "labels.u8", np.uint8, "r", shape=shape)

    def rows(self, cases: list[str]) -> np.ndarray:
        """Rows of `images` that belong to `cases`."""
        wanted, rows = set(cases), []
        for (name, start), (_, stop) in zip(self._first, self._first[1:], strict=False):
            rows += range(start, stop) if name in wanted else ()
        return np.array(rows, np.int64)

    def volume(self, case: str) -> Volume:
        """A validation or test volume: uint16 image and uint8 label [D, H, W], memory-mapped."""
        image, label = (
            np.load(self.folder / "volumes" / f"{case}_{what}.npy", mmap_mode="r")
            for what in ("image", "label")
        )
        spacing = self._spacing[case]
        return Volume(image, label, tuple(spacing) if spacing else None)


def quantise(image: np.ndarray) -> np.ndarray:
    """[0, 1] float -> uint16."""
    return np.round(image * LEVELS).astype(np.uint16)


def layout(data: ConfigDict) -> ModuleType:
    """The module of `data.name`."""
    return load_by_name("cgs_jax.data.layouts", data.name, "data set")


def from_files(data: ConfigDict) -> dict[str, Any]:
    """Values of those fields that are empty in `data` and come with the data set: its classes."""
    module = layout(data)
    return {field: getattr(module, field)(data) for field in ("classes",) if not data[field]}


def prepare(config: ConfigDict, splits: case_lists.Splits | None = None) -> Prepared:
    """Finds the scans, splits them unless `splits` is given, and makes the arrays once.

    Raises:
      UserError: scans are missing, broken or do not fit the configuration.
    """
    module, data = layout(config.data), config.data
    cases = module.find(data)
    splits = splits or case_lists.split(cases, data, data.split_seed)
    case_lists.check(splits, cases, data)
    cache = pathlib.Path(data.cache or pathlib.Path(data.root) / "cgs_cache")
    folder = cache / f"{data.name}_{data.size}_{_fingerprint(cases, splits, data)}"
    if not (folder / "index.json").exists():
        try:
            _write(folder, module, cases, splits, data)
        except OSError as error:
            raise UserError(
                f"can not write to {cache} ({error.strerror}); choose a folder with "
                "--config.data.cache"
            ) from error
    return Prepared(folder, splits, data.size)


def _fingerprint(cases: dict[str, Case], splits: case_lists.Splits, data: ConfigDict) -> str:
    options = {k: data[k] for k in OPTIONS}
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for name in sorted({*splits.train, *splits.val, *splits.test})
        for path in (*cases[name].image, *(cases[name].label or ()))
    ]
    lists = [splits.train, splits.val, splits.test]
    text = json.dumps([VERSION, options, lists, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _write(folder, module, cases, splits, data):
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix="unfinished_", dir=folder.parent))
    try:
        (unfinished / "volumes").mkdir()
        first, spacing, count = [], {}, 0
        names = [*splits.train, *splits.val, *splits.test]
        train = set(splits.train)
        with (
            open(unfinished / "images.u16", "wb") as images,
            open(unfinished / "labels.u8", "wb") as labels,
        ):
            for name in tqdm(names, "preparing scans", unit="scan", disable=None):
                image, label, spacing[name] = _read(module, cases[name], data)
                if name in train:
                    first.append((name, count))
                    count += len(image)
                    image, label = (resize(x, data.size, data.size) for x in (image, label))
                    images.write(image.tobytes())
                    labels.write(label.tobytes())
                else:
                    np.save(unfinished / "volumes" / f"{name}_image.npy", image)
                    np.save(unfinished / "volumes" / f"{name}_label.npy", label)
        index = {"first_slice": [*first, ("", count)], "spacing": spacing}
        (unfinished / "index.json").write_text(json.dumps(index))
        os.chmod(unfinished, 0o755)
        if not folder.exists():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(module: ModuleType, case: Case, data: Any):
    image, label, spacing = module.read(case, data)
    if label is None:
        label = np.full(image.shape, NO_LABEL, np.uint8)
    else:
        label = check_label(label, image, case.label[0], data.classes)
    return quantise(image), label, spacing
