"""Checkpoints with orbax: the latest two, and the best by mean validation Dice."""

import contextlib
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cgs_jax.runtime import processes
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import is_remote
from cgs_jax.training.train_state import TrainState

NOT_VALIDATED = -1.0


class Checkpoints:
    """The folder `checkpoints` of a run. Writing goes on in the background.

    All processes of a job call the same methods in the same order; each writes its part.

    Raises:
      UserError: `read_only`, which leaves all as it is, and a checkpoint is damaged.
    """

    def __init__(self, workdir: pathlib.Path, read_only: bool = False):
        keep = checkpoint_managers.preservation_policy
        score = lambda metrics: metrics["dice"]  # noqa: E731
        policies = [keep.LatestN(2), keep.BestN(get_metric_fn=score, n=1)]
        options = ocp.CheckpointManagerOptions(
            best_fn=score,
            preservation_policy=keep.AnyPreservationPolicy(policies),
            read_only=read_only,
            create=not read_only,
            save_interval_steps=int(not read_only),  # else orbax warns that it will not save
        )
        self._workdir, self._read_only = workdir, read_only
        self._folder = workdir / "checkpoints"
        if not is_remote(workdir):
            self._folder = self._folder.resolve()
        if not read_only:
            self._check_metrics()
        elif not self._folder.exists():
            raise UserError(f"{workdir} holds no checkpoint; train first")
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except ValueError as error:
            raise UserError(f"a checkpoint in {self._folder} is damaged ({error})") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation Dice."""
        step = self._manager.best_step()
        if step is None:
            return None
        metrics = self._manager.metrics(step) or {}
        return None if metrics.get("dice", NOT_VALIDATED) == NOT_VALIDATED else step

    def save(self, state: TrainState, dice: float = NOT_VALIDATED) -> None:
        """Starts to save `state`; `dice` is what `best` compares.

        Raises:
          UserError: this one or the one before can not be written.
        """
        metrics = {"dice": float(dice), "checksum": _checksum_with(state, dice)}
        with self._writing():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=metrics)

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint, shaped and sharded as `like`; None: there is none.

        A damaged one is renamed, with a warning, and the one before is used.

        Raises:
          UserError: all are damaged.
        """
        return self._restore(lambda: self.latest, like)

    def restore_best(self, like: TrainState) -> TrainState:
        """Likewise, the one with the highest validation Dice.

        Raises:
          UserError: all are damaged, or there is none.
        """
        state = self._restore(lambda: self.best, like)
        if state is None:
            raise UserError(f"{self._workdir} holds no validated checkpoint; train first")
        return state

    def _restore(self, choose, like):
        with self._writing():
            self._manager.wait_until_finished()
        while (step := choose()) is not None:
            state, damage = self._read(step, like)
            if not damage:
                return state
            damage = f"checkpoint {self._folder / str(step)} is damaged ({damage})"
            if self._read_only:
                raise UserError(damage)
            if processes.is_first():
                self._set_aside(step, damage)
            processes.barrier("damaged checkpoint")
            self._manager.reload()
        if self.latest is None and any(self._folder.glob("damaged_*")):
            raise UserError(f"no checkpoint in {self._folder} is whole; train in another --workdir")
        return None

    def _read(self, step, like):
        """The state of `step`, or what is wrong with it in any of the processes."""
        state, damage = None, ""
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except (OSError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # says nothing of the checkpoint
        except Exception as error:
            if processes.is_lost(error):
                raise
            damage = str(error).split("\n")[0][:100]
        if damage := next(filter(None, processes.gather(damage)), ""):
            return None, damage
        saved = self._manager.metrics(step) or {}
        if saved.get("checksum") != _checksum_with(state, saved.get("dice", NOT_VALIDATED)):
            return None, "its checksum differs"
        return state, ""

    def _set_aside(self, step, damage):
        aside = self._folder / f"damaged_{step}_{time.time():.0f}"
        say(f"WARNING: {damage}; it is now {aside.name}")
        (self._folder / str(step)).rename(aside)

    def _check_metrics(self):
        """Sets checkpoints aside whose metrics, which orbax reads at once, are damaged."""
        if processes.is_first() and self._folder.exists():
            for folder in (path for path in self._folder.iterdir() if path.name.isdigit()):
                metrics = folder / "metrics" / "metrics"
                try:
                    if metrics.exists():
                        float(json.loads(metrics.read_text())["dice"])
                except (ValueError, LookupError, TypeError) as error:
                    self._set_aside(folder.name, f"checkpoint {folder} is damaged ({error})")
        processes.barrier("metrics checked")

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: it can not be written.
        """
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            if processes.is_lost(error) or not (
                isinstance(error, OSError) or "Error writing" in text or "Error opening" in text
            ):
                raise
            full = "No space left on device"
            raise UserError(
                f"can not write a checkpoint to {self._folder}: "
                f"{full if full in text else text[:200]}; the ones before are whole"
            ) from error


def _checksum_with(state: TrainState, dice: float) -> int:
    return int(_checksum((state, jnp.float32(dice))))


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """A number of all bits, modulo 2**32: the same however the arrays are split over devices."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").ravel()
        places = jnp.arange(x.size, dtype=jnp.uint32)
        total = 31 * total + jnp.sum(bits.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)
    return total
