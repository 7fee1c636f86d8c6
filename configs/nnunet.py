"""Your own scans in nnU-Net's raw layout; scans without a label file are the unlabelled pool.

python -m cgs_jax.main --config configs/nnunet.py:method=cgs --workdir runs/mine \
    --config.data.root=FOLDER/Dataset004_Hippocampus
"""

from ml_collections import FieldReference

from configs import common


def get_config(arg=None):
    config, options = common.begin(arg, labelled="0")
    config.data.name = "nnunet"
    config.augment.flip = "auto"
    config.data.classes = ()  # from dataset.json
    config.data.channels = 0  # from dataset.json, too
    config.data.labelled = int(options["labelled"])  # patients; 0 uses all labels there are
    config.data.normalise = "auto"  # CT: the window of the organs; else 'percentile'
    # 'auto': square scans of one kind as they are; others at their median pixel, through windows as
    # large as the median slice, at most 256 pixels a side. With a size squares of so many pixels
    for field in ("size", "patch", "spacing", "slice_spacing"):
        del config.data[field]
        config.data[field] = FieldReference("auto", field_type=object)
    # Where scans are larger than windows, half of the windows lie anywhere, and four of ten are
    # centred on an organ.
    config.data.patch_anywhere, config.data.patch_foreground = 0.5, 0.4
    # The paper's 2.0 lets wrong pseudo-labels win before small organs are found (docs/results.md).
    common.weigh_pseudo_labels(config, 0.5)
    config.data.slicing = "axial"  # or 'coarsest', 'coronal', 'sagittal', 'stored'
    return config
