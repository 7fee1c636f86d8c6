"""Which case belongs where. Lists are text files, one case name a line, `#` starts a comment.

A folder of lists holds `train.txt`, `val.txt`, `test.txt` and `labelled_N.txt` for N labelled
patients; those of the published protocols are in `splits/<data set>`.
"""

import pathlib
import re
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cgs_jax.data.volume import Case
from cgs_jax.errors import UserError


class Splits(NamedTuple):
    """Case names; `labelled` is the part of `train` whose labels are used."""

    train: list[str]
    val: list[str]
    test: list[str]
    labelled: list[str]

    def write(self, folder: pathlib.Path) -> None:
        """Writes the lists as text files, which `split` takes."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, cases in self._asdict().items():
            (folder / f"{name}.txt").write_text("".join(f"{case}\n" for case in cases))


def split(cases: dict[str, Case], data: ConfigDict, seed: int) -> Splits:
    """Splits by the lists in `data.splits`, else by the published ones, else at random by patient.

    The random split depends on `seed` alone: it holds out `data.val_fraction` and, where no case is
    marked for testing, `data.test_fraction` of the patients with labels; scans without label train.

    Raises:
      UserError: a list is missing, names a case that is not there or has no label where it needs
        one, or puts a patient into two of train, val and test.
    """
    folder = pathlib.Path(data.splits or pathlib.Path(__file__).parent / "splits" / data.name)
    if folder.is_dir() or data.splits:
        train, test = read_list(folder / "train.txt"), read_list(folder / "test.txt")
        val = folder / "val.txt"
        if val.exists():
            val = read_list(val)
        else:  # published without validation list: selection must not use the test cases
            train, val = hold_out(train, [data.val_fraction], seed, data.patient)
    else:
        folder = "the random split"
        test = [name for name, case in cases.items() if case.test]
        rest = [name for name, case in cases.items() if case.label and not case.test]
        if test:
            rest, val = hold_out(rest, [data.val_fraction], seed, data.patient)
        else:
            fractions = [data.val_fraction, data.test_fraction]
            rest, val, test = hold_out(rest, fractions, seed, data.patient)
        held_out = {patient(name, data.patient) for name in val + test}
        only_images = [name for name, case in cases.items() if not case.label and not case.test]
        only_images = [name for name in only_images if patient(name, data.patient) not in held_out]
        train = rest + only_images
    labelled = _labelled(folder, train, cases, data)
    splits = Splits(train, val, test, labelled)
    _check(splits, cases, data, folder)
    return splits


def _labelled(folder, train, cases, data):
    if folder != "the random split":
        for name in ("labelled", f"labelled_{data.labelled}"):
            if (folder / f"{name}.txt").exists():
                return read_list(folder / f"{name}.txt")
    with_label = [name for name in train if name in cases and cases[name].label]
    return first_patients(with_label, data.labelled, data.patient)


def _check(splits, cases, data, folder):
    for name, listed in splits._asdict().items():
        if not listed:
            raise UserError(f"no {name} cases for {data.root} (by {folder})")
        missing = [case for case in listed if case not in cases]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(listed)} {name} cases by {folder} are not in {data.root}, "
                f"such as {missing[0]}; add them or give other lists with --config.data.splits"
            )
        without = [case for case in listed if not cases[case].label]
        if without and name != "train":
            raise UserError(f"{name} case {without[0]} has no label file in {data.root}")
    stray = set(splits.labelled) - set(splits.train)
    if stray:
        raise UserError(f"labelled case {sorted(stray)[0]} is not a training case by {folder}")
    seen = {}
    for name in ("train", "val", "test"):
        for case in getattr(splits, name):
            who = patient(case, data.patient)
            if seen.setdefault(who, name) != name:
                raise UserError(f"patient {who} is in {seen[who]} and in {name} by {folder}")


def read_list(path: pathlib.Path) -> list[str]:
    """Case names of one list file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"no case list {path}") from None
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def patient(case: str, pattern: str) -> str:
    """Patient of a case: the first group of the regular expression `pattern`."""
    match = re.match(pattern, case)
    return match.group(1) if match else case


def first_patients(cases: list[str], count: int, pattern: str) -> list[str]:
    """Cases of the first `count` patients, in order; 0 for all."""
    patients = list(dict.fromkeys(patient(case, pattern) for case in cases))
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
