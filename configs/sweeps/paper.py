"""Labelled slices alone and CGS, trained and scored as in the paper; and CGS by our scoring.

bash launch/reproduce_acdc.sh FOLDER
"""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ).

    launch/reproduce_acdc.sh trains the last two rows once.
    """
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for both
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    scored = {"upsample": "nearest", "largest_component": False}
    return {
        "supervised": ("method=supervised", scored | labelled_only),
        "cgs": ("method=cgs", scored),
        "cgs_our_scoring": ("method=cgs", {}),
    }
