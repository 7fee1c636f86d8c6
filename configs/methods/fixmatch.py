"""FixMatch as it is meant, with the threshold of the segmentation literature."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of FixMatch over `config`."""
    config.method.tau = 0.95  # confidence that pseudo-labels need
    config.method.lambda_max = 1.0  # weight of the unsupervised loss at the end of the ramp
