"""CGS with the paper's tau and lambda_max (the authors' code has 0.95 and 0.1)."""

from ml_collections import ConfigDict


def update(config: ConfigDict) -> None:
    """Lays the fields of CGS over `config`."""
    consistency(config.method)
    config.method.ema_decay = 0.99  # teacher
    config.method.teacher = "train"  # its mode; or 'eval', without dropout
    config.method.plan = "lean"  # or 'full', the authors' iteration at twice the work
    config.method.cutmix = 1.0  # probability
    # probability that a labelled image fills the box of CutMix, not an unlabelled one; lean plan
    config.method.copy_paste = 0.0
    config.method.specialists = True  # False: none, with terms=('G_from_g',), as a control


def consistency(section: ConfigDict) -> None:
    """The fields of what specialists and generalist learn from each other."""
    section.tau = 0.9  # confidence that the generalist's pseudo-labels need
    section.lambda_max = 2.0  # weight of the unsupervised loss at the end of the ramp
    # who learns, generalist or specialists, from whose labels: the generalist's, the specialists',
    # or the consensus of both
    section.terms = ("G_from_g", "G_from_s", "G_from_e", "S_from_g", "S_from_s", "S_from_e")
    section.ihed = True  # drop pixels where the specialists contradict each other
