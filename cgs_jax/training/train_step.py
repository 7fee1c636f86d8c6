"""The training step: state and batch of a step -> the next state, one compiled program."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cgs_jax.data import patches
from cgs_jax.inference import predictor
from cgs_jax.methods import cgs
from cgs_jax.methods.base import Method
from cgs_jax.models import torch_weights
from cgs_jax.runtime import devices
from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.train_state import Metrics, TrainState

CHOICES = {
    "inference": ("both", "generalist", "specialists"),
    "combine": ("average", "confidence", "vote"),
    "upsample": ("linear", "nearest"),
    "model.dtype": ("float32", "bfloat16"),
    "model.head_classes": (2, 3),
}


def make_method(config: ConfigDict) -> Method:
    """The method of `config.method.name`.

    Raises:
      UserError: an option has a value that can not be.
    """
    levels = len(config.model.channels)
    if levels < 2:
        raise UserError("model.channels needs at least 2 levels")
    if config.data.size % 2 ** (levels - 1):
        raise UserError(f"data.size={config.data.size} does not divide by {2 ** (levels - 1)}")
    patches.check(config.data, 2 ** (levels - 1))
    if len(config.model.dropout) != levels:
        raise UserError("model.dropout and model.channels must have the same length")
    for name, known in CHOICES.items():
        value = operator.attrgetter(name)(config)
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; there are: {', '.join(map(str, known))}")
    if config.model.head_depth < 0:
        raise UserError("model.head_depth must be at least 0")
    module = load_by_name("cgs_jax.methods", config.method.name, "method")
    if "cgs" in config:
        method = cgs.Over(module.Method(config, specialists=True))
    else:
        method = module.Method(config)
    if config.inference != "generalist" and not method.specialists:
        raise UserError(f"inference={config.inference}: {config.method.name} trains no specialists")
    at_least_one = ["log_every", "eval_every", "eval_batch", "batch.labelled"]
    for name in at_least_one + ["batch.unlabelled"] * method.unlabelled:
        if operator.attrgetter(name)(config) < 1:
            raise UserError(f"{name} must be at least 1")
    if config.precise_bn < 0:
        raise UserError("precise_bn must be at least 0")
    if config.total_steps < 0:
        raise UserError("total_steps must be at least 0")
    if not 0 <= config.seed < 2**32:
        raise UserError("seed must be between 0 and 2**32 - 1")
    if not all(0 <= rate <= 0.9 for rate in config.model.dropout):
        raise UserError(f"model.dropout={config.model.dropout}: rates are between 0 and 0.9")
    if not 0 <= config.augment.degrees <= 90:
        raise UserError(f"augment.degrees={config.augment.degrees} must be between 0 and 90")
    return method


def start_from_weights(method: Method, config: ConfigDict) -> None:
    """Lets `method` start from the PyTorch-named weights of `config.model.weights`, if any."""
    if config.model.weights:
        if method.specialists and config.model.head_depth != 1:
            raise UserError("model.weights: PyTorch's specialists have model.head_depth=1")
        image = jnp.zeros((1, config.data.size, config.data.size, config.data.channels))
        variables = jax.jit(method.network.init)(jax.random.key(0), image)
        weights = torch_weights.read(config.model.weights)
        method.start = torch_weights.from_torch(weights, variables, config.model.weights)


def init_state(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """A fresh state, made on the devices."""
    init, key = _init(method, optimizer, config), jax.random.key(config.seed)
    shardings = devices.of_state(mesh, jax.eval_shape(init, key), config.mesh.shard_params)
    return jax.jit(init, out_shardings=shardings)(key)


def abstract_state(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Its shapes and shardings."""
    state = jax.eval_shape(_init(method, optimizer, config), jax.random.key(0))
    return devices.abstract(state, devices.of_state(mesh, state, config.mesh.shard_params))


def abstract_inputs(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> tuple[TrainState, Any, Any]:
    """Shapes and shardings of state, batch and seed: the step can be compiled from them alone."""
    state = abstract_state(method, optimizer, config, mesh)
    batch = {}
    for name, stream in method.streams().items():
        shape = (stream.count, *[patches.side(config.data, 0, config.total_steps)] * 2)
        batch[name] = {"image": jax.ShapeDtypeStruct((*shape, config.data.channels), np.uint16)}
        if stream.with_labels:
            batch[name]["label"] = jax.ShapeDtypeStruct(shape, np.uint8)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    batch = devices.abstract(batch, devices.batched(mesh))
    return state, batch, devices.abstract(seed, devices.replicated(mesh))


def _init(method, optimizer, config):
    def init(key):
        image = jnp.zeros((1, config.data.size, config.data.size, config.data.channels))
        params, model_state, extra = method.init(key, image)
        opt_state = optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, extra)

    return init


def make_train_step(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> Any:
    """Compiles (state, batch, seed) -> (state, metrics). The state is donated and keeps its
    shardings; `seed` is `seed_of(config)`, an argument so that seeds share the compiled program
    (but AD-MT's, whose teachers take turns by the seed)."""

    def train_step(state, batch, seed):
        k_views, k_loss = step_keys(seed, state.step)
        views = make_views(method, mesh, batch, k_views)
        loss = jax.value_and_grad(method.loss, has_aux=True)
        (_, aux), grads = loss(state.params, state, views, k_loss)
        model_state, extra, metrics = aux
        state = state.replace(model_state=model_state, extra=extra)
        state = method.after_update(apply_gradients(optimizer, state, grads))
        shardings = devices.of_state(mesh, state, config.mesh.shard_params)
        return jax.lax.with_sharding_constraint(state, shardings), Metrics.of(metrics)

    return devices.jit(train_step, mesh, donate_argnums=0)


def step_keys(seed, step):
    """Of the views, and of all else, of a step."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def make_views(method, mesh, batch, key):
    batch = {k: v | {"image": predictor.to_image(v["image"])} for k, v in batch.items()}
    return devices.split_rows(mesh, method.views(batch, key))


def seed_of(config: ConfigDict) -> np.uint32:
    """Root of all random keys of the steps."""
    return np.uint32(config.seed)


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any
) -> TrainState:
    """One update of the parameters; counts the step."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)
