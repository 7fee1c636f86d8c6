"""Cases stored as arrays, whole or slice by slice: `.h5` and `.npz` with keys image and label."""

import functools
import pathlib
import re
from typing import Any

import h5py
import numpy as np

from cgs_jax.data.volume import Case, Volume, finite
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError

_warn = functools.cache(say)  # cases are looked up several times


def group_slices(folder: pathlib.Path, pattern: str) -> dict[str, Case]:
    """Files whose name matches `pattern` = (case)...(slice number) -> cases with ordered files."""
    found: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(pattern, path.name)
        if match:
            found.setdefault(match[1], []).append((int(match[2]), path))
    for name, paths in sorted(found.items()):
        numbers = {number for number, _ in paths}
        if lacking := set(range(min(numbers), max(numbers))) - numbers:
            _warn(f"WARNING: slice {min(lacking)} of {name} is not in {folder}; it is passed over")
    ordered = {name: tuple(path for _, path in sorted(paths)) for name, paths in found.items()}
    return {name: Case(name, files, files) for name, files in sorted(ordered.items())}


def read_arrays(case: Case, normalise: Any) -> Volume:
    """Stacks the arrays of a case; `normalise` maps each channel to [0, 1]. Spacing is unknown.

    A file holds a label [H, W] or [D, H, W], and an image of that shape or, where it has an axis
    more, with its channels first.

    Raises:
      UserError: a file is not readable, lacks a key, or its shape differs from the others'.
    """
    images, labels = [], []
    for path in case.image:
        image, label = _read(path)
        image = image[None] if image.ndim == label.ndim else image
        if image.shape[1:] != label.shape or label.ndim not in (2, 3):
            raise UserError(f"{path}: image has shape {image.shape}, label {label.shape}")
        if label.ndim == 2:
            image, label = image[:, None], label[None]
        if images and (x := image[:, 0].shape) != (first := images[0][:, 0].shape):
            raise UserError(f"{path} has channels, rows and columns {x}, not {first}")
        images.append(finite(image, path))
        labels.append(label)
    channels = map(normalise, np.concatenate(images, 1))
    return Volume(np.stack(list(channels)), np.concatenate(labels), None)


def _read(path):
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return file["image"], file["label"]
        with h5py.File(path) as file:
            return file["image"][()], file["label"][()]
    except KeyError:
        raise UserError(f"{path} lacks 'image' or 'label'") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None
    except Exception as error:
        raise UserError(f"{path} is not readable, get it again ({error})") from error
