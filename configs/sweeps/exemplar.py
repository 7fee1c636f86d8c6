"""One annotated slice: on it alone, and with all other slices unlabelled, by three methods.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=1,recipe=patches \
    --sweep configs/sweeps/exemplar.py --workdir runs/exemplar --seeds 3 \
    --config.data.root=FOLDER --config.data.exemplar=auto
"""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for all
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    strong = {"method.jitter": True, "method.cutmix": 1.0}
    return {
        "supervised": ("method=supervised", labelled_only),
        "supervised_strong": ("method=supervised", labelled_only | strong),
        "cps": ("method=cps", {}),
        "cgs": ("method=cgs", {}),
        "cmems": ("method=cmems", {}),
    }
