"""SGD with momentum, as the ACDC literature trains, or AdamW; both under polynomial decay."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from cgs_jax.runtime.errors import check_choice


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Optimiser of `config.optimizer` and its learning rate by step.

    Raises:
      UserError: there is no optimiser of that name.
    """
    o = config.optimizer
    check_choice("optimizer.name", o.name, ("adamw", "sgd"))
    schedule = optax.polynomial_schedule(o.lr, 0.0, o.power, max(config.total_steps, 1))
    if o.name == "sgd":
        return sgd(schedule, o.momentum, o.weight_decay), schedule
    # Loshchilov and Hutter, 1711.05101
    optimizer = optax.adamw(
        schedule, o.momentum, o.momentum_squares, weight_decay=o.weight_decay, mask=_kernels
    )
    return optimizer, schedule


def sgd(
    schedule: optax.ScalarOrSchedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """torch.optim.SGD: v = m v + (g + wd w), w = w - lr v.

    Weight decay is coupled: it passes through the momentum.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum))


def _kernels(params: Any) -> Any:
    """True for the kernels of convolutions, matrix products and stacked heads, which decay. Biases,
    the scales of norms and position embeddings do not: nothing says that they should be near 0."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.endswith("kernel"), params)
