"""Labelled slices alone, CGS, and what CGS is without specialists.

bash launch/reproduce_acdc.sh FOLDER
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    return {
        "supervised": ("method=supervised", common.labelled_only(config)),
        "supervised_strong": ("method=supervised", common.labelled_only(config, strong=True)),
        "cgs": ("method=cgs", {}),
        "cgs_without_specialists": ("method=cgs", common.without_specialists(config)),
    }
