"""Cross pseudo supervision as in SSL4MIS."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of CPS over `config`."""
    config.method.lambda_max = 0.1  # weight of the unsupervised loss at the end of the ramp
