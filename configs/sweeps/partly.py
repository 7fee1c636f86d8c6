"""What the labels of partly annotated cases are worth: as they are, and used as images only.

python -m cgs_jax.sweep --config configs/nnunet.py --sweep configs/sweeps/partly.py \
    --workdir runs/partly --seeds 3 --config.data.root=FOLDER

FOLDER has `partial_labels.json` (docs/own_data.md); the other cases are annotated for all organs.
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    whole = {"data.partly_labelled": False}
    alone = common.labelled_only(config, strong=True)
    return {
        "cgs_whole": ("method=cgs", whole),
        "cgs_partly": ("method=cgs", {}),
        "supervised_whole": ("method=supervised", alone | whole),
        "supervised_partly": ("method=supervised", alone),
    }
