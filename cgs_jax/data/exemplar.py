"""One annotated slice: all that the labelled stream of a data set then has (exemplar learning)."""

import numpy as np

from cgs_jax.data.tasks import Task
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError


def find(prepared, task: Task) -> tuple[str, int]:
    """Training case and slice that `data.exemplar` of `task` names, and prints what it shows.

    'auto' chooses among the slices of the labelled cases, not of all that have labels: one with as
    many organs as any, and of those the one whose smallest organ has most pixels. 'CASE:SLICE'
    counts slices from 0, in the order in which the case is read.

    Raises:
      UserError: there is no such slice, or no organ in it.
    """
    option = task.data.exemplar
    if option == "auto":
        cases = prepared.by_task(prepared.splits.labelled)[task.name]
        case, at, areas = max(
            (
                (case, at, areas)
                for case in cases
                for at, areas in enumerate(_areas(prepared, case))
            ),
            key=lambda found: (np.count_nonzero(found[2]), min(found[2][found[2] > 0], default=0)),
        )
    else:
        own, _, number = option.rpartition(":")
        case = task.full_name(own)
        if case not in prepared.splits.train or not prepared.has_label(case):
            raise UserError(f"data.exemplar={option}: no training case {own!r} with a label")
        known = _areas(prepared, case)
        if not number.isdecimal() or int(number) >= len(known):
            raise UserError(f"data.exemplar={option}: {own} has slices 0 to {len(known) - 1}")
        at, areas = int(number), known[int(number)]
    if not areas.any():
        raise UserError(f"data.exemplar={option}: no organ in slice {at} of {case}; choose another")
    organs = task.data.classes
    shows = ", ".join(f"{organ} {n}" for organ, n in zip(organs, areas, strict=True) if n)
    lacking = [organ for organ, n in zip(organs, areas, strict=True) if not n]
    say(f"exemplar: slice {at} of {case}, pixels of {shows}")
    if lacking:
        say(f"WARNING: the exemplar shows no {', '.join(lacking)}, which can not be learnt from it")
    return case, at


def _areas(prepared, case):
    """Pixels of every organ that is annotated in each slice [D, organs], on the training grid."""
    labels = prepared.examples("label", prepared.rows([case]))
    organs, known = prepared.task(case).data.classes, prepared.organs(case)
    counts = (np.bincount(x.ravel(), minlength=256)[1 : 1 + len(organs)] for x in labels)
    return [np.where([organ in known for organ in organs], n, 0) for n in counts]
