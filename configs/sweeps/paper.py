"""Labelled slices alone, CGS, and what CGS is without specialists.

bash launch/reproduce_acdc.sh FOLDER
"""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for all
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    strong = {"method.jitter": True, "method.cutmix": 1.0}
    # The generalist learns from the teacher by one term instead of three, so by three times the
    # weight: unlabelled images weigh as much against labelled ones as in CGS.
    alone = {
        "method.specialists": False,
        "method.terms": ("G_from_g",),
        "method.lambda_max": 3 * config.method.lambda_max,
    }
    return {
        "supervised": ("method=supervised", labelled_only),
        "supervised_strong": ("method=supervised", labelled_only | strong),
        "cgs": ("method=cgs", {}),
        "cgs_without_specialists": ("method=cgs", alone),
    }
