"""Errors that a person can act on."""


class UserError(Exception):
    """Bad input or option. The message names it and says what to do; shown without traceback."""
