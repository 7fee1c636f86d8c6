"""The three systems beside labelled slices alone, on any data set.

python -m cgs_jax.sweep --config configs/nnunet.py --sweep configs/sweeps/three.py \
    --workdir runs/three --seeds 3 --config.data.root=FOLDER
"""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    slices = config.batch.labelled + config.batch.unlabelled  # as many a step for all
    strong = {"method.jitter": True, "method.cutmix": 1.0}
    labelled_only = {"batch.labelled": slices, "batch.unlabelled": 0}
    return {
        "supervised": ("method=supervised", labelled_only | strong),
        "cgs": ("method=cgs", {}),
        "versemi": ("method=versemi", {}),
        "cmems": ("method=cmems", {}),
    }
