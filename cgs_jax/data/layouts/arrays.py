"""Cases stored as arrays, whole or slice by slice: `.h5` and `.npz` with keys image and label."""

import pathlib
import re
from typing import Any

import h5py
import numpy as np

from cgs_jax.data.volume import Case, Volume, finite
from cgs_jax.runtime.errors import UserError


def group_slices(folder: pathlib.Path, pattern: str) -> dict[str, Case]:
    """Files whose name matches `pattern` = (case)...(slice number) -> cases with ordered files."""
    found: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(pattern, path.name)
        if match:
            found.setdefault(match[1], []).append((int(match[2]), path))
    ordered = {name: tuple(path for _, path in sorted(paths)) for name, paths in found.items()}
    return {name: Case(name, files, files) for name, files in sorted(ordered.items())}


def read_arrays(case: Case, normalise: Any) -> Volume:
    """Stacks the arrays of a case; `normalise` maps the stack to [0, 1]. Spacing is unknown.

    Raises:
      UserError: a file is not readable, lacks a key, or its shape differs from the others'.
    """
    images, labels = [], []
    for path in case.image:
        image, label = _read(path)
        image = image[None] if image.ndim == 2 else image
        label = label[None] if label.ndim == 2 else label
        if images and image.shape[1:] != images[0].shape[1:]:
            raise UserError(f"{path} has shape {image.shape[1:]}, not {images[0].shape[1:]}")
        if image.shape != label.shape:
            raise UserError(f"{path}: image has shape {image.shape}, label {label.shape}")
        images.append(finite(image, path))
        labels.append(label)
    return Volume(normalise(np.concatenate(images)), np.concatenate(labels), None)


def _read(path):
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return file["image"], file["label"]
        with h5py.File(path) as file:
            return file["image"][()], file["label"][()]
    except KeyError:
        raise UserError(f"{path} lacks 'image' or 'label'") from None
    except Exception as error:
        raise UserError(f"{path} is not readable, get it again ({error})") from error
