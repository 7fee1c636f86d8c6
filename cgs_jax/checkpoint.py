"""Checkpoints with orbax: the latest two, and the best by mean validation Dice."""

import contextlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cgs_jax import distributed
from cgs_jax.errors import UserError
from cgs_jax.train_state import TrainState
from cgs_jax.writers import is_remote, say

NOT_VALIDATED = -1.0


class Checkpoints:
    """The folder `checkpoints` of a run. Writing goes on in the background.

    All processes of a job call the same methods in the same order; each writes its part.
    """

    def __init__(self, workdir: pathlib.Path):
        keep = checkpoint_managers.preservation_policy
        score = lambda metrics: metrics["dice"]  # noqa: E731
        policies = [keep.LatestN(2), keep.BestN(get_metric_fn=score, n=1)]
        options = ocp.CheckpointManagerOptions(
            best_fn=score, preservation_policy=keep.AnyPreservationPolicy(policies)
        )
        self._folder = workdir / "checkpoints"
        if not is_remote(workdir):
            self._folder = self._folder.resolve()
        self._check_metrics()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation Dice."""
        return self._manager.best_step()

    def save(self, state: TrainState, dice: float = NOT_VALIDATED) -> None:
        """Starts to save `state`; `dice` is what `best` compares.

        Raises:
          UserError: this one or the one before can not be written.
        """
        metrics = {"dice": float(dice), "checksum": int(_checksum(state))}
        with self._writing():
            self._manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=metrics)

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole, shaped and sharded as `like`; None: there is none.

        Damaged ones are renamed, with a warning.
        """
        while (step := self.latest) is not None:
            try:
                return self.restore(step, like)
            except UserError as error:
                if distributed.is_first():
                    self._set_aside(step, error)
                distributed.barrier("damaged checkpoint")
                self._manager.reload()
        return None

    def _set_aside(self, step, reason):
        aside = self._folder / f"damaged_{step}"
        say(f"WARNING: {reason}; it is now {aside.name}, and the one before is used")
        if aside.exists():
            shutil.rmtree(aside)
        (self._folder / str(step)).rename(aside)

    def _check_metrics(self):
        """Sets checkpoints aside whose metrics, which orbax reads at once, are damaged."""
        if distributed.is_first() and self._folder.exists():
            for path in self._folder.glob("*/metrics/metrics"):
                try:
                    float(json.loads(path.read_text())["dice"])
                except (ValueError, LookupError, TypeError) as error:
                    folder = path.parents[1]
                    if folder.name.isdigit():
                        self._set_aside(folder.name, f"checkpoint {folder} is damaged ({error})")
        distributed.barrier("metrics checked")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, shaped and sharded as `like`.

        Raises:
          UserError: it can not be read, or is not what was saved.
        """
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            saved = self._manager.metrics(step).get("checksum")  # older runs have none
            damage = saved not in (None, int(_checksum(state))) and "its checksum differs"
        except Exception as error:
            damage = str(error).split("\n")[0][:100]
        if damage:
            raise UserError(f"checkpoint {self._folder / str(step)} is damaged ({damage})")
        return state

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
        except jax.errors.JaxRuntimeError:  # not the disk: another process is lost
            raise
        except (OSError, ValueError, RuntimeError) as error:
            full = "No space left on device"
            reason = full if full in str(error) else " ".join(str(error).split())[:200]
            raise UserError(
                f"can not write a checkpoint to {self._folder}: {reason}; the ones before are whole"
            ) from error


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """A number of all bits, modulo 2**32: the same however the arrays are split over devices."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").ravel()
        places = jnp.arange(x.size, dtype=jnp.uint32)
        total = 31 * total + jnp.sum(bits.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)
    return total
