"""Volumes -> slices -> prediction -> volumes -> scores per case and organ."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cgs_jax import distributed, metrics, plots, run_config, sharding
from cgs_jax.data.prepare import LEVELS, Prepared
from cgs_jax.data.volume import keep_largest, likeliest, resize
from cgs_jax.methods.base import Method

SPLITS = {
    "test": "test",
    "test_literature": "test, the literature's scoring",
    "val": "validation",
    "val_literature": "validation, the literature's scoring",
}
# uint16 [B, size, size] -> scores of classes [B, size, size, C]; the highest names the class
Predict = Callable[[np.ndarray], np.ndarray]
Results = dict[str, dict[str, dict[str, float]]]  # case -> organ -> metric -> value


class Scoring(NamedTuple):
    """From scores on the training grid to labels on a scan's own."""

    upsample: str  # 'linear': scores are interpolated; 'nearest': labels are
    largest_component: bool  # only the largest piece of each organ is kept


LITERATURE = Scoring("nearest", False)  # how published figures were made


def to_image(slices: jax.Array) -> jax.Array:
    """uint16 [B, H, W] -> float32 [B, H, W, 1] in [0, 1]."""
    return slices[..., None].astype(jnp.float32) / LEVELS


def combine(probs: jax.Array, how: str) -> jax.Array:
    """Scores [B, H, W, C] of several predictions [M, B, H, W, C]; the highest names the class.

    'average' of the probabilities; 'confidence': at each pixel the surest prediction decides;
    'vote': the most named class, of equally often named ones the likelier.
    """
    if how == "confidence":
        surest = jnp.argmax(jnp.max(probs, -1), 0)[None, ..., None]
        return jnp.take_along_axis(probs, surest, 0)[0]
    scores = jnp.mean(probs, 0)
    if how == "vote":
        scores += jnp.sum(jax.nn.one_hot(jnp.argmax(probs, -1), probs.shape[-1]), 0)
    return scores


def make_predict(*methods: Method) -> Callable[..., Predict]:
    """Compiles states -> `Predict` for this process's devices.

    The predictions of several methods, a state each, are combined as the first's config says.
    """
    mesh, config = sharding.local_mesh(), methods[0].config

    def predict(states, slices):
        image = to_image(slices)
        probs = [m.predict(state, image) for m, state in zip(methods, states, strict=True)]
        return combine(jnp.concatenate(probs), config.combine)

    compiled = sharding.jit(predict, mesh)

    def with_states(*states):
        states = sharding.localise(mesh, states)

        def run(slices):
            padded = np.pad(slices, ((0, -len(slices) % mesh.size), (0, 0), (0, 0)))
            return np.asarray(compiled(states, sharding.put_batch(mesh, padded)))[: len(slices)]

        return run

    return with_states


def segment(
    predict: Predict, stacks: Iterable[np.ndarray], config: Any, *scorings: Scoring
) -> Iterator[tuple[np.ndarray, ...]]:
    """Segments volumes, slices of all of them batched to one fixed shape.

    Args:
      stacks: uint16 [D, H, W], each on its own grid.
      scorings: how labels are made of the scores; the scores are computed once for all.

    Yields:
      For each volume in order, uint8 labels [D, H, W] on its own grid by each scoring.
    """
    size, batch = config.data.size, config.eval_batch
    depths, grids, done = deque(), deque(), deque()  # of volumes, of slices to do, labels of slices
    todo = np.empty((0, size, size), np.uint16)

    def run(count):
        nonlocal todo
        part, todo = todo[:count], todo[count:]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0)))
        for scores in predict(padded)[: len(part)]:
            done.append([_on_grid(scores, s.upsample, *grids[0]) for s in scorings])
            grids.popleft()

    def finished():
        while depths and len(done) >= depths[0]:
            slices = [done.popleft() for _ in range(depths.popleft())]
            labels = map(np.stack, zip(*slices, strict=True))
            yield tuple(
                keep_largest(label, len(config.data.classes)) if s.largest_component else label
                for label, s in zip(labels, scorings, strict=True)
            )

    for stack in stacks:
        depths.append(len(stack))
        grids.extend([stack.shape[1:]] * len(stack))
        todo = np.concatenate([todo, resize(stack, size, size)])
        while len(todo) >= batch:
            run(batch)
        yield from finished()
    if len(todo):
        run(len(todo))
    yield from finished()


def _on_grid(scores, upsample, height, width):
    if upsample == "linear":
        return likeliest(scores[None], height, width)[0]
    return resize(np.argmax(scores, -1).astype(np.uint8)[None], height, width)[0]


def evaluate(
    predict: Predict,
    prepared: Prepared,
    cases: list[str],
    config: Any,
    surface: bool,
    *scorings: Scoring,
) -> list[Results]:
    """Scores `cases`, dealt over the processes, by each scoring; without `surface` only the overlap
    metrics."""
    everyone, cases = cases, cases[jax.process_index() :: jax.process_count()]
    volumes = [prepared.volume(case) for case in cases]
    stacks = (volume.image for volume in volumes)
    labels = segment(predict, stacks, config, *scorings)
    labels = tqdm(labels, "scoring", len(cases), leave=False, unit="case", disable=None)
    futures = {}
    # Threads: scipy leaves Python's lock while it works, and the next volumes are predicted. Eight
    # at most, for each takes 45 bytes a voxel of the box around its organ.
    pool = ThreadPoolExecutor(min(8, os.cpu_count()))
    try:
        for case, volume, by_scoring in zip(cases, volumes, labels, strict=True):
            truth = np.asarray(volume.label)
            for which, label in enumerate(by_scoring):
                for i, organ in enumerate(config.data.classes, 1):
                    task = (label, truth, i, volume.spacing, surface)
                    futures[which, case, organ] = pool.submit(_score, *task)
        results = [{case: {} for case in cases} for _ in scorings]
        for (which, case, organ), future in futures.items():
            results[which][case][organ] = future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    gathered = distributed.gather(results)
    return [
        {case: part[which][case] for case in everyone for part in gathered if case in part[which]}
        for which in range(len(scorings))
    ]


