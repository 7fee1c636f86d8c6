"""Reading volumes: NIfTI orientation and checks, intensities to [0, 1], resizing, cleaning."""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from scipy import ndimage

from cgs_jax.errors import UserError

CANONICAL_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # x, y, z of RAS
SLICINGS = ("stored", "coarsest", *CANONICAL_AXES)


class Case(NamedTuple):
    """One scan on disk; `label` is None for an image-only scan.

    A scan that is stored slice by slice has its files in order. `test` marks a case that its data
    set reserves for testing.
    """

    name: str
    image: tuple[pathlib.Path, ...]
    label: tuple[pathlib.Path, ...] | None
    test: bool = False


class Volume(NamedTuple):
    """A stack of slices.

    `image` float32 [D, H, W] in [0, 1]; `label` uint8 [D, H, W] or None; `spacing` millimetres
    along D, H, W, or None where the files do not tell.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] | None


class Scan(NamedTuple):
    """A NIfTI array turned to [slice, row, column], and how to turn a label map back."""

    array: np.ndarray
    spacing: tuple[float, float, float]
    permutation: tuple[int, ...]
    flipped: tuple[int, ...]
    nifti: Any

    def corners(self) -> np.ndarray:
        """World coordinates (mm) of the first voxel and of the last one along each axis: [4, 3]."""
        index = np.vstack([np.zeros(3), np.diag(np.array(self.array.shape) - 1)])
        for axis in self.flipped:
            index[:, axis] = self.array.shape[axis] - 1 - index[:, axis]
        return nib.affines.apply_affine(self.nifti.affine, index[:, np.argsort(self.permutation)])

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """[slice, row, column] -> axes and directions of the file."""
        array = np.flip(array, self.flipped).transpose(np.argsort(self.permutation))
        return array.reshape(self.nifti.shape)


def read_nifti(path: pathlib.Path, slicing: str) -> Scan:
    """Reads a 3D NIfTI file as a stack of slices.

    Args:
      path: `.nii` or `.nii.gz`; trailing axes of length 1 are dropped.
      slicing: 'axial', 'coronal' or 'sagittal' cut the scan in RAS orientation, 'coarsest' across
        the axis of largest spacing in RAS orientation, 'stored' along the file's third axis without
        regard to its orientation (what SimpleITK's arrays are).

    Raises:
      UserError: not readable, not 3D, or without a usable orientation; names the file.
    """
    if slicing not in SLICINGS:
        raise UserError(f"unknown data.slicing {slicing!r}; there are: {', '.join(SLICINGS)}")
    try:
        nifti = nib.load(path)
        array = np.asanyarray(nifti.dataobj)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except PermissionError:
        raise UserError(f"{path} is not readable: check its permissions") from None
    except Exception as error:
        raise UserError(f"{path} is not a whole NIfTI file, get it again ({error})") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or not array.size:
        raise UserError(f"{path} has shape {nifti.shape}; one 3D volume per file is read")
    if slicing == "stored":
        permutation, flipped = (2, 1, 0), ()
    else:
        permutation, flipped = _orientation(path, nifti, slicing)
    array = np.flip(array.transpose(permutation), flipped)
    zooms = nifti.header.get_zooms()
    spacing = tuple(float(zooms[axis]) for axis in permutation)
    return Scan(array, spacing, permutation, flipped, nifti)


def _orientation(path, nifti, slicing):
    to_ras = nib.orientations.io_orientation(nifti.affine)
    if np.isnan(to_ras).any():
        raise UserError(
            f"{path}: its affine has no orientation; repair it or use data.slicing=stored"
        )
    stored_axis = np.argsort(to_ras[:, 0])  # of RAS axes x, y, z
    zooms = np.array(nifti.header.get_zooms()[:3])[stored_axis]
    if slicing == "coarsest":
        # Ties, up to rounding of the header, go to the axial direction.
        cut = max(range(3), key=lambda axis: (round(float(zooms[axis]), 2), axis))
    else:
        cut = CANONICAL_AXES[slicing]
    order = [cut, *(axis for axis in (2, 1, 0) if axis != cut)]
    permutation = tuple(int(stored_axis[axis]) for axis in order)
    flipped = tuple(i for i, axis in enumerate(permutation) if to_ras[axis, 1] < 0)
    return permutation, flipped


def read_nifti_case(case: Case, data: Any) -> Volume:
    """Reads image and, where there is one, label of a NIfTI case by the options of `config.data`.

    Raises:
      UserError: image and label do not fit each other.
    """
    scan = read_nifti(case.image[0], data.slicing)
    image = normalise(finite(scan.array, case.image[0]), data.normalise)
    if case.label is None:
        return Volume(image, None, scan.spacing)
    label = read_nifti(case.label[0], data.slicing)
    if label.array.shape == scan.array.shape:  # else `check_label` has its say
        apart = np.abs(label.corners() - scan.corners()).max()
        if apart > min(scan.spacing) / 2:
            raise UserError(
                f"{case.label[0]} lies up to {apart:.1f} mm off {case.image[0]} by their affines"
            )
    return Volume(image, label.array, scan.spacing)


def finite(image: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Returns the image as float32.

    Raises:
      UserError: it holds NaN or infinity; names the file.
    """
    if image.dtype.kind not in "biuf":
        raise UserError(f"{path} holds {image.dtype} values; one intensity a voxel is read")
    image = np.ascontiguousarray(image, np.float32)
    bad = np.count_nonzero(~np.isfinite(image))
    if bad:
        raise UserError(f"{path} has {bad} voxels that are NaN or infinite; repair or remove it")
    return image


def check_label(
    label: np.ndarray, image: np.ndarray, path: pathlib.Path, classes: Sequence[str]
) -> np.ndarray:
    """Returns the label map as uint8.

    Raises:
      UserError: its shape is not that of the image, or it has values besides 0..len(classes).
    """
    if label.shape != image.shape:
        raise UserError(f"{path} has shape {label.shape}, its image {image.shape} (slices first)")
    rounded = np.rint(label)  # float labels may be off by rounding
    valid = (abs(label - rounded) < 1e-3) & (rounded >= 0) & (rounded <= len(classes))
    if not valid.all():
        names = ", ".join(f"{i} {name}" for i, name in enumerate(("background", *classes)))
        raise UserError(f"{path} has label value {label[~valid][0]:g}; the classes are {names}")
    return np.ascontiguousarray(rounded, np.uint8)


def normalise(image: np.ndarray, how: Sequence[float] | str) -> np.ndarray:
    """Intensities to [0, 1], clipped.

    `how`: (low, high) for a fixed window such as Hounsfield units; 'minmax' of the volume;
    'percentile' for its 0.5 and 99.5 percentiles.
    """
    if isinstance(how, str) and how.startswith("("):
        how = how.strip("()").split(",")  # from the command line
    if how in ("minmax", ("minmax",)):
        low, high = float(image.min()), float(image.max())
    elif how in ("percentile", ("percentile",)):
        low, high = (float(v) for v in np.percentile(image, (0.5, 99.5)))
    else:
        try:
            low, high = map(float, how)
        except ValueError:
            low = high = 0.0
        if not -np.inf < low < high < np.inf:
            raise UserError(f"data.normalise={how!r}: give (low, high), minmax or percentile")
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1, dtype=np.float32)


