"""The three systems beside labelled slices alone, on any data set.

python -m cgs_jax.sweep --config configs/nnunet.py --sweep configs/sweeps/three.py \
    --workdir runs/three --seeds 3 --config.data.root=FOLDER
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    return {
        "supervised": ("method=supervised", common.labelled_only(config, strong=True)),
        "cgs": ("method=cgs", {}),
        "versemi": ("method=versemi", {}),
        "cmems": ("method=cmems", {}),
    }
