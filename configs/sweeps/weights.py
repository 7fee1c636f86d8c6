"""The methods of ablation.py at three weights of unlabelled images, with own ramp and that of CGS.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=7 --sweep configs/sweeps/weights.py \
    --workdir runs/weights --seeds 1 --config.test=False --config.data.root=FOLDER

The best row of a method on the validation cases says at which weight it is to be compared.
"""

import functools

from configs import common
from configs.sweeps.ablation import OTHERS

SHARES = {"third": 1 / 3, "own": 1.0, "triple": 3.0}


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    rows = {}
    for method in (*OTHERS, "cgs"):
        own = common.get_config(method).method
        for ramp in sorted({own.ramp, 1.0}):
            for name, share in SHARES.items():
                fields = functools.partial(_weighed, share=share, ramp=ramp)
                rows[f"{method}_{name}_ramp_{ramp:g}"] = (f"method={method}", fields)
    return rows


def _weighed(own, share, ramp):
    return {"method.lambda_max": share * own.method.lambda_max, "method.ramp": ramp}
