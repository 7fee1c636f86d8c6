"""Segments scans with a trained run, or with several together.

python -m cgs_jax.predict --workdir RUN --input FILE_OR_FOLDER --output FOLDER [--overwrite] \
    [--resume]

If it is interrupted, the same command with --resume segments the scans that have no label map yet.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from cgs_jax import evaluate
from cgs_jax.data.cache import quantise
from cgs_jax.data.grid import Grid
from cgs_jax.data.nifti import ENDINGS, Scan, channels_of, ending_of, read_channels, save, scans_in
from cgs_jax.data.volume import Volume
from cgs_jax.inference.predictor import Predictor
from cgs_jax.runtime import threads
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.console import progress, say
from cgs_jax.runtime.errors import UserError, naming
from cgs_jax.runtime.files import folder


def predict(
    workdirs: Sequence[pathlib.Path],
    source: pathlib.Path,
    output: pathlib.Path,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
    task: str = "",
    resume: bool = False,
) -> list[pathlib.Path]:
    """Writes one label map for every scan, with its grid and header, under its name.

    A scan is CASE_0000.nii.gz, CASE_0001.nii.gz and so on, a file a channel as nnU-Net names them,
    and its label map CASE.nii.gz; of one channel it may have any name, and its label map the same.

    `options` such as {'inference': 'both'} replace the run's own. `task` names the member of a
    collection whose scans these are; the labels are numbered as its own are. With `resume` label
    maps that are there stay, and the other scans are segmented. Returns the files written.

    Raises:
      UserError: no run, no scans, a file that would be overwritten; or, after all others are
        written, a scan that can not be read.
    """
    predictor = Predictor.restore(workdirs, options, task)
    files = find(source, output, overwrite, predictor.task.data.channels, resume)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can not write to --output {output}: {error.strerror}") from error
    problems: list[str] = []

    def volumes():
        for name, paths in progress(files.items(), "segmenting", len(files), "scan"):
            try:
                image, scan = read_channels(paths, predictor.task.data)
                with naming(paths[0]):
                    Grid.of(predictor.task.data).shape(image.shape[1:], scan.spacing)
            except UserError as error:
                problems.append(str(error))
            else:
                volume = Volume(quantise(image), None, scan.spacing)
                scan = scan._replace(array=None)
                del image  # large as the array is: this waits while the scan before is segmented
                yield (name, scan), volume

    written = []
    read = threads.ahead(volumes())
    for (name, scan), (label,) in predictor.labels(read, predictor.scoring):
        write(scan, numbered(label, predictor.task.data.numbers), output / name)
        written.append(output / name)
    if problems:
        rest = f"; {len(written)} others are written to {output}" if written else ""
        raise UserError("; ".join(problems) + rest)
    return written


def find(
    source: pathlib.Path, output: pathlib.Path, overwrite: bool, channels: int, resume: bool = False
) -> dict[str, tuple[pathlib.Path, ...]]:
    """The scans of `source`, a file or a folder, after checks of where their labels would go: the
    files of their channels by the name of the label map. With `resume` those that have none yet."""
    if overwrite and resume:
        raise UserError("--overwrite and --resume contradict each other; give one of them")
    if not source.exists():
        raise UserError(f"no such file or folder: {source}")
    files = scans_in(source)
    if not files:
        raise UserError(f"no scan in {source}: {', '.join(ENDINGS)}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    if channels > 1:
        found = [channels_of(path, channels) for path in files]
        scans = {case + ending: paths for case, ending, paths in found}
    else:
        scans = {}
        for path in files:
            ending = ending_of(path)
            name = path.name.removesuffix(ending).removesuffix("_0000") + ending
            if name in scans:
                raise UserError(f"{scans[name][0]} and {path} would both be {name}; rename one")
            scans[name] = (path,)
        firsts = {name: re.sub(r"_0\d{3}(?=\.)", "", name) for name in scans}
        if second := [name for name, first in firsts.items() if first != name and first in scans]:
            more = f" (and {len(second) - 1} more)" if len(second) > 1 else ""
            told = "is segmented as a scan of its own: the run has one channel"
            say(f"WARNING: {second[0]}{more} {told}")
    todo = dict(scans)
    for name, paths in scans.items():
        target = output / name
        if target.exists() and any(map(target.samefile, paths)):
            raise UserError(f"--output would replace the input {target}; choose another folder")
        if target.exists() and resume:
            del todo[name]
        elif target.exists() and not overwrite:
            options = "--overwrite, or --resume for the scans that have none"
            raise UserError(f"{target} exists; choose another --output or give {options}")
    if resume:
        say(f"{len(scans) - len(todo)} of {len(scans)} label maps are there already")
    return todo


def numbered(label: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Labels with the `numbers` that label files have for them, in the smallest type that can; as
    they are where those are 1, 2, ..."""
    if not numbers:
        return label
    table = np.array((0, *numbers))
    return table.astype(np.min_scalar_type(table.max()))[label]


def write(scan: Scan, label: np.ndarray, path: pathlib.Path) -> None:
    """Writes a label map [D, H, W] on the scan's own grid, under its header."""
    header = scan.nifti.header.copy()
    header.set_data_dtype(label.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    nifti = type(scan.nifti)(scan.to_stored(label), scan.nifti.affine, header)
    save(nifti, path)


if __name__ == "__main__":
    _WORKDIRS = flags.DEFINE_multi_string("workdir", None, "folder of a trained run; repeat it")
    _INPUT = flags.DEFINE_string("input", None, "a scan, such as a NIfTI file, or a folder of them")
    _OUTPUT = flags.DEFINE_string("output", None, "folder for the label maps")
    _OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace label maps that are there")
    _RESUME = flags.DEFINE_boolean("resume", False, "leave label maps that are there; do the rest")
    _TASK = flags.DEFINE_string(
        "task", "", "of a run on a collection: which member's scans these are"
    )
    _options = evaluate.define_flags()
    flags.mark_flags_as_required(["workdir", "input", "output"])

    def _main(_):
        workdirs = [folder(name) for name in _WORKDIRS.value]
        written = predict(
            workdirs,
            pathlib.Path(_INPUT.value),
            pathlib.Path(_OUTPUT.value),
            _OVERWRITE.value,
            _options(),
            _TASK.value,
            _RESUME.value,
        )
        for path in written:
            say(str(path))

    cli(_main)
