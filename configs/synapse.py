"""Synapse abdominal CT, eight organs; N labelled patients of 18 less the validation patients.

python -m cgs_jax.main --config configs/synapse.py:method=cgs,labelled=4 --workdir runs/synapse \
    --config.data.root=FOLDER
"""

from configs import common


def get_config(arg=None):
    config, options = common.begin(arg, labelled="4")
    config.data.name = "synapse"
    config.augment.flip = "auto"
    config.data.classes = (
        *("aorta", "gallbladder", "left kidney", "right kidney"),
        *("liver", "pancreas", "spleen", "stomach"),
    )
    config.data.labelled = int(options["labelled"])  # patients
    config.data.normalise = (-125.0, 275.0)  # HU; TransUNet's arrays come with it applied
    config.data.slicing = "axial"
    return config
