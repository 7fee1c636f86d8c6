"""Cross pseudo supervision as in SSL4MIS."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of CPS over `config`."""
    # weight of the unsupervised loss at the end of the ramp; there .1 beside half the supervised
    config.method.lambda_max = 0.2
    config.method.cutmix = 0.0  # probability; CutMix is in the paper, not in SSL4MIS
    config.method.jitter = False  # True: labels of the weak view are learnt on the strong one
    config.method.predicts = "first"  # the first network; or the 'mean' of both
