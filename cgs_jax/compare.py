"""Runs side by side: test Dice by organ, or validation Dice where one has no other.

python -m cgs_jax.compare RUN RUN ...
"""

import pathlib

from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import folder
from cgs_jax.scoring import summaries


def compare(workdirs: list[pathlib.Path]) -> str:
    """Table of Dice (%), an organ a line, a run a column; the last column is last - first.

    Raises:
      UserError: they have scored other cases or other organs.
    """
    found = [summaries.read_summary(workdir) for workdir in workdirs]
    split = summaries.final_split(*found)
    scored = [summary[split] for summary in found]
    for workdir, each in zip(workdirs[1:], scored[1:], strict=True):
        for what in ("cases", "organs"):
            if set(each[what]) != set(scored[0][what]):
                raise UserError(f"{workdir} and {workdirs[0]} have scored other {what}")
    rows = {
        organ: [each["organs"][organ]["dice"]["mean"] for each in scored]
        for organ in scored[0]["organs"]
    }
    rows["mean"] = [each["mean"]["dice"] for each in scored]
    head = names(workdirs) + ["gain"] * (len(scored) > 1)
    width = max(11, *(len(name) + 2 for name in head))
    label = max(map(len, rows))
    lines = [" " * label + "".join(f"{name:>{width}}" for name in head)]
    for organ, values in rows.items():
        numbers = [float("nan") if v is None else 100 * v for v in values]
        numbers += [numbers[-1] - numbers[0]] * (len(scored) > 1)
        cells = [f"{v:>{width}.2f}" for v in numbers[: len(scored)]]
        cells += [f"{v:>+{width}.2f}" for v in numbers[len(scored) :]]
        lines.append(f"{organ:<{label}}" + "".join(cells))
    return f"{summaries.SPLITS[split]} Dice %, best validation checkpoint\n" + "\n".join(lines)


def names(workdirs: list[pathlib.Path]) -> list[str]:
    """As many of the last folders of each as tell them apart: 'seed0', or 'cgs/seed0'."""
    paths = [workdir.absolute().parts for workdir in workdirs]
    for count in range(1, max(map(len, paths))):
        short = ["/".join(parts[-count:]) for parts in paths]
        if len(set(short)) == len(set(paths)):
            break
    return short


if __name__ == "__main__":

    def _main(workdirs):
        if not workdirs:
            raise UserError("name at least one run: python -m cgs_jax.compare RUN RUN ...")
        say(compare(list(map(folder, workdirs))))

    cli(_main, takes_arguments=True)