def resize(stack: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes every slice of [D, H, W], nearest neighbour on corner-aligned grids.

    This is `scipy.ndimage.zoom(order=0)`, which the literature uses for images and labels alike.
    """
    rows, columns = (
        np.floor(_places(old, new) + 0.5).astype(int)
        for old, new in zip(stack.shape[1:], (height, width), strict=True)
    )
    return stack[:, rows[:, None], columns]


def _places(old, new):
    """Where `new` samples lie among `old` ones, the first and the last on each other."""
    return np.arange(new) * ((old - 1) / max(new - 1, 1))


def likeliest(probs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels uint8 [D, height, width] of scores of classes [D, H, W, C], such as probabilities,
    which are interpolated linearly, on corner-aligned grids too.

    Only where the four pixels around a place have different labels need they be interpolated.
    """
    rows, columns = (
        _neighbours(old, new) for old, new in zip(probs.shape[1:3], (height, width), strict=True)
    )
    around = list(itertools.product(rows, columns))
    labels = np.argmax(probs, -1).astype(np.uint8)
    first, *others = (labels[:, r[:, None], c] for (r, _), (c, _) in around)
    unsure = functools.reduce(np.logical_or, (first != other for other in others))
    d, y, x = np.nonzero(unsure)
    mixed = sum(
        probs[d, r[y], c[x]] * (share_r[y] * share_c[x])[:, None]
        for (r, share_r), (c, share_c) in around
    )
    first[d, y, x] = np.argmax(mixed, -1)
    return first


def _neighbours(old, new):
    """Of each of `new` samples the two of `old` around it, and the share of each."""
    at = _places(old, new)
    below = np.floor(at).astype(int)
    share = (at - below).astype(np.float32)
    return (below, 1 - share), (np.minimum(below + 1, old - 1), share)


def keep_largest(labels: np.ndarray, num_targets: int) -> np.ndarray:
    """[D, H, W] with only the largest piece, connected through faces of voxels, of each target."""
    kept = np.zeros_like(labels)
    for target in range(1, num_targets + 1):
        mask = labels == target
        pieces, _ = ndimage.label(mask)
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0  # all else
        kept[mask & (pieces == sizes.argmax())] = target
    return kept
