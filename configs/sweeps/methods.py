"""All methods, and CGS over those that it can lie on.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=7 --sweep configs/sweeps/methods.py \
    --workdir runs/methods --seeds 3 --config.data.root=FOLDER
"""

ALONE = ("mean_teacher", "ua_mt", "fixmatch", "cps", "urpc", "unimatch", "bcp", "ad_mt")


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for all
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    return (
        {"supervised": ("method=supervised", labelled_only)}
        | {name: (f"method={name}", {}) for name in ALONE}
        | {"cgs": ("method=cgs", {})}
        | {f"cgs+{name}": (f"method=cgs,base={name}", {}) for name in ALONE}
    )