def score(predict: Predict, prepared: Prepared, config: Any) -> dict[str, Any]:
    """Summaries of all metrics: {'val': ..., 'test': ...}, or the first alone, and from the same
    predictions what the literature's scoring makes of them: 'val_literature', 'test_literature'."""
    splits = {"val": prepared.splits.val}
    if config.test:
        splits["test"] = prepared.splits.test
    summaries = {}
    for name, cases in splits.items():
        both = evaluate(predict, prepared, cases, config, True, scoring(config), LITERATURE)
        summaries[name], summaries[f"{name}_literature"] = map(summarise, both)
    return summaries


def scoring(config: Any) -> Scoring:
    """That of `config`."""
    return Scoring(config.upsample, config.largest_component)


def prediction_options(config: Any) -> dict[str, Any]:
    """Those fields of `config` that say how a trained network predicts."""
    return {name: config[name] for name in run_config.PREDICTION}


def final_split(*summaries: dict[str, Any]) -> str:
    """'test', or 'val' where one of them was not to score the test cases."""
    return "test" if all("test" in summary for summary in summaries) else "val"


def _score(label, truth, i, spacing, surface):
    masks = label == i, truth == i
    scores = metrics.score(*masks, spacing) if surface else metrics.overlap(*masks)
    return scores | {"voxels": int(np.count_nonzero(masks[1]))}  # the organ's size


def ranked(results: Results) -> list[tuple[str, float]]:
    """Cases and their mean Dice in %, worst first; those without any organ only if all are."""
    dice = {c: 100 * mean(s["dice"] for s in organs.values()) for c, organs in results.items()}
    defined = [(case, value) for case, value in dice.items() if not np.isnan(value)]
    return sorted(defined, key=lambda pair: pair[1]) or list(dice.items())


def show(
    predict: Predict, prepared: Prepared, cases: list[tuple[str, float]], config: Any
) -> list[plots.Shown]:
    """Cases with their Dice, predicted again to be looked at."""
    volumes = [prepared.volume(case) for case, _ in cases]
    stacks = (volume.image for volume in volumes)
    labels = segment(predict, stacks, config, scoring(config))
    return [
        plots.Shown(*case, volume.image, volume.label, label)
        for case, volume, (label,) in zip(cases, volumes, labels, strict=True)
    ]


def summarise(results: Results) -> dict[str, Any]:
    """Means over cases for every organ, and over organs, with the number of undefined values.

    'voxels' is an organ's true size.

    Returns {'mean': {metric: value}, 'organs': {organ: {metric: {'mean', 'std', 'undefined'}}},
    'cases': results}; what no case defines is nan.
    """
    organs: dict[str, Any] = {}
    for by_organ in results.values():
        for organ, scores in by_organ.items():
            for metric, value in scores.items():
                organs.setdefault(organ, {}).setdefault(metric, []).append(value)
    for by_metric in organs.values():
        for metric, values in by_metric.items():
            undefined = int(np.isnan(values).sum())
            by_metric[metric] = {"mean": mean(values), "std": mean(values, np.std)}
            by_metric[metric]["undefined"] = undefined
    names = next(iter(organs.values()))
    overall = {m: mean([by_metric[m]["mean"] for by_metric in organs.values()]) for m in names}
    return {"mean": overall, "organs": organs, "cases": results}


def mean(values: Iterable[float], statistic: Callable = np.mean) -> float:
    """Mean, or another statistic, of what is not nan; nan where nothing is left."""
    known = [v for v in values if not np.isnan(v)]
    return float(statistic(known)) if known else float("nan")


def table(summary: dict[str, Any]) -> str:
    """The means as text, an organ a line."""
    head = {"dice": "Dice %", "jaccard": "Jaccard %", "hd95": "95HD vox", "asd": "ASD vox"}
    head |= {"hd95_mm": "95HD mm", "asd_mm": "ASD mm"}
    columns = [name for name in head if name in summary["mean"]]
    scale = {name: 100 if name in metrics.OVERLAP else 1 for name in columns}
    width = max(map(len, [*summary["organs"], "organ"]))
    lines = [f"{'organ':<{width}}" + "".join(f"{head[c]:>11}" for c in columns)]
    for organ, scores in summary["organs"].items():
        cells = (f"{scores[c]['mean'] * scale[c]:>11.2f}" for c in columns)
        undefined = max(scores[c]["undefined"] for c in columns)
        note = f"   ({undefined} undefined)" if undefined else ""
        lines.append(f"{organ:<{width}}" + "".join(cells) + note)
    cells = (f"{summary['mean'][c] * scale[c]:>11.2f}" for c in columns)
    lines.append(f"{'mean':<{width}}" + "".join(cells))
    return "\n".join(lines)
