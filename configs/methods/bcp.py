"""BCP with the authors' weights for ACDC."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of BCP over `config`."""
    config.method.lambda_max = 0.5  # weight of unlabelled parts, from the first step
    config.method.pretrain = 10_000  # steps on labelled images alone, of total_steps
    config.method.ema_decay = 0.99  # teacher
    config.total_steps = 40_000
