"""Mean teacher as in SSL4MIS."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of mean teacher over `config`."""
    config.method.lambda_max = 0.1  # weight of the unsupervised loss at the end of the ramp
    config.method.begin = 1000  # step from which it counts
    config.method.ema_decay = 0.99  # teacher
