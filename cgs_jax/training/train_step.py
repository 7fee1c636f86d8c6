"""The training step: state and batch of a step -> the next state, one compiled program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cgs_jax.data import patches
from cgs_jax.methods import augment, cgs
from cgs_jax.methods.base import Method
from cgs_jax.models import network
from cgs_jax.runtime import devices
from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.training import optimizers
from cgs_jax.training.train_state import Metrics, TrainState


def make_method(config: ConfigDict) -> Method:
    """The method of `config.method.name`; other options are checked by `resolve`.

    Raises:
      UserError: there is no such method, or one of its options has a value that can not be.
    """
    module = load_by_name("cgs_jax.methods", config.method.name, "method")
    if "cgs" in config:
        return cgs.Over(module.Method(config, specialists=True))
    return module.Method(config)


def without_specialists(config: ConfigDict) -> ConfigDict | None:
    """The same method without them, and without what they teach; None where it has none."""
    plain = ConfigDict(config.to_dict())
    plain.inference = "generalist"
    if "cgs" in plain:
        del plain["cgs"]
    elif plain.method.get("specialists"):
        plain.method.specialists = False
        if "terms" in plain.method:
            plain.method.terms = ("G_from_g",)
    else:
        return None
    return plain


def init_state(method: Method, mesh: Mesh) -> TrainState:
    """A fresh state, made on the devices; its networks, and averages of them, have the weights of
    `config.model.weights` where that names any.

    Raises:
      UserError: those can not be read, or do not fit.
    """
    config, init = method.config, _init(method)
    key = jax.random.key(config.seed)
    shardings = devices.of_state(mesh, jax.eval_shape(init, key), config.mesh.shard_params)
    state = devices.jit(init, mesh, once=True, out_shardings=shardings)(key)
    return with_weights(state, *starting_weights(method)) if config.model.weights else state


def starting_weights(method: Method) -> tuple[Any, Any]:
    """(params, model_state) of `config.model.weights`; what it does not have are mere shapes."""
    config = method.config
    variables = jax.eval_shape(method.network.init, jax.random.key(0), _example(config))
    load = network.backbone(config).load_weights
    loaded = load(config.model.weights, variables)
    if not method.loads_heads:
        loaded = {
            name: {**variables[name], "backbone": tree["backbone"]} for name, tree in loaded.items()
        }
    return loaded["params"], {"batch_stats": loaded["batch_stats"]}


def with_weights(state: TrainState, *trees: Any) -> TrainState:
    """Replaces every part of params, model_state and extra that has the structure of one of `trees`
    by the values of that tree, in buffers of its own; where the tree has a mere shape, the old
    value stays."""
    structures, found = [jax.tree.structure(tree) for tree in trees], set()

    def place(own, new):
        if isinstance(new, jax.ShapeDtypeStruct):
            return own
        part = lambda index: np.array(new[index], own.dtype)  # noqa: E731
        return jax.make_array_from_callback(own.shape, own.sharding, part)

    def swap(own):
        structure = jax.tree.structure(own)
        if structure not in structures:
            return own
        found.add(structure)
        return jax.tree.map(place, own, trees[structures.index(structure)])

    parts = (state.params, state.model_state, state.extra)
    like = lambda tree: jax.tree.structure(tree) in structures  # noqa: E731
    params, model_state, extra = jax.tree.map(swap, parts, is_leaf=like)
    if found != set(structures):
        raise TypeError("no part of the method's state has the structure of its network")
    return state.replace(params=params, model_state=model_state, extra=extra)


def abstract_state(method: Method, mesh: Mesh) -> TrainState:
    """Its shapes and shardings."""
    state = jax.eval_shape(_init(method), jax.random.key(0))
    return devices.abstract(state, devices.of_state(mesh, state, method.config.mesh.shard_params))


def abstract_inputs(method: Method, mesh: Mesh) -> tuple[TrainState, Any, Any]:
    """Shapes and shardings of state, batch and seed: the step can be compiled from them alone."""
    config, batch = method.config, {}
    for name, stream in method.streams().items():
        shape = (stream.count, *patches.shape(config.data, 0, config.total_steps))
        batch[name] = {"image": jax.ShapeDtypeStruct((*shape, config.data.channels), np.uint16)}
        batch[name]["aspect"] = jax.ShapeDtypeStruct((stream.count,), np.float32)
        if stream.with_labels:
            batch[name]["label"] = jax.ShapeDtypeStruct(shape, np.uint8)
            if config.data.partial:
                shape = (stream.count, *[1] * len(shape[1:]), len(config.data.classes))
                marks = jax.ShapeDtypeStruct(shape, bool)
                batch[name] |= {"annotated": marks, "member": marks}
    seed = jax.ShapeDtypeStruct((), np.uint32)
    batch = devices.abstract(batch, devices.batched(mesh))
    seed = devices.abstract(seed, devices.replicated(mesh))
    return abstract_state(method, mesh), batch, seed


def _example(config):
    """An image that the network takes: a slice, or the smallest volume."""
    shape = [config.data.size] * 2
    if config.data.depth:
        shape = [network.depth_stride(config), *[network.stride(config)] * 2]
    return jnp.zeros((1, *shape, config.data.channels))


def _init(method):
    optimizer, _ = optimizers.make_optimizer(method.config)

    def init(key):
        params, model_state, extra = method.init(key, _example(method.config))
        opt_state = optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, extra)

    return init


def make_train_step(method: Method, mesh: Mesh) -> Any:
    """Compiles (state, batch, seed) -> (state, metrics). The state is donated and keeps its
    shardings; `seed` is `seed_of(config)`, an argument so that seeds share the compiled program
    (but AD-MT's, whose teachers take turns by the seed)."""
    optimizer, _ = optimizers.make_optimizer(method.config)

    def train_step(state, batch, seed):
        k_views, k_loss = step_keys(seed, state.step)
        views = make_views(method, mesh, batch, k_views)
        loss = jax.value_and_grad(method.loss, has_aux=True)
        (_, aux), grads = loss(state.params, state, views, k_loss)
        model_state, extra, metrics = aux
        state = state.replace(model_state=model_state, extra=extra)
        state = method.after_update(apply_gradients(optimizer, state, grads))
        shardings = devices.of_state(mesh, state, method.config.mesh.shard_params)
        return jax.lax.with_sharding_constraint(state, shardings), Metrics.of(metrics)

    return devices.jit(train_step, mesh, donate_argnums=0)


def step_keys(seed, step):
    """Of the views, and of all else, of a step."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def make_views(method, mesh, batch, key):
    batch = {k: v | {"image": augment.to_image(v["image"])} for k, v in batch.items()}
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
