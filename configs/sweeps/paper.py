"""CGS by the paper's recipe, and labelled slices alone: bash launch/reproduce_acdc.sh FOLDER."""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for both
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    return {"supervised": ("method=supervised", labelled_only), "cgs": ("method=cgs", {})}
