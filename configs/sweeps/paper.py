"""Labelled slices alone, CGS, and what CGS is without specialists.

bash launch/reproduce_acdc.sh FOLDER
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    # The generalist learns from the teacher by one term instead of three, so by three times the
    # weight: unlabelled images weigh as much against labelled ones as in CGS.
    alone = {
        "method.specialists": False,
        "method.terms": ("G_from_g",),
        "method.lambda_max": 3 * config.method.lambda_max,
    }
    return {
        "supervised": ("method=supervised", common.labelled_only(config)),
        "supervised_strong": ("method=supervised", common.labelled_only(config, strong=True)),
        "cgs": ("method=cgs", {}),
        "cgs_without_specialists": ("method=cgs", alone),
    }
