"""URPC as in SSL4MIS."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of URPC over `config`."""
    # weight of the unsupervised loss at the end of the ramp; there .1 beside half the supervised
    config.method.lambda_max = 0.2
