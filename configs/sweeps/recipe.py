"""CGS with one thing changed at a time, to be chosen on validation cases.

python -m cgs_jax.sweep --config configs/acdc.py:labelled=7 --sweep configs/sweeps/recipe.py \
    --workdir runs/recipe --seeds 3 --config.test=False --config.data.root=FOLDER

What changes prediction alone needs no training: cgs_jax.evaluate --workdir runs/recipe/cgs/seed0
--upsample nearest --nolargest_component.
"""


def get_sweep(config):
    """Row -> (arguments of the config file, fields that differ); all are held against the first."""
    changes = {
        "cgs": {},
        "size_224": {"data.size": 224},
        "bfloat16": {"model.dtype": "bfloat16"},
        "tau_0.95": {"method.tau": 0.95},
        "lambda_0.67": {"method.lambda_max": 2 / 3},
        "lambda_0.1": {"method.lambda_max": 0.1},
        "teacher_eval": {"method.teacher": "eval"},
        "ema_0.999": {"method.ema_decay": 0.999},
        "strength_0.8": {"augment.strength": 0.8},
        "copy_paste": {"method.copy_paste": 0.5},
        "plan_full": {"method.plan": "full"},
    }
    if config.model.name == "unet":
        changes["width_32"] = {"model.channels": (32, 64, 128, 256, 512)}
    rows = {name: ("method=cgs", fields) for name, fields in changes.items()}
    rows["two_teachers"] = ("method=cgs,base=ad_mt", {})  # in turn
    two = {"method.cutmix": 1.0, "method.jitter": True, "method.predicts": "mean"}
    rows["two_networks"] = ("method=cgs,base=cps", two)
    return rows
