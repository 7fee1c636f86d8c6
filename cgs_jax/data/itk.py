"""MetaImage (.mha) and NRRD files, by SimpleITK, as NIfTI images in memory.

SimpleITK is an optional package (`pip install SimpleITK`). Its axes point left, posterior and
superior, those of NIfTI right, anterior and superior.
"""

import pathlib
import zlib

import nibabel as nib
import numpy as np

from cgs_jax.runtime.errors import UserError

ENDINGS = (".mha", ".nrrd")
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def load(path: pathlib.Path) -> nib.Nifti1Image:
    """Reads a file.

    Raises:
      UserError: SimpleITK is not installed, or a voxel has several numbers.
      Exception: the file is missing or damaged; its last line says how.
    """
    sitk, data = _sitk(path), path.read_bytes()
    header, local, packed = data.partition(b"ElementDataFile = LOCAL\n")
    if local and b"CompressedData = True" in header:
        zlib.decompress(packed)  # ITK does not look at the checksum
    image = sitk.ReadImage(str(path))
    if (numbers := image.GetNumberOfComponentsPerPixel()) > 1:  # such as colours
        raise UserError(f"{path} holds {numbers} numbers a voxel; one intensity a voxel is read")
    array = sitk.GetArrayFromImage(image).T
    affine = np.eye(4)
    if (axes := image.GetDimension()) >= 3:  # else the reader says that it is no volume
        direction = np.reshape(image.GetDirection(), (axes, axes))
        affine[:3, :3] = direction[:3, :3] * image.GetSpacing()[:3]
        affine[:3, 3] = image.GetOrigin()[:3]
    return nib.Nifti1Image(array, TO_RAS @ affine, dtype=array.dtype)


def save(image: nib.Nifti1Image, path: pathlib.Path) -> None:
    """Writes a volume, compressed, where its affine says."""
    sitk, affine = _sitk(path), TO_RAS @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    array = np.asarray(image.dataobj).reshape(image.shape[:3])  # of four axes it makes vectors
    made = sitk.GetImageFromArray(array.T)
    made.SetSpacing(spacing.tolist())
    made.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    made.SetOrigin(affine[:3, 3].tolist())
    try:
        sitk.WriteImage(made, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"SimpleITK: {str(error).strip().splitlines()[-1]}") from error


def _sitk(path):
    try:
        import SimpleITK
    except ImportError:
        problem = f"{path} is read by SimpleITK, which is not there: pip install SimpleITK"
        raise UserError(problem) from None
    return SimpleITK
