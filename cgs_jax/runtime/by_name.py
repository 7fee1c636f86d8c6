"""Finds data sets, models and methods by their file name: no registry to keep."""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from cgs_jax.runtime.errors import UserError


def load_by_name(package: str, name: str, kind: str) -> ModuleType:
    """Imports `package.name`; its siblings are left alone.

    Raises:
      UserError: there is no such module that defines what a `kind` defines; lists those that do.
    """
    defines = {"model": "Backbone", "method": "Method", "data set": "find"}[kind]

    def module(name: str) -> ModuleType | None:
        path = f"{package}.{name}"
        if not name.isidentifier() or name == "base" or not importlib.util.find_spec(path):
            return None
        found = importlib.import_module(path)
        return found if hasattr(found, defines) else None

    if found := module(name):
        return found
    names = sorted(x.name for x in pkgutil.iter_modules(importlib.import_module(package).__path__))
    known = ", ".join(filter(module, names))
    raise UserError(f"unknown {kind} {name!r}; there are: {known}")
