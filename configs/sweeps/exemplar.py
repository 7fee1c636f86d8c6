"""One annotated slice: on it alone, and with all other slices unlabelled, by three methods.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=1,recipe=patches \
    --sweep configs/sweeps/exemplar.py --workdir runs/exemplar --seeds 3 \
    --config.data.root=FOLDER --config.data.exemplar=auto
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    return {
        "supervised": ("method=supervised", common.labelled_only(config)),
        "supervised_strong": ("method=supervised", common.labelled_only(config, strong=True)),
        "cps": ("method=cps", {}),
        "cgs": ("method=cgs", {}),
        "cmems": ("method=cmems", {}),
    }
