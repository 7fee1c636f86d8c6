"""One network for several data sets against one for each, by three methods.

python -m cgs_jax.sweep --config configs/collection.py:members=acdc+brain@nnunet \
    --sweep configs/sweeps/systems.py --workdir runs/systems --seeds 3 --config.data.root=FOLDER
"""

from configs import common


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); every member has a table, in
    which its rows are held against the first row.

    All rows have as many steps and slices a step.
    """
    if config.data.name != "collection":
        raise ValueError("it is for several data sets: --config configs/collection.py:members=...")
    methods = {"versemi": {}, "cgs": {}, "supervised": common.labelled_only(config)}
    rows = {method: (f"method={method}", fields) for method, fields in methods.items()}
    for name, own in config.data.members.items():
        for method, fields in methods.items():
            arguments = f"method={method},members={name}@{own.file}"
            rows[f"{method}_{name}"] = (arguments, fields)
    return rows
