"""SegTHOR thorax CT, 3 or 6 labelled patients of 28. Phantoms: bash launch/demo.sh.

python -m cgs_jax.main --config configs/segthor.py:method=cgs,labelled=3 --workdir runs/segthor \
    --config.data.root=FOLDER
"""

from configs import common


def get_config(arg=None):
    config, options = common.begin(arg, labelled="3")
    config.data.name = "segthor"
    config.data.classes = ("esophagus", "heart", "trachea", "aorta")
    config.data.labelled = int(options["labelled"])  # patients
    # HU: soft tissue, with contrast agent and air kept apart
    config.data.normalise = (-400.0, 400.0)
    config.data.slicing = "axial"
    return config
