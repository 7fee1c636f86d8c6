"""Labelled slices only, with as many slices a step as the semi-supervised methods see."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of the supervised baseline over `config`."""
    config.method.specialists = False  # True: specialists as auxiliary heads
    config.method.jitter = False  # True: brightness and contrast as in the others' strong view
    config.method.cutmix = 0.0  # probability that a box is filled from another labelled slice
    config.batch.labelled += config.batch.unlabelled
    config.batch.unlabelled = 0
