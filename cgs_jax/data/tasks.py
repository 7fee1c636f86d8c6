"""Data sets that train one network together, and their organs in the union of all.

A data set of its own is the only task, named ''. In a collection (`data.name=collection`) every
member is a task: `config.data.members` has its options under its name. Organs of one name are one
class of the network, whichever members annotate them. Cases and scores of a member carry its name:
'heart/patient001', 'heart/LV'.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from ml_collections import ConfigDict

from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError

COLLECTION = "collection"


class Task(NamedTuple):
    """A data set with a numbering of its own.

    Attributes:
      name: '' where it is the only one.
      data: its options.
      union: for each of its labels 0, 1, ... the label in the union of all tasks; of scores of the
        union's classes [..., 1 + K] those of its own are `scores[..., union]`.
      first: how many organs the tasks before it have, each counted by itself.
    """

    name: str
    data: ConfigDict
    union: tuple[int, ...]
    first: int

    def full_name(self, of: str) -> str:
        """Of a case, patient or organ, such that no other task has it."""
        return f"{self.name}/{of}" if self.name else of

    def organs(self) -> list[str]:
        """Full names of its organs 1, 2, ..."""
        return [self.full_name(organ) for organ in self.data.classes]

    def scored(self) -> dict[str, tuple[int, ...]]:
        """Full names of what is scored, with its own labels: every organ, or the regions that
        `data.regions` makes of them."""
        regions = self.data.regions or [(x, (i,)) for i, x in enumerate(self.data.classes, 1)]
        return {self.full_name(name): tuple(labels) for name, labels in regions}


def layout(data: ConfigDict) -> ModuleType:
    """The module of `data.name`, for a data set: its `find(data)` and `read(case, data)`; where its
    files tell more than the configuration, functions `classes`, `channels`, `numbers`, `ignore`,
    `regions`, `partial` and `channel_kinds` of `data`; and `to_classes`, by which `read` makes its
    labels."""
    return load_by_name("cgs_jax.data.layouts", data.name, "data set")


def tasks(data: ConfigDict) -> dict[str, Task]:
    """By name, of `config.data`."""
    found, first = {}, 0
    for name, own in members(data).items():
        union = (0, *(1 + data.classes.index(organ) for organ in own.classes))
        found[name] = Task(name, own, union, first)
        first += len(own.classes)
    return found


def members(data: ConfigDict) -> dict[str, ConfigDict]:
    """Options of each data set by its name."""
    return dict(data.members.items()) if data.name == COLLECTION else {"": data}


def organs(data: ConfigDict) -> list[str]:
    """Full names of the organs of all tasks."""
    return [organ for task in tasks(data).values() for organ in task.organs()]


def scored(data: ConfigDict) -> list[str]:
    """Full names of what is scored, of all tasks."""
    return [name for task in tasks(data).values() for name in task.scored()]


def ignores(data: ConfigDict) -> bool:
    """Whether labels may leave voxels out, which nobody annotated."""
    return any(own.ignore for own in members(data).values())


def task_of(data: ConfigDict, case: str) -> tuple[str, str]:
    """Task of a case of `config.data`, and its name in there."""
    return tuple(case.split("/", 1)) if data.name == COLLECTION else ("", case)


def find(data: ConfigDict, name: str) -> Task:
    """The task of that name; '' for the only one.

    Raises:
      UserError: there is no such task, or there are several to choose from.
    """
    known = tasks(data)
    if name in known:
        return known[name]
    if data.name != COLLECTION:
        raise UserError(f"--task {name}: this run was trained on one data set; leave it out")
    problem = f"no task {name!r}:" if name else "which task?"
    raise UserError(f"{problem} this run was trained on {', '.join(known)}; give one by --task")


# Words that tell two organs apart whose pictures are mirror images, or nearly so.
SIDES = (("left", "right"), ("l", "r"), ("anterior", "posterior"), ("superior", "inferior"))
SIDES += (("upper", "lower"), ("dorsal", "ventral"), ("front", "back"))


def both_sides(classes: Sequence[str]) -> tuple[str, str] | None:
    """Two organs whose names differ in a side of the body alone, if there are any: 'RightParotid'
    and 'LeftParotid', 'kidney_l' and 'kidney_r', or 'anterior' and 'posterior'."""
    seen = {}
    for name in classes:
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
        words = [word.lower() for word in words]
        for pair in SIDES:
            for at, word in enumerate(words):
                if word in pair:
                    key = (pair, *words[:at], *words[at + 1 :])
                    other, their = seen.setdefault(key, (word, name))
                    if other != word:
                        return their, name
    return None


@contextlib.contextmanager
def of_member(name: str) -> Iterator[None]:
    """Errors in here name the member of a collection, and the options as it has them."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        text = re.sub(r"(?<![\w/])((?:--)?(?:config\.)?data)\.", rf"\1.members.{name}.", str(error))
        raise UserError(f"{name}: {text}") from error
