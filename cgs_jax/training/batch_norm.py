"""Statistics of batch norm, averaged over many batches."""

from typing import Any

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cgs_jax.data import streams
from cgs_jax.methods import batches
from cgs_jax.methods.base import Method
from cgs_jax.models import unet
from cgs_jax.runtime import devices
from cgs_jax.training.train_step import make_method, make_views, seed_of, step_keys


def make_precise(method: Method, dataset: grain.MapDataset, mesh: Mesh) -> Any:
    """state -> the same with other batch statistics of the network that predicts: means over the
    last `config.precise_bn` steps, of labelled images as they are trained on and weak views of
    unlabelled ones in one batch, without dropout; state -> state where that is 0. `dataset` has the
    batches of all steps.

    Running averages remember some ten batches, which are few and small; and dropout, which they
    have seen, is off in prediction. (Wu and Johnson, 2105.07576, call it precise batch norm.)
    """
    config = method.config
    if not config.precise_bn:
        return lambda state: state
    plain = ConfigDict(config.to_dict())
    if "dropout" in plain.model:
        plain.model.dropout = jax.tree.map(lambda rate: 0.0, plain.model.dropout)
    plain = make_method(plain)

    def add_statistics(total, state, batch, seed, step):
        k_views, _ = step_keys(seed, step)
        views = make_views(method, mesh, batch, k_views)
        image = views["labelled"]["image"]
        if "unlabelled" in views:
            image = batches.join(image, views["unlabelled"]["weak"])
        params, before = method.inference_variables(state)
        after = plain.statistics(params, before, image, k_views)
        own = lambda sum, a, b: sum + b + (a - b) / unet.MOMENTUM  # noqa: E731
        return jax.tree.map(own, total, after, before)

    add_statistics = devices.jit(add_statistics, mesh, donate_argnums=0)

    def precise(state):
        end = int(state.step)
        start = max(end - config.precise_bn, 0)
        total = jax.tree.map(jnp.zeros_like, method.inference_variables(state)[1])
        read = streams.device_batches(dataset[start:end], mesh)
        for step, batch in enumerate(read, start):
            total = add_statistics(total, state, batch, seed_of(config), np.int32(step))
        mean = jax.tree.map(lambda x: x / (end - start), total)
        state = method.with_inference_state(state, mean)
        if method.inference_variables(state)[1] is not mean:
            raise TypeError("inference_variables and with_inference_state are of other networks")
        return state

    return precise
