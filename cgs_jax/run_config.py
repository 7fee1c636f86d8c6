"""config.json of a run: what it was trained with, and whether a new start fits it."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from cgs_jax.errors import UserError
from cgs_jax.writers import to_json

# What may differ between two starts of one run: places, and how often to look.
FREE = ("data.root", "data.cache", "data.splits", "log_every", "eval_batch", "inference")


def save(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json.

    Raises:
      UserError: `workdir` can not be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can not write to --workdir {workdir}: {error.strerror}") from error


def load(workdir: pathlib.Path) -> ConfigDict:
    """Reads config.json.

    Raises:
      UserError: `workdir` holds no run.
    """
    try:
        text = (workdir / "config.json").read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} holds no run (no config.json)") from None
    return ConfigDict(json.loads(text, object_hook=_tuples))


def _tuples(mapping: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}


def check_same(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises UserError where `config` would go on with a run that was trained otherwise."""
    saved, now = _flat(load(workdir).to_dict()), _flat(config.to_dict())
    for name in sorted(saved.keys() | now.keys()):
        if name not in FREE and saved.get(name) != now.get(name):
            raise UserError(
                f"{workdir} was trained with {name}={saved.get(name)}, now it is {now.get(name)}; "
                "give back the old value or choose another --workdir"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
