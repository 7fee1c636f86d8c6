"""config.json, splits.json and scans.json of a run: what it was trained with, and whether a new
start fits."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from cgs_jax.data.case_lists import Splits
from cgs_jax.runtime import processes
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import is_remote, to_json, write_text

# How a trained network predicts. Until a run is finished this decides which checkpoint is the best.
PREDICTION = ("inference", "predict_with", "combine", "window", "upsample", "largest_component")
# Fields, by the last part of their names, without which a run is of an earlier version.
ADDED_LATER = {"depth", "numbers", "predict_with"}
# What may differ between two starts of one run: places, devices, and how to look at it. Not
# eval_every: it decides which checkpoint is the best.
FREE = (
    "data.root",
    "data.cache",
    "log_every",
    "eval_batch",
    "pseudo_slices",
    "test",
    "model.lanes",
    "model.head_group",
    "model.head_bytes",
    "mesh.data",
    "mesh.space",
    "mesh.shard_params",
)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes `workdir` and keeps other jobs out of it. Of several processes of one job the first
    locks the folder, for all of them.

    Raises:
      UserError: it can not be written, another job works in it, or it is not the same for all
        processes.
    """
    path, token = workdir / "lock", secrets.token_hex()
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                if not is_remote(workdir):
                    _lock(stack.enter_context(open(path, "a")))
                path.write_text(token)
            except BlockingIOError:
                raise UserError(f"another process is working in {workdir}") from None
            except OSError as error:
                raise UserError(
                    f"can not write to --workdir {workdir}: {error.strerror}"
                ) from error
        processes.barrier("workdir locked")
        # Who does not read what process 0 wrote has another folder.
        seen = processes.gather(path.read_text() if path.exists() else "")
        if len(set(seen)) > 1:
            raise UserError(f"--workdir {workdir} is not one folder for all processes; share it")
        yield


def _lock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        say(f"WARNING: {file.name} can not be locked there; start one job in this folder at a time")


def writable(workdir: pathlib.Path) -> bool:
    """Whether files can be made in the folder; of a bucket this is not known beforehand."""
    return is_remote(workdir) or os.access(workdir, os.W_OK)


def save(config: ConfigDict, splits: Splits, workdir: pathlib.Path) -> None:
    """Writes splits.json and config.json; the latter last, for it tells that there is a run."""
    write_text(workdir / "splits.json", to_json(splits._asdict(), indent=1) + "\n")
    write_text(workdir / "config.json", to_json(config.to_dict(), indent=2) + "\n")


def save_scans(digests: dict[str, dict[str, str]], workdir: pathlib.Path) -> None:
    """Writes scans.json: of each case digests of 'image' and 'label'."""
    write_text(workdir / "scans.json", to_json(digests) + "\n")


def check_scans(digests: dict[str, dict[str, str]], workdir: pathlib.Path, finished: bool) -> None:
    """Compares the scans with those that a run began with; of a `finished` run others are told.

    Raises:
      UserError: a run would go on with other scans.
    """
    path = workdir / "scans.json"
    try:
        before = json.loads(path.read_text()) if path.exists() else {}
        changed = [
            f"the {what} of {case}"
            for case, old in before.items()
            for what, now in digests.get(case, {}).items()
            if old.get(what, now) != now  # of other runs other labels are used
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; without it scans are not compared") from None
    if not changed:
        return
    problem = f"{workdir} began with other scans: {changed[0]} has changed"
    if more := len(changed) - 1:
        problem += f", and {more} more"
    if not finished:
        raise UserError(f"{problem}; give back the old files, or choose another --workdir")
    say(f"WARNING: {problem}; scores are of the scans as they are now")


def load(workdir: pathlib.Path) -> tuple[ConfigDict, Splits]:
    """Reads config.json and splits.json.

    Raises:
      UserError: `workdir` holds no run.
    """
    try:
        config = (workdir / "config.json").read_text()
        splits = Splits(**json.loads((workdir / "splits.json").read_text()))
        config = ConfigDict(_tuples(json.loads(config)))
        if not {"data", "model", "method", "total_steps"} <= set(config):
            raise ValueError("config.json lacks fields")
        return config, splits
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{workdir} holds no run: no {error.filename}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"config.json or splits.json in {workdir} is damaged: {error}") from None


def check_version(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises UserError where the configuration of a run lacks what networks are made by today."""
    if lacking := ADDED_LATER - {name.rpartition(".")[2] for name in flatten(config)}:
        raise UserError(
            f"{workdir} is of an earlier version, which had no {min(lacking)}; use that "
            "version, or train anew"
        )


def _tuples(value: Any) -> Any:
    """The same with tuples for lists, at any depth."""
    if isinstance(value, dict):
        return {name: _tuples(own) for name, own in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def name_of(config: ConfigDict) -> str:
    """Such as 'cgs', or 'cgs over fixmatch'."""
    return ("cgs over " if "cgs" in config else "") + config.method.name


def check_same(
    saved: ConfigDict, config: ConfigDict, workdir: pathlib.Path, finished: bool
) -> None:
    """Raises UserError where `config` would go on with a run that was trained otherwise, FREE
    fields aside; a `finished` run may predict otherwise."""
    saved, now, free = flatten(saved), flatten(config), FREE + PREDICTION * finished
    for name in sorted(saved.keys() | now.keys()):
        if of_any_member(name) not in free and saved.get(name) != now.get(name):
            raise UserError(
                f"{workdir} was trained with {name}={saved.get(name)}, now it is {now.get(name)}; "
                "give back the old value or choose another --workdir"
            )


def of_any_member(name: str) -> str:
    """'data.size' for 'data.members.heart.size'."""
    return re.sub(r"^data\.members\.[^.]+\.", "data.", name)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'data.size': 256, ...}."""
    return flatten_dict(config.to_dict(), sep=".")
