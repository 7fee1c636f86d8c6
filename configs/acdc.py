"""ACDC cardiac MR, 3 or 7 labelled patients of 70.

python -m cgs_jax.main --config configs/acdc.py:method=cgs,labelled=7 --workdir runs/acdc \
    --config.data.root=FOLDER
"""

from configs import common


def get_config(arg=None):
    options = common.parse(arg, method="cgs", base="", labelled="7")
    config = common.get_config(options["method"], options["base"])
    config.data.name = "acdc"
    config.data.classes = ("RV", "Myo", "LV")
    config.data.labelled = int(options["labelled"])  # patients
    config.data.patient = r"(patient\d+)"
    config.data.normalise = "minmax"
    config.data.slicing = "stored"  # short-axis stacks, as the literature reads them
    config.largest_component = True  # a heart has one of each
    return config
