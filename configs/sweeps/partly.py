"""What the labels of partly annotated cases are worth to CGS and to labelled slices alone: rows
`..._partly` use them, rows `..._whole` have the labels of wholly annotated cases alone.

python -m cgs_jax.sweep --config configs/nnunet.py --sweep configs/sweeps/partly.py \
    --workdir runs/partly --seeds 3 --config.data.root=FOLDER

FOLDER has `partial_labels.json` (docs/own_data.md); labelled cases that it does not list are wholly
annotated. The table holds all rows against the first; to have two rows held against each
other, train them alone in another folder (`--rows supervised_whole,supervised_partly`).
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
