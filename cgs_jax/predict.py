"""Segments NIfTI scans with a trained run.

python -m cgs_jax.predict --workdir RUN --input FILE_OR_FOLDER --output FOLDER [--overwrite]
"""

import pathlib

import nibabel as nib
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from cgs_jax import evaluate, run_config, sharding, train
from cgs_jax.checkpoint import Checkpoints
from cgs_jax.data.prepare import quantise
from cgs_jax.data.volume import Scan, finite, normalise, read_nifti
from cgs_jax.errors import UserError
from cgs_jax.main import cli
from cgs_jax.writers import say


def predict(
    workdir: pathlib.Path, source: pathlib.Path, output: pathlib.Path, overwrite: bool = False
) -> list[pathlib.Path]:
    """Writes one label map (uint8) for every scan, with its grid and header, under its name.

    Returns the files written.

    Raises:
      UserError: no run, no scans, an unreadable scan, or a file that would be overwritten.
    """
    config = run_config.load(workdir)
    files = find(source, output, overwrite)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can not write to --output {output}: {error.strerror}") from error
    mesh = sharding.make_mesh()
    method = train.make_method(config)
    checkpoints = Checkpoints(workdir)
    state, _ = train.restore_best(config, method, checkpoints, workdir, mesh)
    checkpoints.close()
    compiled = evaluate.make_predict(method, mesh)
    # Scans that wait for a full batch, kept small: only what is needed to turn labels back.
    waiting: list[Scan] = []
    labels = evaluate.segment(
        lambda slices: compiled(state, slices),
        _stacks(files, config, waiting),
        config.data.size,
        config.eval_batch,
    )
    written = []
    for path, label in tqdm(
        zip(files, labels, strict=True), "segmenting", len(files), unit="scan", disable=None
    ):
        target = output / path.name
        write(waiting.pop(0), label, target)
        written.append(target)
    return written


def find(source: pathlib.Path, output: pathlib.Path, overwrite: bool) -> list[pathlib.Path]:
    """The scans of `source`, a file or a folder, after checks of where their labels would go."""
    if not source.exists():
        raise UserError(f"no such file or folder: {source}")
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [path for path in files if path.name.endswith((".nii", ".nii.gz"))]
    if not files:
        raise UserError(f"no .nii or .nii.gz in {source}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    for path in files:
        target = output / path.name
        if target.exists() and target.samefile(path):
            raise UserError(f"--output would replace the input {path}; choose another folder")
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists; choose another --output or give --overwrite")
    return files


def _stacks(files: list[pathlib.Path], config: ConfigDict, waiting: list[Scan]):
    for path in files:
        scan = read_nifti(path, config.data.slicing)
        image = normalise(finite(scan.array, path), config.data.normalise)
        waiting.append(scan._replace(array=np.empty(0)))
        yield quantise(image)


def write(scan: Scan, label: np.ndarray, path: pathlib.Path) -> None:
    """Writes a label map [D, H, W] on the scan's own grid, under its header."""
    header = scan.nifti.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    nifti = type(scan.nifti)(scan.to_stored(label), scan.nifti.affine, header)
    for which in ("qform", "sform"):
        matrix, code = getattr(scan.nifti, f"get_{which}")(coded=True)
        getattr(nifti, f"set_{which}")(matrix, int(code))
    unfinished = path.with_name("unfinished_" + path.name)
    nib.save(nifti, unfinished)
    unfinished.replace(path)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the trained run")
    _INPUT = flags.DEFINE_string("input", None, "a NIfTI file, or a folder of them")
    _OUTPUT = flags.DEFINE_string("output", None, "folder for the label maps")
    _OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace label maps that are there")
    flags.mark_flags_as_required(["workdir", "input", "output"])

    def _main(_):
        paths = (pathlib.Path(flag.value) for flag in (_WORKDIR, _INPUT, _OUTPUT))
        for path in predict(*paths, overwrite=_OVERWRITE.value):
            say(str(path))

    cli(_main)
