"""The configuration of a run, completed and checked once, before anything is made of it."""

import operator

from ml_collections import ConfigDict, FrozenConfigDict

from cgs_jax.data import cache, patches
from cgs_jax.inference import predictor
from cgs_jax.models import network
from cgs_jax.runtime.errors import UserError
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


def resolve(config: ConfigDict) -> FrozenConfigDict:
    """A frozen copy, with the classes that come with the data.

    Raises:
      UserError: a module that it names is not there, or an option has a value that can not be.
    """
    config = ConfigDict(config.to_dict())
    config.data.update(cache.from_files(config.data))
    check(config)
    return FrozenConfigDict(config)


def check(config: ConfigDict) -> None:
    """Raises UserError where an option has a value that can not be. Those of the data are checked
    where they are used, and those of the mesh where the devices are known."""
    network.check(config)
    patches.check(config.data, network.stride(config))
    method = make_method(config)
    predictor.check(config, method)
    optimizers.make_optimizer(config)
    least_of = AT_LEAST | {"batch.unlabelled": int(method.unlabelled)}
    for name, least in least_of.items():
        if operator.attrgetter(name)(config) < least:
            raise UserError(f"{name} must be at least {least}")
    if not 0 <= config.seed < 2**32:
        raise UserError("seed must be between 0 and 2**32 - 1")
    if not 0 <= config.augment.degrees <= 90:
        raise UserError(f"augment.degrees={config.augment.degrees} must be between 0 and 90")
