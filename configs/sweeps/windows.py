"""What CGS's training on windows of ACDC is made of, one thing changed at a time, to be chosen on
validation cases.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=7,recipe=patches \
    --sweep configs/sweeps/windows.py --workdir runs/windows --seeds 2 --config.test=False \
    --config.total_steps=3000 --config.data.root=FOLDER

What has nothing to do with windows is in configs/sweeps/recipe.py.
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    changes = {
        "windows": {},
        "minmax": {"data.normalise": "minmax"},
        "running_statistics": {"precise_bn": 0},
        "grow": {"data.grow_at": (0.5, 0.95), "data.grow_to": (160, 0)},
        "whole_at_the_end": {"data.grow_at": (0.95,), "data.grow_to": (0,)},
        "windows_192": {"data.patch": 192},
        "whole_slices": {"data.patch": 0},
        "near_organs": {"data.patch_foreground": 0.4},
        "anywhere": {"data.patch_anywhere": 0.5},
        "lr_0.01": {"optimizer.lr": 0.01},
        "lambda_2": {"method.lambda_max": 2.0},
        "without_specialists": common.without_specialists,
    }
    return {name: ("method=cgs", fields) for name, fields in changes.items()}
