"""The training step and the loop around it."""

import contextlib
import operator
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from cgs_jax import distributed, evaluate, optim, quality, run_config, sharding
from cgs_jax.checkpoint import Checkpoints
from cgs_jax.data import patches, pipeline
from cgs_jax.data.prepare import Prepared
from cgs_jax.errors import UserError
from cgs_jax.methods import base
from cgs_jax.methods.base import Method
from cgs_jax.models import torch_weights, unet
from cgs_jax.modules import load_by_name
from cgs_jax.train_state import Metrics, TrainState
from cgs_jax.writers import Writer, say

RESULTS = ("summary.json", "report.html")  # what a finished run has, written in this order
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
    method = load_by_name("cgs_jax.methods", config.method.name, "method").Method(config)
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
        image = jnp.zeros((1, config.data.size, config.data.size, 1))
        variables = jax.jit(method.network.init)(jax.random.key(0), image)
        weights = torch_weights.read(config.model.weights)
        method.start = torch_weights.from_torch(weights, variables, config.model.weights)


def init_state(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """A fresh state, made on the devices."""
    init, key = _init(method, optimizer, config), jax.random.key(config.seed)
    shardings = sharding.of_state(mesh, jax.eval_shape(init, key), config.mesh.shard_params)
    return jax.jit(init, out_shardings=shardings)(key)


def abstract_state(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> TrainState:
    """Its shapes and shardings."""
    state = jax.eval_shape(_init(method, optimizer, config), jax.random.key(0))
    return sharding.abstract(state, sharding.of_state(mesh, state, config.mesh.shard_params))


def abstract_inputs(
    method: Method, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> tuple[TrainState, Any, Any]:
    """Shapes and shardings of state, batch and seed: the step can be compiled from them alone."""
    state = abstract_state(method, optimizer, config, mesh)
    batch = {}
    for name, count in stream_sizes(config, method).items():
        shape = (count, *[patches.side(config.data, 0, config.total_steps)] * 2)
        batch[name] = {"image": jax.ShapeDtypeStruct(shape, np.uint16)}
        if name == "labelled":
            batch[name]["label"] = jax.ShapeDtypeStruct(shape, np.uint8)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    batch = sharding.abstract(batch, sharding.batched(mesh))
    return state, batch, sharding.abstract(seed, sharding.replicated(mesh))


def stream_sizes(config: ConfigDict, method: Method) -> dict[str, int]:
    """Slices that a step takes of each stream, over all devices."""
    names = ("labelled", "unlabelled")[: 1 + method.unlabelled]
    return {name: config.batch[name] * method.draws for name in names}


def _init(method, optimizer, config):
    def init(key):
        image = jnp.zeros((1, config.data.size, config.data.size, 1))
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
        k_views, k_loss = _keys(seed, state.step)
        views = _views(method, mesh, batch, k_views)
        loss = jax.value_and_grad(method.loss, has_aux=True)
        (_, aux), grads = loss(state.params, state, views, k_loss)
        model_state, extra, metrics = aux
        state = state.replace(model_state=model_state, extra=extra)
        state = method.after_update(apply_gradients(optimizer, state, grads))
        shardings = sharding.of_state(mesh, state, config.mesh.shard_params)
        return jax.lax.with_sharding_constraint(state, shardings), Metrics.of(metrics)

    return sharding.jit(train_step, mesh, donate_argnums=0)


def _keys(seed, step):
    """Of the views, and of all else, of a step."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))


def _views(method, mesh, batch, key):
    batch = {k: v | {"image": evaluate.to_image(v["image"])} for k, v in batch.items()}
    return sharding.split_rows(mesh, method.views(batch, key))


def make_precise(config: ConfigDict, method: Method, prepared: Prepared, mesh: Mesh) -> Any:
    """state -> the same with other batch statistics of the network that predicts: means over the
    weak views of the last `config.precise_bn` steps, labelled and unlabelled images in one batch,
    without dropout; state -> state where that is 0.

    Running averages remember some ten batches, which are few and small; and dropout, which they
    have seen, is off in prediction. (Wu and Johnson, 2105.07576, call it precise batch norm.)
    """
    if not config.precise_bn:
        return lambda state: state
    plain = config.copy_and_resolve_references()
    plain.model.dropout = (0.0,) * len(config.model.dropout)
    plain = make_method(plain)
    dataset = host_batches(config, method, prepared, mesh)

    def statistics(state, batch, seed, step):
        k_views, _ = _keys(seed, step)
        views = _views(method, mesh, batch, k_views)
        image = views["labelled"]["image"]
        if "unlabelled" in views:
            image = base.join(image, views["unlabelled"]["weak"])
        params, before = method.inference_variables(state)
        _, after = plain.forward(params, before, image, k_views)
        return jax.tree.map(lambda a, b: b + (a - b) / unet.MOMENTUM, after, before)

    statistics = sharding.jit(statistics, mesh)

    def precise(state):
        end, total = int(state.step), None
        steps = range(max(end - config.precise_bn, 0), end)
        for step in steps:
            batch = sharding.put_batch(mesh, dataset[step])
            some = statistics(state, batch, seed_of(config), np.int32(step))
            total = some if total is None else jax.tree.map(jnp.add, total, some)
        return method.with_inference_state(state, jax.tree.map(lambda x: x / len(steps), total))

    return precise


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


def train(
    config: ConfigDict,
    method: Method,
    prepared: Prepared,
    checkpoints: Checkpoints,
    workdir: pathlib.Path,
    mesh: Mesh,
) -> bool:
    """Trains to `config.total_steps`, from the latest checkpoint where there is one.

    Order: step, then validation, then checkpoint; data and keys are functions of (seed, step), so
    a resumed run goes on exactly as the undisturbed one.

    Returns:
      Whether it got there; False after SIGTERM or Ctrl-C, with a checkpoint of the last step.

    Raises:
      UserError: the loss is not finite; checkpoints from before are kept.
    """
    optimizer, schedule = optim.make_optimizer(config)
    state = checkpoints.restore_latest(abstract_state(method, optimizer, config, mesh))
    if state is None:
        start_from_weights(method, config)
        state = init_state(method, optimizer, config, mesh)
    start = int(state.step)
    if start:
        say(f"resuming {workdir} at step {start}")
    else:
        count = f"{parameter_overview.count_parameters(state.params):,} parameters"
        say(f"{run_config.name_of(config)} on {config.data.name}: {count}, {mesh.size} device(s)")
    if start >= config.total_steps:
        return True
    if distributed.is_first():
        for name in RESULTS:  # they would be of a state before the end
            (workdir / name).unlink(missing_ok=True)

    batches = device_batches(config, method, prepared, mesh, start)
    train_step = make_train_step(method, optimizer, config, mesh)
    predict = evaluate.make_predict(method)
    measure = quality.make_measure(config, method, prepared)
    zero_before = set()
    progress = tqdm(
        batches, "training", config.total_steps, initial=start, unit="step", disable=None
    )
    with contextlib.closing(Writer(workdir, start)) as writer, distributed.Stop() as stop:
        precise = make_precise(config, method, prepared, mesh)
        logged = steps(config, train_step, state, progress, start, checkpoints, stop, precise)
        for step, state, means in logged:
            means["lr"] = float(schedule(step - 1))
            writer.write(step, means)
            progress.set_postfix(loss=f"{means['loss']:.3f}")
            if progress.disable:
                say(f"step {step}/{config.total_steps}  loss {means['loss']:.4f}")
            validates = _validates(step, config)
            if not (validates or stop.now):
                continue
            if not np.isfinite(optax.tree.norm(state.params)):
                raise _diverged("a parameter is not finite", step, checkpoints)
            if not validates:
                writer.publish(step)
                checkpoints.save(state)
                return False
            scores = validate(predict(state), prepared, config) | measure(state)
            writer.write(step, scores)
            writer.publish(step)
            organs = "  ".join(f"{c} {scores[f'val/{c}']:.1f}" for c in config.data.classes)
            say(f"step {step}  validation Dice {scores['val/dice']:.2f}  ({organs})")
            zero = {c for c in config.data.classes if scores[f"val/{c}"] == 0}
            stays = zero if step == config.total_steps else zero & zero_before
            if stays:
                say(f"WARNING: validation Dice stays 0 for {', '.join(sorted(stays))}")
            zero_before = zero
            checkpoints.save(state, scores["val/dice"])
            if stop.asked:
                return False
    return True


def host_batches(
    config: ConfigDict, method: Method, prepared: Prepared, mesh: Mesh, start: int = 0
) -> grain.MapDataset:
    """What the steps from `start` on take, as this process reads it."""
    mine = lambda size: sharding.local_rows(mesh, size)  # noqa: E731
    return pipeline.batches(prepared, config, stream_sizes(config, method), start, mine)


def device_batches(
    config: ConfigDict, method: Method, prepared: Prepared, mesh: Mesh, start: int = 0
) -> Iterator[Any]:
    """The same on the devices, read ahead of the step."""
    dataset = host_batches(config, method, prepared, mesh, start)
    return pipeline.prefetched(dataset, lambda batch: sharding.put_batch(mesh, batch))


def steps(
    config: ConfigDict,
    train_step: Any,
    state: TrainState,
    batches: Iterable[Any],
    start: int,
    checkpoints: Checkpoints | None,
    stop: distributed.Stop,
    precise: Callable[[TrainState], TrainState] = lambda state: state,
) -> Iterator[tuple[int, TrainState, dict[str, float]]]:
    """Trains on `batches`; yields (step, state, mean metrics since the last) to log, validate or
    stop; `precise` is laid over states to validate.

    Only there the host waits for the device. The next step donates the yielded state.
    """
    unlogged, seed = [], seed_of(config)
    for step, batch in enumerate(batches, start + 1):
        state, metrics = train_step(state, batch, seed)
        unlogged.append(metrics)
        if _validates(step, config):
            state = precise(state)
        if stop.at(step) or step % config.log_every == 0 or _validates(step, config):
            yield step, state, _means(unlogged, step, checkpoints)
            unlogged = []


def _validates(step: int, config: ConfigDict) -> bool:
    return step % config.eval_every == 0 or step == config.total_steps


def restore_best(
    config: ConfigDict, method: Method, checkpoints: Checkpoints, workdir: pathlib.Path, mesh: Mesh
) -> TrainState:
    """The state with the best validation Dice."""
    optimizer, _ = optim.make_optimizer(config)
    state = checkpoints.restore_best(abstract_state(method, optimizer, config, mesh))
    if state is None:
        raise UserError(f"{workdir} holds no validated checkpoint; train first")
    return state


def validate(predict: evaluate.Predict, prepared: Prepared, config: ConfigDict) -> dict[str, float]:
    """Mean validation Dice (%) by organ, 'val/<organ>', and of all, 'val/dice'."""
    cases, scoring = prepared.splits.val, evaluate.scoring(config)
    (results,) = evaluate.evaluate(predict, prepared, cases, config, False, scoring)
    summary = evaluate.summarise(results)
    scores = {f"val/{o}": 100 * s["dice"]["mean"] for o, s in summary["organs"].items()}
    return scores | {"val/dice": 100 * float(np.nan_to_num(summary["mean"]["dice"]))}


def _means(unlogged: list[Metrics], step: int, checkpoints: Checkpoints):
    rows = jax.device_get(unlogged)
    means = np.mean([row.values for row in rows], axis=0)
    means = dict(zip(rows[0].names, means.tolist(), strict=True))
    if not np.isfinite(means["loss"]):
        bad = next(i for i, row in enumerate(rows) if not np.isfinite(row["loss"]))
        raise _diverged(f"the loss is {rows[bad]['loss']}", step - len(rows) + bad + 1, checkpoints)
    return means


def _diverged(what: str, step: int, checkpoints: Checkpoints) -> UserError:
    kept = checkpoints and checkpoints.latest
    kept = f"the checkpoint of step {kept} is kept" if kept else "there is no checkpoint yet"
    advice = "try a lower --config.optimizer.lr in a new --workdir"
    return UserError(f"{what} at step {step}; {kept}; {advice}")
