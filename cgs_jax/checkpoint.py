"""Checkpoints with orbax: the latest, and the best by mean validation Dice."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cgs_jax.errors import UserError
from cgs_jax.train_state import TrainState


class Checkpoints:
    """The folder `checkpoints` of a run. Writing goes on in the background."""

    def __init__(self, workdir: pathlib.Path):
        keep = checkpoint_managers.preservation_policy
        score = lambda metrics: metrics["dice"]  # noqa: E731
        policies = [keep.LatestN(1), keep.BestN(get_metric_fn=score, n=1)]
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

    def save(self, state: TrainState, dice: float) -> None:
        """Starts to save `state`; `dice` is what `best` compares."""
        self._manager.save(
            int(state.step), args=ocp.args.StandardSave(state), metrics={"dice": float(dice)}
        )

    def restore(self, step: int, like: Any) -> TrainState:
        """The state of `step`, shaped and sharded as `like`.

        Raises:
          UserError: it can not be read.
        """
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:
            reason = str(error).split("\n")[0]
            folder = self._manager.directory / str(step)
            raise UserError(f"{folder} is damaged: remove it, or start anew ({reason})") from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()
