"""Labelled slices only, with as many slices a step as the semi-supervised methods see."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of the supervised baseline over `config`."""
    config.method.specialists = False  # True: specialists as auxiliary heads
    config.batch.labelled = 24
    config.batch.unlabelled = 0
