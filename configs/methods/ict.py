"""ICT as in SSL4MIS."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of ICT over `config`."""
    # weight of the unsupervised loss at the end of the ramp; there .1 beside half the supervised
    config.method.lambda_max = 0.2
    config.method.alpha = 0.2  # shares of the blend are drawn from Beta(alpha, alpha)
    config.method.ema_decay = 0.99  # teacher
    config.method.teacher = "train"  # its mode; or 'eval', without dropout
