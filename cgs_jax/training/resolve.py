"""The configuration of a run, completed and checked once, before anything is made of it."""

import operator

from ml_collections import ConfigDict, FrozenConfigDict

from cgs_jax.data import completion, patches, tasks
from cgs_jax.inference import predictor
from cgs_jax.models import network
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.logs import say
from cgs_jax.training import optimizers
from cgs_jax.training.train_step import make_method

AT_LEAST = {
    "total_steps": 1,
    "log_every": 1,
    "eval_every": 1,
    "eval_batch": 1,
    "batch.labelled": 1,
    "pseudo_slices": 0,
    "precise_bn": 0,
}


def resolve(config: ConfigDict, saved: ConfigDict | None = None) -> FrozenConfigDict:
    """A frozen copy, with what comes with the data, such as the classes; `saved` is that of a run
    that goes on.

    Raises:
      UserError: a module that it names is not there, or an option has a value that can not be.
    """
    config = ConfigDict(config.to_dict())
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
    network.check(config)
    stride = network.stride(config)
    for name, own in tasks.members(config.data).items():
        if name and own.size % stride:
            raise UserError(f"data.members.{name}.size={own.size} does not divide by {stride}")
    patches.check(config.data, stride, network.depth_stride(config))
    if config.data.depth and config.mesh.space > 1:
        raise UserError("mesh.space splits rows of slices; with data.depth leave it at 1")
    method = make_method(config)
    predictor.check(config, method)
    optimizers.make_optimizer(config)
    least_of = AT_LEAST | {"batch.unlabelled": int(method.unlabelled)}
    for name, least in least_of.items():
        if operator.attrgetter(name)(config) < least:
            raise UserError(f"{name} must be at least {least}")
    if not 0 <= config.seed < 2**32:
        raise UserError("seed must be between 0 and 2**32 - 1")
    flip = config.augment.flip
    if not (isinstance(flip, int | float) and 0 <= flip <= 1):
        raise UserError(f"augment.flip={flip}: a probability, or auto")
    if not 0 <= config.augment.degrees <= 90:
        raise UserError(f"augment.degrees={config.augment.degrees} must be between 0 and 90")
