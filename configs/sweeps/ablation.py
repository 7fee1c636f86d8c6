"""All methods but CMEMS-style, and CGS without each of its parts.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=7 --sweep configs/sweeps/ablation.py \
    --workdir runs/ablation --seeds 3 --config.data.root=FOLDER
"""

from configs import common

OTHERS = (
    "mean_teacher",
    "ua_mt",
    "ict",
    "fixmatch",
    "cps",
    "urpc",
    "unimatch",
    "bcp",
    "ad_mt",
    "versemi",
)


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first.

    `config` is that of the command line.
    """
    labelled_only, batch = common.labelled_only(config), config.batch
    # method=supervised on the command line has as many labelled slices as others of both kinds
    labelled = batch.labelled if batch.unlabelled else batch.labelled // 2
    few = {"batch.labelled": labelled, "batch.unlabelled": 0}
    return {
        "supervised": ("method=supervised", labelled_only),
        # what the others see of labels, and specialists as auxiliary heads: two controls
        "supervised_fewer_slices": ("method=supervised", few),
        "supervised_with_heads": (
            "method=supervised",
            labelled_only | {"method.specialists": True},
        ),
        "supervised_strong": ("method=supervised", common.labelled_only(config, strong=True)),
        **{name: (f"method={name}", {}) for name in OTHERS},
        # by what CGS teaches with: a teacher that averages, and CutMix
        "fixmatch_teacher": (
            "method=cgs",
            lambda own: (
                common.without_specialists(own) | {"method.tau": 0.95, "method.lambda_max": 1.0}
            ),
        ),
        "cgs": ("method=cgs", {}),
        "cgs_without_ihed": ("method=cgs", {"method.ihed": False}),
        "cgs_without_cross": ("method=cgs", {"method.terms": ("G_from_g", "S_from_s")}),
        # as much unsupervised loss as without cross-consistency: two terms of six
        "cgs_third": ("method=cgs", lambda own: {"method.lambda_max": own.method.lambda_max / 3}),
        "cgs_without_specialists": ("method=cgs", common.without_specialists),
        "cgs_binary": ("method=cgs", {"model.head_classes": 2}),
    }
