"""Scans and volumes: checks of image and label, intensities to [0, 1], cleaning."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from cgs_jax.runtime.errors import UserError

NO_LABEL = 255  # of voxels of which nobody says what they are


class Case(NamedTuple):
    """One scan on disk; `label` is None for an image-only scan.

    A scan that is stored slice by slice, or channel by channel, has its files in order. `test`
    marks a case that its data set reserves for testing. `annotated` names the organs that its label
    file marks; None: all.
    """

    name: str
    image: tuple[pathlib.Path, ...]
    label: tuple[pathlib.Path, ...] | None
    test: bool = False
    annotated: tuple[str, ...] | None = None


class Volume(NamedTuple):
    """A stack of slices.

    `image` [C, D, H, W], float32 in [0, 1] as it is read, and once it is prepared uint16, 65535
    times that; `label` uint8 [D, H, W], with NO_LABEL where nobody annotated, or None; `spacing`
    millimetres along D, H, W, or None where the files do not tell.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] | None

    @property
    def aspect(self) -> float:
        """Height by width of a pixel; 1 where the files do not tell."""
        return self.spacing[1] / self.spacing[2] if self.spacing else 1.0


def finite(image: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Returns the image as float32.

    Raises:
      UserError: it holds NaN, infinity or what is one in float32; names the file.
    """
    _check_numbers(image, path, "intensity")
    with np.errstate(over="ignore"):
        image = np.ascontiguousarray(image, np.float32)
    bad = np.count_nonzero(~np.isfinite(image))
    if bad:
        raise UserError(
            f"{path} has {bad} voxels that are NaN or infinite in float32; repair or remove it"
        )
    return image


def _check_numbers(array, path, what):
    if array.dtype.kind not in "biuf":  # such as colours or complex numbers
        raise UserError(f"{path} holds {array.dtype} values; one {what} a voxel is read")


def stored_labels(classes: Sequence[str], numbers: Sequence[int] = ()) -> tuple[int, ...]:
    """What label files have for background and `classes`: 0, and `numbers`, or 1, 2, ..."""
    return (0, *(numbers or range(1, 1 + len(classes))))


def check_label(
    label: np.ndarray,
    image: np.ndarray,
    path: pathlib.Path,
    classes: Sequence[str],
    numbers: Sequence[int] = (),
    ignore: int = 0,
) -> np.ndarray:
    """Returns the label map [D, H, W] of an image [C, D, H, W] as uint8: 1 for the first of
    `classes`, which is `numbers[0]` in the file, or 1 if there are none, and so on; NO_LABEL for
    what is `ignore` in the file, where that is not 0.

    Raises:
      UserError: its shape is not that of the image, it does not hold one number a voxel, or it has
        values of no class.
    """
    if label.shape != image.shape[1:]:
        shape = image.shape[1:]
        raise UserError(f"{path} has shape {label.shape}, its image {shape} (slices first)")
    _check_numbers(label, path, "label")
    stored = stored_labels(classes, numbers)
    names = dict(zip(stored, ("background", *classes), strict=True))
    own = dict(zip(stored, range(len(stored)), strict=True))
    if ignore:
        names[ignore], own[ignore] = "not annotated", NO_LABEL
    table = np.full(max(own) + 2, -1, np.int16)  # its last place is for what is no class
    for value, number in own.items():
        table[value] = number
    rounded = np.rint(label)  # float labels may be off by rounding
    whole = abs(label - rounded) < 1e-3
    places = np.where(whole, np.clip(rounded, -1, len(table) - 1), -1).astype(np.int32)
    found = table[places]
    if (wrong := found < 0).any():
        known = ", ".join(f"{value} {name}" for value, name in names.items())
        raise UserError(f"{path} has label value {label[wrong][0]:g}; the classes are {known}")
    return np.ascontiguousarray(found, np.uint8)


def normalise(image: np.ndarray, how: Sequence[float] | str) -> np.ndarray:
    """Intensities to [0, 1], clipped.

    `how`: (low, high) for a fixed window such as Hounsfield units; 'minmax' of the volume;
    'percentile' for its 0.5 and 99.5 percentiles.
    """
    if how == "minmax":
        low, high = float(image.min()), float(image.max())
    elif how == "percentile":
        low, high = (float(v) for v in np.percentile(image, (0.5, 99.5)))
    else:
        try:
            low, high = map(float, how)
        except (TypeError, ValueError):
            low = high = 0.0
        if not -np.inf < low < high < np.inf:
            raise UserError(
                f"data.normalise={how!r}: give (low, high), minmax or percentile, or auto"
            )
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1, dtype=np.float32)


def keep_largest(labels: np.ndarray, num_targets: int) -> np.ndarray:
    """[D, H, W] with only the largest piece, connected through faces of voxels, of each target."""
    kept = np.zeros_like(labels)
    for target, box in enumerate(ndimage.find_objects(labels, num_targets), 1):
        if box:  # else the target is nowhere
            pieces, _ = ndimage.label(labels[box] == target)
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0  # all else
            kept[box][pieces == sizes.argmax()] = target
    return kept
