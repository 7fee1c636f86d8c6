"""Reading scans: orientation, and checks that image and label lie on each other.

They are NIfTI files, or such as SimpleITK reads, which become the same in memory.
"""

import gzip
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from cgs_jax.data import itk
from cgs_jax.data.volume import Case, Volume, finite, normalise
from cgs_jax.runtime.errors import UserError, check_choice
from cgs_jax.runtime.files import whole

CANONICAL_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # x, y, z of RAS
ENDINGS = (".nii.gz", ".nii", *itk.ENDINGS)  # of file names
NO_SCAN = re.compile(r"\..*|.*\.seg\.nrrd")
MILLIMETRES = {1: 1000.0, 3: 0.001}  # of a header's metre and micron; else millimetres are meant
SLICINGS = ("stored", "coarsest", *CANONICAL_AXES)


def by_name(files: Iterable[tuple[str, pathlib.Path]]) -> dict[str, pathlib.Path]:
    """Pairs of a name and a file, as found anywhere below a folder, sorted.

    Raises:
      UserError: two files have one name, such as a scan and its prediction.
    """
    found = {}
    for name, path in sorted(files):
        if found.setdefault(name, path) != path:
            raise UserError(f"{found[name]} and {path} are both {name}; move one elsewhere")
    return found


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
        stored = index[:, np.argsort(self.permutation)]
        return _unit(self.nifti) * nib.affines.apply_affine(self.nifti.affine, stored)

    def stored(self) -> np.ndarray:
        """The array with the axes and directions of the file."""
        return np.flip(self.array, self.flipped).transpose(np.argsort(self.permutation))

    def turned(self, stored: np.ndarray) -> np.ndarray:
        """Another array that is stored as this one, turned as it is."""
        return np.flip(stored.transpose(self.permutation), self.flipped)

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """[slice, row, column] -> axes and directions of the file."""
        return self._replace(array=array).stored().reshape(self.nifti.shape)


def read_nifti(path: pathlib.Path, slicing: str, values: bool = True) -> Scan:
    """Reads a 3D NIfTI file as a stack of slices.

    Args:
      path: one of ENDINGS; trailing axes of length 1 are dropped.
      slicing: 'axial', 'coronal' or 'sagittal' cut the scan in RAS orientation, 'coarsest' across
        the axis of largest spacing in RAS orientation, 'stored' along the file's third axis without
        regard to its orientation (what SimpleITK's arrays are).
      values: False leaves the values out, zeros stand for them. Of a NIfTI file then only the
        header is read, and damage of its values is not found.

    Raises:
      UserError: not readable, damaged, not 3D, or without a usable place; names the file.
    """
    check_choice("data.slicing", slicing, SLICINGS)
    try:
        nifti = _load(path) if values else _header(path)
        array = np.asanyarray(nifti.dataobj) if values else np.broadcast_to(np.int8(0), nifti.shape)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except PermissionError:
        raise UserError(f"{path} is not readable: check its permissions") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; put the scan in its place") from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} does not fit into memory") from None
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{path} is not a whole scan, get it again ({why})") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3 or not array.size:
        raise UserError(
            f"{path} has shape {nifti.shape}; one 3D volume per file is read, see docs/own_data.md"
        )
    # pixdim may say else, but places are by the affine; its noise would round sizes of grids up
    spacings = (_unit(nifti) * nib.affines.voxel_sizes(nifti.affine)).round(6)
    if not (np.isfinite(nifti.affine).all() and min(spacings) > 0):
        raise UserError(f"{path}: its affine has no usable numbers; repair its header")
    if slicing == "stored":
        permutation, flipped = (2, 1, 0), ()
    else:
        permutation, flipped = _orientation(path, nifti.affine, spacings, slicing)
    array = np.flip(array.transpose(permutation), flipped)
    spacing = tuple(float(spacings[axis]) for axis in permutation)
    return Scan(array, spacing, permutation, flipped, nifti)


def _unit(nifti):
    """Millimetres of 1 in its affine."""
    return MILLIMETRES.get(int(nifti.header["xyzt_units"]) % 8, 1.0)


def _load(path):
    """Reads the whole file, so that gzip's checksum is looked at, which nibabel does not."""
    if path.name.endswith(itk.ENDINGS):
        return itk.load(path)
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data = gzip.decompress(data)
    kinds = (nib.Nifti1Image, nib.Nifti2Image)
    kind = next((kind for kind in kinds if kind.header_class.may_contain_header(data)), None)
    if kind is None:
        raise ValueError("no NIfTI header")
    nifti = kind.from_bytes(data)
    needed = math.prod(nifti.shape) * nifti.get_data_dtype().itemsize
    if len(data) < nifti.dataobj.offset + needed:  # before memory is asked for
        raise ValueError(f"{len(data)} bytes, but its header says {needed}")
    return nifti


def _header(path):
    """The image with its values left in the file, where its header goes with the file's size; else
    the whole file, which says what is wrong."""
    try:
        nifti = nib.load(path)
        needed = nifti.dataobj.offset + math.prod(nifti.shape) * nifti.get_data_dtype().itemsize
        with path.open("rb") as file:
            size = file.seek(-4, os.SEEK_END) + 4
            if packed := path.name.endswith(".gz"):  # it ends with the unpacked size modulo 2 ** 32
                size = int.from_bytes(file.read(4), "little")
        whole = size == needed % 2**32 if packed else size >= needed
        if whole and isinstance(nifti, (nib.Nifti1Image, nib.Nifti2Image)):
            return nifti
    except Exception:
        pass
    return _load(path)


