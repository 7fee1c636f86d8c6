"""The configuration of a run, completed and checked once, before anything is made of it."""

import math

from ml_collections import ConfigDict, FrozenConfigDict

from cgs_jax.data import completion, patches, tasks
from cgs_jax.inference import predictor
from cgs_jax.models import network
from cgs_jax.runtime import run_folder
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import optimizers
from cgs_jax.training.train_step import make_method

# The least and the greatest value of options that are numbers. What options ask of each other is
# checked where they are used.
RANGES = {
    "seed": (0, 2**32 - 1),
    "total_steps": (1, math.inf),
    "log_every": (1, math.inf),
    "eval_every": (1, math.inf),
    "eval_batch": (1, math.inf),
    "batch.labelled": (1, math.inf),
    "batch.unlabelled": (0, math.inf),
    "pseudo_slices": (0, math.inf),
    "mesh.shard_params": (0, math.inf),
    "precise_bn": (0, math.inf),
    "optimizer.lr": (0, math.inf),
    "optimizer.momentum": (0, 1),
    "optimizer.momentum_squares": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.power": (0, math.inf),
    "augment.rotate": (0, 1),
    "augment.degrees": (0, 90),
    "augment.jitter": (0, 1),
    "augment.strength": (0, 1),
    "model.head_depth": (0, math.inf),
    "model.head_group": (0, math.inf),
    "model.head_bytes": (0, math.inf),
    "method.lambda_max": (0, math.inf),
    "method.tau": (0, 1),
    "method.ema_decay": (0, 1),
    "method.cutmix": (0, 1),
    "method.copy_paste": (0, 1),
    "method.doubt": (0, 1),
    "method.samples": (1, math.inf),
    "method.alpha": (0.001, math.inf),
    "method.image_weight": (0, math.inf),
    "method.feature_weight": (0, math.inf),
    "cgs.lambda_max": (0, math.inf),
    "cgs.tau": (0, 1),
    "data.patch_spread": (0, math.inf),
    "data.val_fraction": (0, 1),
    "data.test_fraction": (0, 1),
}


def resolve(config: ConfigDict, saved: ConfigDict | None = None) -> FrozenConfigDict:
    """A frozen copy, with what comes with the data, such as the classes; `saved` is that of a run
    that goes on.

    Raises:
      UserError: a module that it names is not there, or an option has a value that can not be.
    """
    config = ConfigDict(config.to_dict())
    _check_ranges(config)
    completion.complete(
        config.data, saved and saved.data, network.stride(config), network.poolings(config)
    )
    if config.augment.flip == "auto":
        pair = tasks.both_sides(config.data.classes)
        with config.augment.ignore_type():
            config.augment.flip = 0.0 if pair else 0.5
        if pair:
            say(f"no mirror images, which would confuse {pair[0]} and {pair[1]}")
    check(config)
    return FrozenConfigDict(config)


def check(config: ConfigDict) -> None:
    """Raises UserError where an option has a value that can not be. Those of the data are checked
    where they are used, and those of the mesh where the devices are known."""
    _check_ranges(config)
    network.check(config)
    stride = network.stride(config)
    for name, own in tasks.members(config.data).items():
        if name and own.size % stride:
            raise UserError(f"data.members.{name}.size={own.size} does not divide by {stride}")
    patches.check(config.data, stride, network.depth_stride(config))
    if config.data.size % stride:
        raise UserError(f"data.size={config.data.size} does not divide by {stride}")
    if config.data.depth and config.mesh.space > 1:
        raise UserError("mesh.space splits rows of slices; with data.depth leave it at 1")
    method = make_method(config)
    predictor.check(config, method)
    optimizers.make_optimizer(config)
    if method.unlabelled and not config.batch.unlabelled:
        raise UserError("batch.unlabelled must be at least 1, not 0")
    if config.batch.unlabelled and not method.unlabelled:
        told = f"{config.method.name} takes no unlabelled images"
        say(f"WARNING: batch.unlabelled={config.batch.unlabelled} is left out, for {told}")
    flip = config.augment.flip
    if not (isinstance(flip, int | float) and 0 <= flip <= 1):
        raise UserError(f"augment.flip={flip}: a probability, or auto")
    mixes = method.mixes and config.method.get("cutmix", 1)
    if mixes and config.batch[method.mixes] == 1:
        say("WARNING: images are mixed with others of their batch, and one alone has none")


def _check_ranges(config):
    for name, value in run_folder.flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value}: give a finite number")
        least, most = RANGES.get(run_folder.of_any_member(name), (-math.inf, math.inf))
        if isinstance(value, int | float) and not least <= value <= most:
            if most == math.inf:
                raise UserError(f"{name} must be at least {least}, not {value}")
            raise UserError(f"{name}={value} must be between {least} and {most}")
