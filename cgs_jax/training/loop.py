"""The training loop: steps, what is logged of them, validation and checkpoints."""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain.python as grain
import jax
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from cgs_jax.analysis import pseudo_label_quality
from cgs_jax.data import streams, tasks
from cgs_jax.data.prepared import Prepared
from cgs_jax.inference.predictor import Predictor, make_predictor
from cgs_jax.methods.base import Method
from cgs_jax.runtime import devices, processes, run_folder
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.logs import Writer, hardware
from cgs_jax.scoring import summaries
from cgs_jax.training import optimizers
from cgs_jax.training.batch_norm import make_precise
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.train_state import Metrics, TrainState
from cgs_jax.training.train_step import abstract_state, init_state, make_train_step, seed_of

RESULTS = ("summary.json", "report.html")  # what a finished run has, written in this order
# The host may be so many steps ahead of the device, which then need not wait for it. With more, a
# run that is told to stop would still have to finish them while its machine is taken away.
AHEAD = 2


def train(
    method: Method, prepared: Prepared, checkpoints: Checkpoints, workdir: pathlib.Path, mesh: Mesh
) -> bool:
    """Trains all steps of `method.config`, from the latest checkpoint where there is one.

    Order: step, then validation, then checkpoint; data and keys are functions of (seed, step), so
    a resumed run goes on exactly as the undisturbed one.

    Returns:
      Whether it got there; False after SIGTERM or Ctrl-C, with a checkpoint of the last step.

    Raises:
      UserError: the loss is not finite; checkpoints from before are kept.
    """
    config = method.config
    _, schedule = optimizers.make_optimizer(config)
    state = checkpoints.restore_latest(abstract_state(method, mesh))
    if state is None:
        state = init_state(method, mesh)
    start = int(state.step)
    if start:
        say(f"resuming {workdir} at step {start}")
    else:
        count = f"{parameter_overview.count_parameters(state.params):,} parameters"
        say(f"{run_folder.name_of(config)} on {config.data.name}: {count}, on {hardware()}")
    if start >= config.total_steps:
        return True
    if processes.is_first():
        for name in RESULTS:  # they would be of a state before the end
            (workdir / name).unlink(missing_ok=True)

    dataset = host_batches(method, prepared, mesh)
    batches = streams.device_batches(dataset[start:], mesh)
    train_step = make_train_step(method, mesh)
    predictor = make_predictor(method)
    measure = pseudo_label_quality.make_measure(method, prepared)
    norm = jax.jit(optax.tree.norm)
    organs, zero_before = tasks.scored(config.data), set()
    nowhere = _tell_what_is_lacking(config, prepared)
    progress = tqdm(
        batches, "training", config.total_steps, initial=start, unit="step", disable=None
    )
    with contextlib.closing(Writer(workdir, start)) as writer, processes.Stop() as stop:
        precise = make_precise(method, dataset, mesh)
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
            if not np.isfinite(norm(state.params)):
                raise _diverged("a parameter is not finite", step, checkpoints)
            if not validates:
                writer.publish(step)
                checkpoints.save(state)
                return False
            scores = validate(predictor(state), prepared) | measure(state)
            writer.write(step, scores)
            writer.publish(step)
            by_organ = {o: scores[f"val/{o}"] for o in organs if f"val/{o}" in scores}
            told = "  ".join(f"{organ} {dice:.1f}" for organ, dice in by_organ.items())
            say(f"step {step}  validation Dice {scores['val/dice']:.2f}  ({told})")
            zero = {organ for organ, dice in by_organ.items() if dice == 0 and organ not in nowhere}
            stays = zero if step == config.total_steps else zero & zero_before
            if stays:
                say(f"WARNING: validation Dice stays 0 for {', '.join(sorted(stays))}")
            zero_before = zero
            checkpoints.save(state, scores["val/dice"])
            if stop.asked:
                return False
    return True


def _tell_what_is_lacking(config, prepared):
    """Warns of organs that labels do not teach or validate; returns those that validation cases are
    scored by and none has."""
    taught, val = prepared.taught(), prepared.splits.val
    if untaught := [organ for organ in config.data.classes if organ not in taught]:
        told = "nothing teaches it; see --config.data.splits"
        say(f"WARNING: no labelled training case has {', '.join(untaught)}; {told}")
    held = [*prepared.splits.labelled, *val, *prepared.splits.test]
    if empty := summaries.empty(prepared, held):
        told = "no organ; if nobody annotated them, remove the label files"
        say(f"WARNING: {len(empty)} of {len(held)} label maps show {told}, such as {empty[0]}'s")
    if nowhere := summaries.absent(prepared, val):
        told = "it counts as 0 in every case where it is found"
        say(f"WARNING: no validation case has {', '.join(nowhere)}; {told}")
    if unknown := summaries.unannotated(prepared, val, tasks.scored(config.data)):
        told = "the best checkpoint is chosen without; see --config.data.splits"
        say(f"WARNING: no validation case is annotated for {', '.join(unknown)}; {told}")
    return nowhere


def host_batches(method: Method, prepared: Prepared, mesh: Mesh) -> grain.MapDataset:
    """What the steps take, as this process reads it."""
    mine = lambda size: devices.local_rows(mesh, size)  # noqa: E731
    return streams.batches(prepared, method.config, method.streams(), mine)


def steps(
    config: ConfigDict,
    train_step: Any,
    state: TrainState,
    batches: Iterable[Any],
    start: int,
    checkpoints: Checkpoints | None,
    stop: processes.Stop,
    precise: Callable[[TrainState], TrainState] = lambda state: state,
) -> Iterator[tuple[int, TrainState, dict[str, float]]]:
    """Trains on `batches`; yields (step, state, mean metrics since the last) to log, validate or
    stop; `precise` is laid over states to validate.

    Only there the host waits for the step itself; elsewhere it runs ahead of the device by `AHEAD`
    steps at most. The next step donates the yielded state.
    """
    unlogged, seed = [], seed_of(config)
    for step, batch in enumerate(batches, start + 1):
        state, metrics = train_step(state, batch, seed)
        unlogged.append(metrics)
        if len(unlogged) > AHEAD:
            jax.block_until_ready(unlogged[-1 - AHEAD].values)
        if _validates(step, config):
            state = precise(state)
        if stop.at(step) or step % config.log_every == 0 or _validates(step, config):
            yield step, state, _means(unlogged, step, checkpoints)
            unlogged = []


def _validates(step: int, config: ConfigDict) -> bool:
    return step % config.eval_every == 0 or step == config.total_steps


def validate(predictor: Predictor, prepared: Prepared) -> dict[str, float]:
    """Mean validation Dice (%) by organ, 'val/<organ>', and of all, 'val/dice'."""
    cases, scoring = prepared.splits.val, predictor.scoring
    (results,) = summaries.evaluate(predictor, prepared, cases, False, scoring)
    summary = summaries.summarise(results, predictor.config.data)
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
