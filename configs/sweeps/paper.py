"""Labelled slices alone and CGS as the paper trains and scores them, and CGS by our defaults.

bash launch/reproduce_acdc.sh FOLDER
"""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for all
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    paper = {"upsample": "nearest", "largest_component": False}
    recipe = {"method.tau": 0.9, "method.lambda_max": 2.0}
    return {
        "supervised": ("method=supervised", paper | labelled_only),
        "cgs_paper": ("method=cgs", paper | recipe),
        "cgs": ("method=cgs", {}),
    }
