"""Errors that a person can act on."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any


class UserError(Exception):
    """Bad input or option. The message names it and says what to do; shown without traceback."""


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raises UserError unless the `value` of the option `name` is among the `known`; '' among them
    stands for none."""
    if value not in known:
        there = ", ".join(str(one) for one in known if one != "")
        raise UserError(f"unknown {name} {value!r}; there are: {there}")


@contextlib.contextmanager
def naming(what: Any) -> Iterator[None]:
    """Errors of the user in here begin with `what` they are about, such as a file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
