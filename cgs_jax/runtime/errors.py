"""Errors that a person can act on."""

import contextlib
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """Bad input or option. The message names it and says what to do; shown without traceback."""


@contextlib.contextmanager
def naming(what: Any) -> Iterator[None]:
    """Errors of the user in here begin with `what` they are about, such as a file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
