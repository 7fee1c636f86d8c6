"""Finds data sets, models and methods by their file name: no registry to keep."""

import importlib
import pkgutil
from types import ModuleType

from cgs_jax.errors import UserError


def load_by_name(package: str, name: str, kind: str) -> ModuleType:
    """Imports `package.name`.

    Raises:
      UserError: there is no such module that defines what a `kind` defines; lists those that do.
    """
    defines = {"model": "Backbone", "method": "Method", "data set": "find"}[kind]
    parent = importlib.import_module(package)
    known = {}
    for info in pkgutil.iter_modules(parent.__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        if hasattr(module, defines) and info.name != "base":
            known[info.name] = module
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]