def _orientation(path, affine, spacings, slicing):
    to_ras = nib.orientations.io_orientation(affine)
    if np.isnan(to_ras).any():
        raise UserError(
            f"{path}: its affine has no orientation; repair it or use data.slicing=stored"
        )
    stored_axis = np.argsort(to_ras[:, 0])  # of RAS axes x, y, z
    if slicing == "coarsest":
        # Ties, up to rounding of the header, go to the axial direction.
        of_axes = (spacings[stored_axis] / max(spacings)).round(3).tolist()
        cut = max(range(3), key=lambda axis: (of_axes[axis], axis))
    else:
        cut = CANONICAL_AXES[slicing]
    order = [cut, *(axis for axis in (2, 1, 0) if axis != cut)]
    permutation = tuple(int(stored_axis[axis]) for axis in order)
    flipped = tuple(i for i, axis in enumerate(permutation) if to_ras[axis, 1] < 0)
    return permutation, flipped


def read_nifti_case(case: Case, data: Any) -> Volume:
    """Reads image and, where there is one, label of a NIfTI case by the options of `config.data`.

    Raises:
      UserError: channels, or image and label, do not fit each other.
    """
    image, scan = read_channels(case.image, data)
    label = None if case.label is None else read_label(case.label[0], case.image[0], scan, data)
    return Volume(image, label, scan.spacing)


def read_label(path: pathlib.Path, image: pathlib.Path, scan: Scan, data: Any) -> np.ndarray:
    """Label map [D, H, W] of the `scan` that was read from `image`.

    With `data.trust_shapes` it lies on the scan voxel by voxel as both are stored, whatever its own
    affine says. Other shapes are an error of `check_label`.

    Raises:
      UserError: it lies elsewhere.
    """
    label = read_nifti(path, data.slicing)
    if data.trust_shapes:
        return scan.turned(label.stored())
    if label.array.shape == scan.array.shape:
        advice = "; if only the affine is wrong, give --config.data.trust_shapes=True"
        _check_place(path, label, image, scan, advice)
    return label.array


def ending_of(path: pathlib.Path) -> str:
    """Which of ENDINGS its name has; '' for none."""
    return next((ending for ending in ENDINGS if path.name.endswith(ending)), "")


def scans_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Scans and label maps in a folder by their names, or `folder` itself if it is such a file;
    without hidden files, and what 3D Slicer has segmented. None where it is not there.

    Raises:
      UserError: an ending is in capitals, which other programs would not find.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    for path in files:
        small = pathlib.Path(path.name.lower())
        odd = path.is_file() and not ending_of(path) and not NO_SCAN.fullmatch(small.name)
        if odd and (ending := ending_of(small)):
            raise UserError(f"{path}: write its ending in small letters, {ending}")
    return [path for path in files if ending_of(path) and not NO_SCAN.fullmatch(path.name)]


def save(nifti: Any, path: pathlib.Path) -> None:
    """Writes a volume as a file of the kind that the ending says, whole or not at all."""
    with whole(path) as unfinished:
        (itk.save if path.name.endswith(itk.ENDINGS) else nib.save)(nifti, unfinished)


def channels_of(path: pathlib.Path, count: int) -> tuple[str, str, tuple[pathlib.Path, ...]]:
    """Case, file ending, and the files CASE_0000.nii.gz, CASE_0001.nii.gz, ... of the `count`
    channels of the scan that `path` belongs to.

    Raises:
      UserError: one is missing, or `path` is none of them.
    """
    ending = ending_of(path)
    case = path.name.removesuffix(ending).rpartition("_")[0]
    paths = tuple(path.with_name(f"{case}_{i:04d}{ending}") for i in range(count))
    lacking = [other for other in paths if not other.exists()]
    if lacking or path not in paths:
        problem = f"no {lacking[0]}" if path in paths else f"unexpected {path}"
        raise UserError(f"{problem}: scans have {count} channel(s), CASE_0000{ending} and so on")
    return case, ending, paths


def read_channels(paths: Sequence[pathlib.Path], data: Any) -> tuple[np.ndarray, Scan]:
    """Reads an image, a file a channel, each scaled on its own by the options of `config.data`.

    Returns:
      float32 [C, D, H, W] in [0, 1], and the scan of the first file.

    Raises:
      UserError: a channel has not the shape or the place of the first.
    """
    scans = read_scans(paths, data.slicing)
    arrays = (finite(scan.array, path) for path, scan in zip(paths, scans, strict=True))
    return np.stack([normalise(array, data.normalise) for array in arrays]), scans[0]


def read_scans(paths: Sequence[pathlib.Path], slicing: str, values: bool = True) -> list[Scan]:
    """The channels of a case, as stored; `values` as of `read_nifti`.

    Raises:
      UserError: one has not the shape or the place of the first.
    """
    scans = [read_nifti(path, slicing, values) for path in paths]
    first = scans[0]
    for path, scan in zip(paths, scans, strict=True):
        if scan.array.shape != first.array.shape:
            raise UserError(
                f"{path} has shape {scan.nifti.shape}, {paths[0]} {first.nifti.shape}; "
                "channels of a case must have one grid"
            )
        _check_place(path, scan, paths[0], first)
    return scans


def _check_place(path, scan, reference_path, reference, advice=""):
    apart = np.abs(scan.corners() - reference.corners()).max()
    if apart > min(reference.spacing) / 2:
        raise UserError(
            f"{path} lies up to {apart:.1f} mm off {reference_path} by their affines{advice}"
        )
