"""CGS laid over other methods, each beside the method alone.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=7 --sweep configs/sweeps/plugin.py \
    --workdir runs/plugin --seeds 3 --config.data.root=FOLDER
"""

OTHERS = ("fixmatch", "mean_teacher", "ua_mt", "bcp")


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ)."""
    alone = {name: (f"method={name}", {}) for name in OTHERS}
    return alone | {f"cgs+{name}": (f"method=cgs,base={name}", {}) for name in OTHERS}
