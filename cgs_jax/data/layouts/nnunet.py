"""Your own data in nnU-Net's raw layout (github.com/MIC-DKFZ/nnUNet, dataset format).

`dataset.json`, `imagesTr/CASE_0000.nii.gz` and so on, a file a channel, `labelsTr/CASE.nii.gz`;
images without a label file are the unlabelled pool; `dataset` in dataset.json may name the files of
training cases instead, wherever they lie. Cases of `imagesTs` that have a label in
`labelsTs` are the test set. `partial_labels.json` {case: [organs]} names the cases whose label file
marks some of the organs only. Numbers of labels may leave gaps, `ignore` marks voxels that nobody
annotated, and an organ with a list of numbers is a region, see `regions`.
"""

import os
import pathlib

from ml_collections import ConfigDict

from cgs_jax.data.nifti import ENDINGS, channels_of, read_nifti_case, scans_in
from cgs_jax.data.volume import Case
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import read_json

read = read_nifti_case
PARTIAL = "partial_labels.json"
LARGEST_NUMBER = 65535  # of a label
FOLDERS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))  # to train on, and to test on


def find(data: ConfigDict) -> dict[str, Case]:
    """Cases of `data.root`."""
    root, ending = (pathlib.Path(data.root), _description(data).get("file_ending", ".nii.gz"))
    if ending not in ENDINGS:
        known = ", ".join(ENDINGS)
        raise UserError(f"{root / 'dataset.json'}: file_ending {ending!r}; there are: {known}")
    count, listed = channels(data), _partial_labels(data)
    cases = _named_cases(data, ending, count, listed)
    training = "dataset.json" if cases else "imagesTr"
    for images, labels in FOLDERS[1:] if cases else FOLDERS:
        unused = set(scans_in(root / labels))
        there = sorted((root / labels).glob("*"))
        others = [path for path in there if not path.name.endswith((ending, ".json"))]
        for path in scans_in(root / images):
            if not path.name.endswith(ending):
                raise UserError(f"{path}: dataset.json says that files end with {ending}")
            name, _, files = channels_of(path, count)
            if path != files[0]:
                continue
            if name in cases:
                raise UserError(f"{name} is in {training} and in imagesTs of {root}")
            label, test = root / labels / f"{name}{ending}", images == "imagesTs"
            unused.discard(label)
            if label.is_symlink() and not label.exists():
                raise UserError(f"{label} is a link to a file that is not there")
            if label.exists():
                cases[name] = Case(name, files, (label,), test, listed.get(name))
            elif other := next((p for p in others if p.name.startswith(f"{name}.")), None):
                told = f"is not read: labels end with {ending}"
                raise UserError(f"{other} {told}; convert it, or move it away")
            elif not test:
                cases[name] = Case(name, files, None)
        if unused:
            raise UserError(
                f"{min(unused)} belongs to no scan: labels of {images}/CASE_0000{ending} are named "
                f"{labels}/CASE{ending}; rename it, or move it away"
            )
    if not cases:
        raise UserError(f"no scans in {root / 'imagesTr'} (CASE_0000{ending})")
    if stray := sorted(case for case in listed if case not in cases or not cases[case].label):
        raise UserError(f"{root / PARTIAL}: there is no case {stray[0]} with a label")
    return cases


def _named_cases(data, ending, count, partly):
    """The training cases that dataset.json names itself, {case: {"images": [a file a channel],
    "label": file}}, without a label where there is none. Paths begin in `data.root`."""
    path, cases = pathlib.Path(data.root) / "dataset.json", {}
    named = _description(data).get("dataset", {})
    for case, files in named.items() if isinstance(named, dict) else [("dataset", named)]:
        files = files if isinstance(files, dict) else {}
        images, label = files.get("images"), files.get("label")
        own = [*(images if isinstance(images, list) else ()), *([label] if label else ())]
        if len(own) != count + bool(label) or not all(isinstance(file, str) for file in own):
            raise UserError(
                f"{path}: dataset must map each case to images, a list of {count} file(s), and "
                f"label, a file, or none; see {case}"
            )
        own = [path.parent / os.path.expandvars(file) for file in own]
        for file in own:
            if not file.exists() or not file.name.endswith(ending):
                problem = "does not end with " + ending if file.exists() else "is not there"
                raise UserError(f"{path}: {case} names {file}, which {problem}")
        image, label = tuple(own[:count]), tuple(own[count:]) or None
        cases[case] = Case(case, image, label, annotated=partly.get(case) if label else None)
    return cases


def partial(data: ConfigDict) -> bool:
    """Whether some cases are annotated for some organs only."""
    return bool(_partial_labels(data))


