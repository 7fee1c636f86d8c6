"""Uncertainty-aware mean teacher as in SSL4MIS."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of UA-MT over `config`."""
    # weight of the unsupervised loss at the end of the ramp; there .1 beside half the supervised
    config.method.lambda_max = 0.2
    config.method.begin = 0.0  # share of total_steps after which it counts
    config.method.ema_decay = 0.99  # teacher
    config.method.teacher = "train"  # its mode; or 'eval', without dropout
    config.method.samples = 8  # noisy passes that measure its uncertainty
