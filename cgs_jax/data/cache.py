"""Raw scans -> arrays that training and evaluation read, once, cached: a folder a case.

Its name carries a fingerprint of the case's files and of the options that shape its arrays, and
nothing of the splits: other lists prepare nothing, one more scan prepares only that one. A folder
is written under another name and renamed when whole. It holds

- `image.npy` uint16 [C, D, H, W], and `label.npy` uint8 [D, H, W] where there is a label file;
- `image_GRID.npy` and `label_GRID.npy`, the same on the training grid, where that is another; of
  cases without label, which only train, these alone are kept;
- `case.json`: shape, the numbers that the label has, or null where there is none, spacing, a digest
  of image and label each, and the bytes of the other files: an entry whose files have not as many
  is made anew.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import case_lists, exemplar, tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.prepared import Entry, Prepared, checksum
from cgs_jax.data.volume import Case, Volume, check_label
from cgs_jax.runtime import threads
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError, naming

VERSION = 3  # of the cache layout
LEVELS = 65535  # images are uint16: half the bytes of float32 on disk, in memory and on the wire
# of data, that the arrays depend on
OPTIONS = ("name", "size", "spacing", "slice_spacing", "normalise", "slicing", "classes")
OPTIONS += ("channels", "trust_shapes", "numbers", "ignore")
OF_LABELS = {"classes", "trust_shapes", "numbers", "ignore"}  # those that labels alone depend on
MOST_PROBLEMS = 10  # scans that can not be used, after which no more are tried
UNFINISHED = "unfinished_"  # how the name of an entry begins that is not whole yet


def quantise(image: np.ndarray) -> np.ndarray:
    """[0, 1] float -> uint16."""
    return np.round(image * LEVELS).astype(np.uint16)


def prepare(config: ConfigDict, splits: case_lists.Splits | None = None) -> Prepared:
    """Finds the scans, splits them unless `splits` is given, and makes the arrays that are new.

    Raises:
      UserError: scans are missing, broken or do not fit the configuration.
    """
    entries, parts, known = {}, [], tasks.tasks(config.data)
    for name, task in known.items():
        with tasks.of_member(name):
            own = splits and case_lists.part(splits, config.data, name)
            cases, own = _prepare_task(task, own)
            entries |= {task.full_name(case): entry for case, entry in cases.items()}
            parts.append(case_lists.Splits(*([*map(task.full_name, of)] for of in own)))
    together = case_lists.Splits(*(sum(lists, []) for lists in zip(*parts, strict=True)))
    volumes = config.data.depth > 0
    prepared = Prepared(entries, together, config.data.classes, volumes=volumes)
    _tell_copies(prepared)
    for part in ("val", "test"):
        cases = getattr(together, part)
        if cases and not any(map(prepared.scored, cases)):
            regions = " of a whole region" if any(t.data.regions for t in known.values()) else ""
            raise UserError(f"no {part} case is annotated for all{regions} that is scored")
    found = [exemplar.find(prepared, task) for task in known.values() if task.data.exemplar]
    if not found:
        return prepared
    with_one = {prepared.task(case).name for case, _ in found}
    rest = [case for case in together.labelled if prepared.task(case).name not in with_one]
    together = together._replace(labelled=rest + [case for case, _ in found])
    return Prepared(entries, together, config.data.classes, found)


def _tell_copies(prepared):
    """Patients are told by names, in each data set; voxels tell a scan that has two names."""
    digests, seen = prepared.digests(), {}
    for part in ("train", "val", "test"):
        for case in getattr(prepared.splits, part):
            where, other = seen.setdefault(digests[case]["image"], (part, case))
            if where != part:
                say(
                    f"WARNING: {other} of {where} and {case} of {part} are the same scan; leave "
                    "one of them out with --config.data.splits, or scores mean little"
                )


def _prepare_task(task, splits):
    """Entries by case, and the case lists, of one data set."""
    data, module = task.data, tasks.layout(task.data)
    cases = module.find(data)
    splits = splits or case_lists.split(cases, data, data.split_seed)
    case_lists.tell(splits, data, task.name)
    case_lists.check(splits, cases, data)
    cache, folders, problems = folder_of(data), {}, {}
    for name in (*splits.train, *splits.val, *splits.test):
        unused = () if cases[name].label else OF_LABELS
        options = {k: data[k] for k in OPTIONS if k not in unused}
        folders[name] = cache / f"{name}_{digest(cases[name], data, options)}"
    new = shuffled([name for name, folder in folders.items() if not _is_whole(folder)])

    def make(name):
        if len(problems) >= MOST_PROBLEMS or _is_whole(folders[name]):  # by another process
            return
        try:
            volume = _read(module, cases[name], data)
            with naming(cases[name].image[0]):
                write(folders[name], volume, Grid.of(data))
        except UserError as error:
            problems[name] = str(error)

    _remove_leftovers(cache)
    try:
        threads.each(make, new, "preparing scans")
    except OSError as error:
        problem = f"can not write to {cache} ({error.strerror or 'is the disk full?'})"
        raise UserError(
            f"{problem}; choose a folder with --config.data.cache (evaluate: --cache)"
        ) from error
    if problems:
        raise UserError("; ".join(problems[name] for name in sorted(problems)))
    entries = {name: Entry(path, task, cases[name].annotated) for name, path in folders.items()}
    return entries, splits


def shuffled(names: list[str]) -> list[str]:
    """In another order in each process, so that several that prepare at once share the work."""
    return np.random.default_rng().permutation(names).tolist()


def _occurrences(label):
    """How often each of 0 to 255 occurs; by slice, for a count has eight bytes a voxel."""
    return sum(np.bincount(of_slice.ravel(), minlength=256) for of_slice in label)


def _is_whole(folder):
    """Whether an entry is there with all its bytes; a crash of the machine may leave fewer."""
    try:
        about = json.loads((folder / "case.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in about["bytes"]}
        return sizes == about["bytes"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _remove_leftovers(cache):
    """What a kill has left; entries that another process is writing are younger than a day."""
    for path in cache.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime > time.time() - 24 * 3600:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder_of(data: ConfigDict) -> pathlib.Path:
    """Where what is made of the scans of a data set is kept."""
    return pathlib.Path(data.cache or pathlib.Path(data.root) / "cgs_cache")


def digest(case: Case, data: ConfigDict, options: Any) -> str:
    """Changes with the files of a case, and with the `options` that decide what is made of them.

    Files in a folder that has its own cache are named from there: it may be moved with it.
    """
    root, files = pathlib.Path(data.root), []
    for path in (*case.image, *(case.label or ())):
        inside = not data.cache and path.is_relative_to(root)
        name = path.relative_to(root) if inside else path.absolute()
        files.append((str(name), path.stat().st_size, path.stat().st_mtime_ns))
    text = json.dumps([VERSION, options, files], sort_keys=True)
    return checksum(text.encode())[:12]


def _read(module: ModuleType, case: Case, data: ConfigDict) -> Volume:
    image, label, spacing = module.read(case, data)
    if len(image) != data.channels:
        raise UserError(
            f"{case.image[0]} has {len(image)} channel(s); give --config.data.channels={len(image)}"
        )
    if label is not None:
        # A file a slice, or one of the case: what is wrong is named by its file.
        files = case.label if len(case.label) == len(label) else case.label[:1]
        parts = np.array_split(label, len(files)), np.array_split(image, len(files), 1)
        options = data.classes, data.numbers, data.ignore
        checked = [check_label(*part, *options) for part in zip(*parts, files, strict=True)]
        label = np.concatenate(checked)
    return Volume(quantise(image), label, spacing)


def write(folder: pathlib.Path, volume: Volume, grid: Grid) -> None:
    """Makes the cache entry `folder` of a volume with image uint16 [C, D, H, W], with its slices on
    the training grid."""
    image, label, spacing = volume
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    try:
        same, digests = grid.shape(image.shape[1:], spacing) == image.shape[1:], {}
        for what, array, to_grid in (("image", image, grid.image), ("label", label, grid.label)):
            if array is None:
                continue
            array = np.ascontiguousarray(array)
            digests[what] = checksum(array, repr((array.shape, spacing)).encode())
            if same or label is not None:
                np.save(unfinished / f"{what}.npy", array)
            if not same:
                resampled = np.ascontiguousarray(to_grid(array, spacing))
                np.save(unfinished / f"{what}_{grid.name}.npy", resampled)
        numbers = None if label is None else np.flatnonzero(_occurrences(label)).tolist()
        about = {"shape": image.shape, "label": numbers, "spacing": spacing}
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        about |= {"digests": digests, "bytes": sizes}
        (unfinished / "case.json").write_text(json.dumps(about))
        os.chmod(unfinished, 0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if _is_whole(folder):  # another process was faster
                return
            damaged = unfinished.with_name(f"{unfinished.name}_damaged")
            folder.rename(damaged)  # not removed in place, where another process may put its own
            unfinished.rename(folder)
            shutil.rmtree(damaged, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
