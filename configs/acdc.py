"""ACDC cardiac MR, 3 or 7 labelled patients of 70.

python -m cgs_jax.main --config configs/acdc.py:method=cgs,labelled=7 --workdir runs/acdc \
    --config.data.root=FOLDER

`recipe=paper` is the literature's training: whole slices, scaled by minimum and maximum. With
`recipe=patches` a step sees 6 + 6 windows around the heart at full resolution, not 12 + 12 slices.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None):
    config, options = common.begin(arg, labelled="7", recipe="paper")
    config.data.name = "acdc"
    config.data.classes = ("RV", "Myo", "LV")
    config.data.labelled = int(options["labelled"])  # patients
    config.data.patient = r"(patient\d+)"
    config.data.normalise = "minmax"
    config.data.slicing = "stored"  # short-axis stacks, as the literature reads them
    config.largest_component = True  # a heart has one of each
    if options["recipe"] == "patches":
        patches(config)
    elif options["recipe"] != "paper":
        raise ValueError(f"config argument recipe={options['recipe']}: there are: paper, patches")
    return config


def patches(config: ConfigDict) -> None:
    """Lays the recipe over `config`; 10,000 steps take some hours on two cores."""
    config.total_steps = 10_000
    config.batch.labelled, config.batch.unlabelled = 6, 6
    if config.method.name == "supervised":
        config.batch.labelled, config.batch.unlabelled = 12, 0  # as many slices a step
    config.data.patch = 128
    # A few bright voxels set the maximum: in some labelled scans the heart is ten times darker.
    config.data.normalise = "percentile"
    config.precise_bn = 50
    config.optimizer.lr *= 2
    common.weigh_pseudo_labels(config, 1.0)
