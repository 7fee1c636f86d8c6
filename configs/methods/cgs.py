"""CGS with the paper's tau and lambda_max (the authors' code has 0.95 and 0.1)."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of CGS over `config`."""
    config.method.tau = 0.9  # confidence that the generalist's pseudo-labels need
    config.method.lambda_max = 2.0  # weight of the unsupervised loss at the end of the ramp
    config.method.ema_decay = 0.99  # teacher
    config.method.plan = "lean"  # or 'full', the authors' iteration at twice the work
