"""Which case belongs where. Lists are text files, one case name a line, `#` starts a comment.

A folder of lists holds `train.txt`, `val.txt`, `test.txt` and `labelled_N.txt` for N labelled
patients; those of the published protocols are in `published/<data set>`.
"""

import pathlib
import re
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data import tasks
from cgs_jax.data.volume import Case
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import read_json


class Splits(NamedTuple):
    """Case names; `labelled` is the part of `train` whose labels are used."""

    train: list[str]
    val: list[str]
    test: list[str]
    labelled: list[str]


def split(cases: dict[str, Case], data: ConfigDict, seed: int) -> Splits:
    """Splits by the lists in `data.splits`, else by the published ones, else at random by patient.

    The random split depends on `seed` alone: it holds out `data.val_fraction` and, where no case is
    marked for testing, `data.test_fraction` of the patients with labels, at least one of each, but
    none to test where that is 0; scans without label train.
    Lists without `val.txt` hold out validation patients likewise: the test set must not select.
    `labelled_N.txt`, or else the first N patients of `train.txt`, are the labelled ones.
    `data.fold` takes that of nnU-Net's `splits_final.json` in `data.root` instead.
    """
    if data.fold < -1 or data.split_seed < 0:
        raise UserError("data.fold must be at least -1, which takes none, and data.split_seed 0")
    if data.fold >= 0 and data.splits:
        raise UserError("data.fold and data.splits both say which cases train: give one of them")
    if data.fold >= 0:
        return _of_fold(cases, data, seed)
    published = pathlib.Path(__file__).parent / "published" / data.name
    folder = pathlib.Path(data.splits) if data.splits else published
    if not folder.is_dir() and not data.splits:
        return _random_split(cases, data, seed)
    train, test = read_list(folder / "train.txt"), read_list(folder / "test.txt")
    path = folder / f"labelled_{data.labelled}.txt"
    labelled = read_list(path) if path.exists() else None
    with_label = [name for name in train if name not in cases or cases[name].label]
    if (folder / "val.txt").exists():
        val = read_list(folder / "val.txt")
    else:
        spare = _of_others(with_label, labelled or [], data)
        _, val = hold_out(spare, [data.val_fraction], seed, data.patient)
        train, with_label = (_of_others(names, val, data) for names in (train, with_label))
    if labelled is None:
        labelled = first_patients(with_label, data.labelled, data.patient)
    return Splits(train, val, test, _teaching(labelled, cases, data))


def _random_split(cases, data, seed):
    test = [name for name, case in cases.items() if case.test]
    rest = [name for name, case in cases.items() if case.label and not case.test]
    fractions = [data.val_fraction] + [data.test_fraction] * (not test and data.test_fraction > 0)
    rest, val, *drawn = hold_out(rest, fractions, seed, data.patient)
    test = test or sum(drawn, [])
    return _with_images(rest, val, test, cases, data)


def _of_fold(cases, data, seed):
    """Train and validation cases as nnU-Net has them. Where no case is marked for testing, its
    validation cases test, for they are what it reports, and others validate."""
    path = pathlib.Path(data.root) / "splits_final.json"
    try:
        folds = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"data.fold={data.fold}: no {path}; nnU-Net keeps it in its folder of preprocessed data"
        ) from None
    except ValueError:
        raise UserError(f"{path} is no JSON") from None
    try:
        fold = folds[data.fold]
        train, held_out = ([str(case) for case in fold[part]] for part in ("train", "val"))
    except (LookupError, TypeError):
        raise UserError(f"data.fold={data.fold}: {path} has no such fold") from None
    val, test = held_out, [name for name, case in cases.items() if case.test]
    if not test:
        train, val = hold_out(train, [data.val_fraction], seed, data.patient)
        test = held_out
    return _with_images(train, val, test, cases, data)


def _with_images(train, val, test, cases, data):
    """Adds scans without label to `train`, except those of held-out patients."""
    only_images = [name for name, case in cases.items() if not case.label and name not in train]
    labelled = [name for name in train if name not in cases or cases[name].label]
    labelled = first_patients(labelled, data.labelled, data.patient)
    train = train + _of_others(only_images, val + test, data)
    return Splits(train, val, test, _teaching(labelled, cases, data))


def _of_others(names, known, data):
    """Cases of patients who have none among the `known` cases."""
    patients = {patient(name, data.patient) for name in known}
    return [name for name in names if patient(name, data.patient) not in patients]


def _teaching(labelled, cases, data):
    """Without those that are annotated for some organs only, unless `data.partly_labelled`."""
    partly = {name for name, case in cases.items() if case.annotated is not None}
    return [name for name in labelled if data.partly_labelled or name not in partly]


