"""UniMatch with the authors' weights for ACDC."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of UniMatch over `config`."""
    config.method.tau = 0.95  # confidence that pseudo-labels need
    config.method.lambda_max = 2.0  # weight of the rest; the authors halve the supervised loss
    config.method.ramp = 0.0
    config.method.cutmix = 0.5  # probability
