"""Your own scans in nnU-Net's raw layout; scans without a label file are the unlabelled pool.

python -m cgs_jax.main --config configs/nnunet.py:method=cgs --workdir runs/mine \
    --config.data.root=FOLDER/Dataset004_Hippocampus
"""

from configs import common


def get_config(arg=None):
    options = common.parse(arg, method="cgs", base="", model="unet", labelled="0")
    config = common.get_config(options["method"], options["base"], options["model"])
    config.data.name = "nnunet"
    config.augment.flip = "auto"
    config.data.classes = ()  # from dataset.json
    config.data.channels = 0  # from dataset.json, too
    config.data.labelled = int(options["labelled"])  # patients; 0 uses all labels there are
    config.data.normalise = "auto"  # CT: the window of the organs; else 'percentile'
    config.data.slicing = "axial"  # or 'coarsest', 'coronal', 'sagittal', 'stored'
    return config
