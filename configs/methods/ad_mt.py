"""AD-MT with the authors' weights for ACDC."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of AD-MT over `config`."""
    config.method.tau = 0.95  # confidence that pseudo-labels need
    # weight of the unsupervised loss at the end of the ramp; there 2 beside half the supervised
    config.method.lambda_max = 4.0
    config.method.ramp = 0.25
    config.method.ema_decay = 0.99  # teachers
