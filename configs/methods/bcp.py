"""BCP with the authors' weights for ACDC; they train 10,000 + 30,000 steps."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of BCP over `config`."""
    config.method.lambda_max = 0.5  # weight of unlabelled parts
    config.method.ramp = 0.0
    config.method.pretrain = 0.25  # share of total_steps, on labelled images alone
    config.method.ema_decay = 0.99  # teacher
    config.method.teacher = "train"  # its mode; or 'eval', without dropout
