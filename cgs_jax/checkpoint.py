"""Checkpoints with orbax: the latest two, and the best by mean validation Dice."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cgs_jax import distributed
from cgs_jax.errors import UserError
from cgs_jax.train_state import TrainState
from cgs_jax.writers import say

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
        folder = (workdir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(folder, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation Dice."""
        return self._manager.best_step()

    def save(self, state: TrainState, dice: float = NOT_VALIDATED) -> None:
        """Starts to save `state`; `dice` is what `best` compares."""
        metrics = {"dice": float(dice), "checksum": int(_checksum(state))}
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=metrics)

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole, shaped and sharded as `like`; None: there is none.

        Damaged ones are renamed, with a warning.
        """
        while (step := self.latest) is not None:
            try:
                return self.restore(step, like)
            except UserError as error:
                aside = f"damaged_{step}"
                say(f"WARNING: {error}; it is now {aside}, and the one before is used")
                if distributed.is_first():
                    (self._manager.directory / str(step)).rename(self._manager.directory / aside)
                distributed.barrier("damaged checkpoint")
                self._manager.reload()
        return None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, shaped and sharded as `like`.

        Raises:
          UserError: it can not be read, or is not what was saved.
        """
        folder = self._manager.directory / str(step)
        try:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            saved = self._manager.metrics(step).get("checksum")  # older runs have none
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"checkpoint {folder} is damaged ({reason})") from error
        if saved not in (None, int(_checksum(state))):
            raise UserError(f"checkpoint {folder} is damaged (its checksum differs)")
        return state

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """A number of all bits, modulo 2**32: the same however the arrays are split over devices."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").ravel()
        places = jnp.arange(x.size, dtype=jnp.uint32)
        total = 31 * total + jnp.sum(bits.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)
    return total