def check(splits: Splits, cases: dict[str, Case], data: ConfigDict) -> None:
    """Raises UserError where a list is empty, names a case that is not there or has no label where
    it needs one, or where a patient is in two of train, val and test."""
    for name, listed in splits._asdict().items():
        if not listed and not (name == "test" and data.test_fraction == 0):
            count = sum(bool(case.label) for case in cases.values())
            problem = f"no {name} cases for {data.root}, {count} of {len(cases)} cases have labels"
            advice = "see --config.data.splits"
            if name == "labelled" and not data.partly_labelled:
                advice += ", or use partly annotated ones by --config.data.partly_labelled=True"
            elif name == "test":
                advice += "; to do without, --config.data.test_fraction=0"
            elif count and not data.splits:
                advice += ", or give less to data.val_fraction and data.test_fraction (0: no test)"
            raise UserError(f"{problem}; {advice}")
        missing = [case for case in listed if case not in cases]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(listed)} {name} cases are not in {data.root}, such as "
                f"{missing[0]}; add them or give other lists with --config.data.splits"
            )
        without = [case for case in listed if not cases[case].label]
        if without and name != "train":
            raise UserError(f"{name} case {without[0]} has no label file in {data.root}")
    stray = set(splits.labelled) - set(splits.train)
    if stray:
        raise UserError(f"labelled case {sorted(stray)[0]} is not a training case")
    seen = {}
    for name in ("train", "val", "test"):
        for case in getattr(splits, name):
            who = patient(case, data.patient)
            if seen.setdefault(who, name) != name:
                raise UserError(f"patient {who} is in {seen[who]} and in {name}")


def tell(splits: Splits, data: ConfigDict, member: str = "") -> None:
    """Prints how many cases and patients there are, and warns of patients who may be one."""
    everyone = {case: patient(case, data.patient) for cases in splits for case in cases}
    patients = sorted(set(everyone.values()))
    parts = {
        name: {everyone[case] for case in cases}
        for name, cases in splits._asdict().items()
        if cases
    }
    counts = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
    whose = f"{member}: " if member else ""
    say(f"{whose}{len(everyone)} cases of {len(patients)} patients: {counts}")
    if len(everyone) > 1 and len(patients) == 1:
        say(
            "WARNING: all cases count as one patient; say how names tell patients apart with "
            "--config.data.patient"
        )
    alike: dict[str, list[str]] = {}
    for who in patients:
        alike.setdefault(re.split(r"[_-](?=[^_-]*$)", who)[0], []).append(who)
    for prefix, some in alike.items():
        # "liver_1" and "liver_2" are two; "p7_a" and "p7_b" look like one.
        if len(alike) > 1 and len(some) > 1 and re.search(r"\d", prefix):
            where = {
                name for name in ("train", "val", "test") if parts.get(name, set()) & set(some)
            }
            if len(where) > 1:
                say(
                    f"WARNING: {', '.join(some[:3])} are in {' and '.join(sorted(where))}; if "
                    "they are one patient, say how names tell it with --config.data.patient"
                )


def read_list(path: pathlib.Path) -> list[str]:
    """Case names of one list file, each once."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except FileNotFoundError:
        raise UserError(f"no case list {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8; save it as such") from None
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def part(splits: Splits, data: ConfigDict, task: str) -> Splits:
    """The cases of one task of `config.data`, by their names in there."""
    named = ([tasks.task_of(data, case) for case in cases] for cases in splits)
    return Splits(*([case for name, case in cases if name == task] for cases in named))


def patient_of(case: str, data: ConfigDict) -> str:
    """Full name of the patient of a case of any task of `config.data`."""
    name, own = tasks.task_of(data, case)
    task = tasks.tasks(data)[name]
    return task.full_name(patient(own, task.data.patient))


def patient(case: str, pattern: str) -> str:
    """Patient of a case: the first group of the regular expression `pattern`."""
    try:
        match = re.match(pattern, case)
        return (match and match.group(1)) or case
    except (re.error, IndexError) as error:
        raise UserError(f"data.patient={pattern!r} needs a group in parentheses: {error}") from None


def first_patients(cases: list[str], count: int, pattern: str) -> list[str]:
    """Cases of the first `count` patients, in order; 0 for all."""
    patients = list(dict.fromkeys(patient(case, pattern) for case in cases))
    if count < 0:
        raise UserError(f"data.labelled={count}: a number of patients, or 0 for all")
    if count > len(patients):
        raise UserError(f"data.labelled={count}, but only {len(patients)} patients have labels")
    chosen = set(patients[: count or None])
    return [case for case in cases if patient(case, pattern) in chosen]


def hold_out(cases: list[str], fractions: list[float], seed: int, pattern: str) -> list[list[str]]:
    """Splits cases by patient at random: [rest, a part for each fraction].

    Each part gets at least one patient.
    """
    patients = sorted({patient(case, pattern) for case in cases})
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    parts, start = [], 0
    for fraction in fractions:
        count = max(1, round(fraction * len(patients)))
        parts.append(set(order[start : start + count]))
        start += count
    parts.insert(0, set(order[start:]))
    return [[case for case in cases if patient(case, pattern) in part] for part in parts]
