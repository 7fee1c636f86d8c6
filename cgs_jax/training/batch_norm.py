"""Statistics of batch norm, averaged over many batches."""

from typing import Any

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

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

    def statistics(state, batch, seed, step):
        k_views, _ = step_keys(seed, step)
        views = make_views(method, mesh, batch, k_views)
        image = views["labelled"]["image"]
        if "unlabelled" in views:
            image = batches.join(image, views["unlabelled"]["weak"])
        params, before = method.inference_variables(state)
        after = plain.statistics(params, before, image, k_views)
        return jax.tree.map(lambda a, b: b + (a - b) / unet.MOMENTUM, after, before)

    statistics = devices.jit(statistics, mesh)

    def precise(state):
        end, total = int(state.step), None
        steps = range(max(end - config.precise_bn, 0), end)
        for step in steps:
            batch = devices.put_batch(mesh, dataset[step])
            some = statistics(state, batch, seed_of(config), np.int32(step))
            total = some if total is None else jax.tree.map(jnp.add, total, some)
        return method.with_inference_state(state, jax.tree.map(lambda x: x / len(steps), total))

    return precise
