"""Prepared scans as training and evaluation read them: examples as rows, and cases as volumes.

Their arrays stay on disk, memory-mapped; see `cache` for what its folders hold.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cgs_jax.data import case_lists, patches
from cgs_jax.data.grid import Grid
from cgs_jax.data.tasks import Task
from cgs_jax.data.volume import NO_LABEL, Volume
from cgs_jax.runtime.errors import UserError

MAPPED = 400  # arrays at most: each holds a file open, and most systems allow a process 1,024


class Entry(NamedTuple):
    """A case in the cache."""

    folder: pathlib.Path
    task: Task
    annotated: tuple[str, ...] | None = None  # organs that its label marks; None: all of its task


class Prepared:
    """Prepared data sets: the training examples as rows, and every labelled case as a volume.

    Attributes:
      splits: the case lists; cases have the full names of their task.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        splits: case_lists.Splits,
        classes: Sequence[str],
        exemplars: Sequence[tuple[str, int]] = (),
        volumes: bool = False,
    ):
        """
        Args:
          entries: cache entry of every case of `splits`.
          classes: organs of all tasks, the numbering of `labels`.
          exemplars: cases of which one slice alone is labelled, and that slice.
          volumes: whether an example is a whole case [D, H, W], not a slice [H, W].
        """
        self._volumes = volumes
        self.splits, self._entries, self._classes = splits, entries, list(classes)
        self._exemplars = dict(exemplars)
        folders = {case: entry.folder for case, entry in entries.items()}
        self._about = {c: json.loads((f / "case.json").read_text()) for c, f in folders.items()}
        shapes = [self._about[case]["shape"] for case in splits.train]
        self._first = np.cumsum([0, *(1 if volumes else depth for _, depth, *_ in shapes)])
        # what a batch tells of its slices, by training case
        options = [self.task(case).data for case in splits.train]
        aspects = (Grid.of(data).aspect(s[2:]) for data, s in zip(options, shapes, strict=True))
        self._aspects = np.fromiter(aspects, np.float32)
        self._annotated = self._in_union(self.organs(case) for case in splits.train)
        self._member = self._in_union(data.classes for data in options)
        self._mapped = functools.lru_cache(MAPPED)(self._map)
        self._tables = functools.cache(self._table)
        self._places_of = functools.cache(self._look_for_places)

    def rows(self, cases: Iterable[str]) -> np.ndarray:
        """Rows, one an example, of those training cases that are in `cases`."""
        wanted = set(cases)
        taken = [case in wanted for case in self.splits.train]
        return np.flatnonzero(np.repeat(taken, np.diff(self._first)))

    def sources(self) -> dict[str, list[np.ndarray]]:
        """Rows of the 'labelled' and of the 'unlabelled' training examples of each task that has
        any.

        Beside unlabelled ones those that are labelled for some organs only serve as unlabelled,
        too, because nothing else teaches the other organs there. Where every example of a task is
        labelled, all of them do.
        """
        found = {"labelled": [], "unlabelled": []}
        for cases in self.by_task(self.splits.train).values():
            labelled = self.rows(set(cases) & set(self.splits.labelled))
            if self.task(cases[0]).data.ignore:  # a slice that nobody annotated is unlabelled
                marked = (label != NO_LABEL for label in self.examples("label", labelled))
                labelled = labelled[np.fromiter((where.any() for where in marked), bool)]
            for case in set(cases) & set(self._exemplars):
                labelled = self.rows([case])[[self._exemplars[case]]]
            partly = self.rows(case for case in cases if self._entries[case].annotated is not None)
            rest = np.setdiff1d(self.rows(cases), labelled)
            rest = np.union1d(rest, partly) if len(rest) else labelled
            for name, rows in (("labelled", labelled), ("unlabelled", rest)):
                found[name] += [rows] * (len(rows) > 0)
        if not found["labelled"]:
            raise UserError("no pixel of a labelled training case is annotated: see data.ignore")
        return found

    def images(self, rows: np.ndarray, corners: Any = None, shape: Any = ()) -> np.ndarray:
        """uint16 [B, *S, C], intensity times 65535: the examples `rows` on the training grid, or of
        each the window of `shape` that begins at its corner."""
        stack = patches.cut(self.examples("image", rows), corners, shape)
        return np.ascontiguousarray(np.moveaxis(stack, 1, -1))

    def labels(self, rows: np.ndarray, corners: Any = None, shape: Any = ()) -> np.ndarray:
        """The same of the labels, uint8 [B, *S] in the union's numbering, with the annotated organs
        alone; NO_LABEL where nobody annotated, which is everywhere in cases without label."""
        stack = patches.cut(self.examples("label", rows), corners, shape)
        for label, (case, _) in zip(stack, self._places(rows), strict=True):
            table = self._tables(case)
            if table is not None:
                label[...] = table[label]
        return stack

    def places(self, row: int) -> list[np.ndarray]:
        """Pixels of the organs in an example, see `patches.places`; of volumes they are looked up
        once."""
        return self._places_of(row) if self._volumes else self._look_for_places(row)

    def _look_for_places(self, row):
        (label,) = self.labels(np.array([row]))
        return patches.places(label)

    def annotated(self, rows: np.ndarray) -> np.ndarray:
        """bool [B, *1s, K]: which organs of the union the labels of `rows` mark."""
        return self._annotated[self._cases(rows)]

    def member(self, rows: np.ndarray) -> np.ndarray:
        """bool [B, *1s, K]: which organs of the union the data sets of `rows` have."""
        return self._member[self._cases(rows)]

    def _in_union(self, organs):
        marks = [[organ in some for organ in self._classes] for some in organs]
        ones = [1] * (3 if self._volumes else 2)
        return np.array(marks, bool).reshape(-1, *ones, len(self._classes))

    def aspects(self, rows: np.ndarray) -> np.ndarray:
        """float32 [B]: height by width of a pixel of the training grid, by example."""
        return self._aspects[self._cases(rows)]

    def examples(self, what: str, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Memory-mapped examples on the training grid of their task: of 'image' uint16 [C, *S], of
        'label' uint8 [*S] in the numbering of the task."""
        for case, at in self._places(rows):
            whole = self._mapped(case, what, True)
            yield whole if self._volumes else whole[..., at, :, :]

    def _places(self, rows):
        """Case, and slice in it, of each row."""
        cases = self._cases(rows)
        places = rows - self._first[cases]
        return [
            (self.splits.train[case], at)
            for case, at in zip(cases.tolist(), places.tolist(), strict=True)
        ]

    def _cases(self, rows):
        """Of each row the number of its training case."""
        return np.searchsorted(self._first, rows, "right") - 1

    def task(self, case: str) -> Task:
        """The data set that it is of."""
        return self._entries[case].task

    def by_task(self, cases: Iterable[str]) -> dict[str, list[str]]:
        """`cases` of each task that has any."""
        found: dict[str, list[str]] = {}
        for case in cases:
            found.setdefault(self.task(case).name, []).append(case)
        return found

    def organs(self, case: str) -> tuple[str, ...]:
        """Those that the label of a case marks."""
        entry = self._entries[case]
        return entry.task.data.classes if entry.annotated is None else entry.annotated

    def scored(self, case: str) -> dict[str, tuple[int, ...]]:
        """What a case is scored by, see `Task.scored`: that of which its label marks all."""
        task, known = self.task(case), self.organs(case)
        marked = {i for i, organ in enumerate(task.data.classes, 1) if organ in known}
        return {name: own for name, own in task.scored().items() if marked.issuperset(own)}

    def digests(self) -> dict[str, dict[str, str]]:
        """Of each case what changes with its 'image', voxel size included, and with its 'label' and
        the organs that this marks where the label is used; whatever files they are kept in."""
        used, found = {*self.splits.labelled, *self.splits.val, *self.splits.test}, {}
        for case, entry in self._about.items():
            found[case] = {"image": entry["digests"]["image"]}
            if case in used:
                organs = self._entries[case].annotated
                text = entry["digests"]["label"] + (",".join(sorted(organs)) if organs else "")
                found[case]["label"] = checksum(text.encode())
        return found

    def taught(self) -> set[str]:
        """Organs that the labels of some labelled training case mark and hold."""
        return {
            organ
            for case in self.splits.labelled
            for organ in self.organs(case)
            if 1 + self.task(case).data.classes.index(organ) in self.numbers(case)
        }

    def has_label(self, case: str) -> bool:
        """Whether there is a label file."""
        return self.numbers(case) is not None

    def numbers(self, case: str) -> list[int] | None:
        """What occurs in its label, of 0 to 255; None where there is no label file."""
        return self._about[case]["label"]

    def volume(self, case: str) -> Volume:
        """A case with a label, on its own grid: image uint16 [C, D, H, W] and label uint8 [D, H, W]
        in the numbering of its task, memory-mapped."""
        spacing = self._about[case]["spacing"]
        image, label = (self._mapped(case, what) for what in ("image", "label"))
        return Volume(image, label, tuple(spacing) if spacing else None)

    def _table(self, case: str) -> np.ndarray | None:
        """The union's label for each of the case's own; None where they are the same. What its
        label file is not said to mark is background."""
        table, own = np.zeros(256, np.uint8), self.task(case).data.classes
        table[NO_LABEL] = NO_LABEL
        for organ in self.organs(case):
            table[1 + own.index(organ)] = 1 + self._classes.index(organ)
        same = (table[: 1 + len(own)] == np.arange(1 + len(own))).all()
        return None if same else table

    def _map(self, case: str, what: str, on_grid: bool = False) -> np.ndarray:
        path, about = self._entries[case].folder / f"{what}.npy", self._about[case]
        (_, *shape), grid = about["shape"], Grid.of(self.task(case).data)
        if on_grid:
            to = grid.shape(shape, about["spacing"])
            if what == "label" and not self.has_label(case):
                return np.broadcast_to(np.uint8(NO_LABEL), to)
            if tuple(shape) != to:
                path = path.with_stem(f"{what}_{grid.name}")
        return np.asarray(np.load(path, mmap_mode="r"))  # views of a plain array are made faster


def checksum(*parts: Any) -> str:
    """16 digits that change with any of `parts`, which are bytes or contiguous arrays."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]