def _partial_labels(data):
    """Annotated organs by case, of the cases that are listed."""
    path = pathlib.Path(data.root) / PARTIAL
    if not path.exists():
        return {}
    organs = tuple(data.classes) or classes(data)
    parts = {organ: (organ,) for organ in organs}  # a region stands for all its classes
    parts |= {name: tuple(organs[i - 1] for i in own) for name, own in regions(data)}
    try:
        listed = read_json(path)
    except ValueError:
        listed = None
    lists = listed.values() if isinstance(listed, dict) else [None]
    if not all(isinstance(x, list) and all(isinstance(o, str) for o in x) for x in lists):
        raise UserError(f"{path} must map cases to lists of organs: {{case: [organs]}}")
    for case, named in listed.items():
        if not named:
            raise UserError(f"{path}: {case} is annotated for no organ; remove its label file")
        if unknown := sorted(set(named) - set(parts)):
            known = ", ".join(parts)
            raise UserError(f"{path}: {case} names {unknown[0]!r}; the organs are: {known}")
    marked = {case: {o for name in named for o in parts[name]} for case, named in listed.items()}
    marked = {case: tuple(o for o in organs if o in own) for case, own in marked.items()}
    return {case: own for case, own in marked.items() if own != organs}


def classes(data: ConfigDict) -> tuple[str, ...]:
    """Names of what the numbers of label files stand for, in their order.

    What regions share, or one has beside the others, is named after the smallest of those that it
    belongs to, and its number: 'whole tumour 1'.
    """
    labels, named = _labels(data), []
    for number in _numbers(labels):
        holding = [name for name in labels if number in labels[name]]
        name = min(holding, key=lambda name: len(labels[name]))
        named.append(name if len(labels[name]) == 1 else f"{name} {number}")
    return tuple(named)


def numbers(data: ConfigDict) -> tuple[int, ...]:
    """The numbers of label files that stand for organs."""
    return _numbers(_labels(data))


def regions(data: ConfigDict) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What is scored where some name has several numbers: each name, and which of `classes` it
    consists of, counted from 1. () where each name has one number."""
    labels = _labels(data)
    if all(len(parts) == 1 for parts in labels.values()):
        return ()
    known = _numbers(labels)
    return tuple((name, tuple(1 + known.index(n) for n in parts)) for name, parts in labels.items())


def ignore(data: ConfigDict) -> int:
    """The number of voxels that nobody annotated; 0 where there is none."""
    return _ignored(_all_labels(data), data)


def _ignored(named, data):
    found = named.get("ignore", (0,))
    if len(found) > 1:
        raise UserError(f"{pathlib.Path(data.root) / 'dataset.json'}: ignore must be one number")
    return found[0]


def _numbers(labels):
    return tuple(sorted(set().union(*labels.values())))


def _labels(data):
    """Numbers by name, without background and ignore."""
    named = _all_labels(data)
    background = [name for name, parts in named.items() if parts == (0,)]
    organs = {k: v for k, v in named.items() if k not in (*background, "ignore")}
    given = _numbers(organs)
    twice = len(set(map(frozenset, organs.values()))) < len(organs)
    if len(background) != 1 or not organs or twice or {0, _ignored(named, data)} & set(given):
        raise UserError(
            f"{pathlib.Path(data.root) / 'dataset.json'}: labels must be background 0, and organs "
            f"with other numbers than it, ignore and each other; got {named}"
        )
    return organs


def _all_labels(data):
    """Tuples of numbers by name."""
    path, labels = pathlib.Path(data.root) / "dataset.json", _description(data).get("labels", {})
    if isinstance(labels, dict) and labels and all(key.isdecimal() for key in labels):
        labels = {str(name): int(value) for value, name in labels.items()}  # the older layout
    named = {}
    for name, parts in labels.items() if isinstance(labels, dict) else ():
        named[name] = parts = tuple(parts) if isinstance(parts, list) else (parts,)
        if not parts or not all(type(n) is int and 0 <= n <= LARGEST_NUMBER for n in parts):
            named = {}
            break
    if not named:
        raise UserError(
            f"{path}: labels must map names to numbers, or lists of numbers, from 0 to "
            f"{LARGEST_NUMBER}; got {labels}"
        )
    return named


def channels(data: ConfigDict) -> int:
    """How many dataset.json names; one where it does not tell."""
    return len(channel_kinds(data))


def channel_kinds(data: ConfigDict) -> list[str]:
    """Their names, such as 'CT'."""
    description, path = _description(data), pathlib.Path(data.root) / "dataset.json"
    names = description.get("channel_names") or description.get("modality") or {"0": "image"}
    if not isinstance(names, dict):
        raise UserError(f"{path}: channel_names must map 0, 1, ... to names; got {names}")
    return [str(name) for name in names.values()]


def _description(data):
    path = pathlib.Path(data.root) / "dataset.json"
    try:
        description = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no {path}: --config.data.root must hold dataset.json, imagesTr/CASE_0000.nii.gz and "
            "labelsTr/CASE.nii.gz (nnU-Net's raw layout)"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(description, dict):
        raise UserError(f"{path} must be an object with labels and file_ending")
    return description
