"""SGD with momentum under polynomial decay, as the ACDC literature trains."""

import optax
from ml_collections import ConfigDict


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Optimiser of `config.optimizer` and its learning rate by step.

    Weight decay is the coupled one of torch's SGD: it passes through the momentum.
    """
    o = config.optimizer
    schedule = optax.polynomial_schedule(o.lr, 0.0, o.power, max(config.total_steps, 1))
    return sgd(schedule, o.momentum, o.weight_decay), schedule


def sgd(
    schedule: optax.ScalarOrSchedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """torch.optim.SGD: v = m v + (g + wd w), w = w - lr v."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum))
