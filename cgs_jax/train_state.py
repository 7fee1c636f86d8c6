"""Everything that training changes."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
    """One pytree: what is saved, restored and donated.

    There is no random key in it: keys are fold_in(seed, step), so a resumed run draws what the
    undisturbed one would have drawn.
    """

    step: jax.Array  # updates done so far
    params: Any  # what the optimiser changes
    model_state: Any  # batch norm statistics
    opt_state: Any
    extra: Any  # what a method keeps besides, such as a teacher
