"""Times a configuration on the devices at hand, and says what bounds it.

python -m cgs_jax.benchmark --config configs/acdc.py --config.data.root=FOLDER --output acdc.json

Where the folder --config.data.root is not there, the scans are random, of training size (not for
configs/nnunet.py, whose folder names the organs). No result is a model: nothing is kept but the
JSON.
"""

import contextlib
import itertools
import pathlib
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from scipy import ndimage

from cgs_jax.data import cache, case_lists, streams, tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.prepared import Entry, Prepared
from cgs_jax.data.volume import Volume
from cgs_jax.inference.predictor import make_predictor
from cgs_jax.runtime import devices, processes
from cgs_jax.runtime.cli import cli, output_file
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError, check_choice
from cgs_jax.runtime.files import to_json, write_text
from cgs_jax.scoring import summaries
from cgs_jax.training import loop, train_step
from cgs_jax.training.resolve import resolve

STAGES = ["step", "specialists", "input", "loop", "evaluation"]
BLOCK = 5  # steps that are dispatched before the host waits


def benchmark(config: ConfigDict, stages: set[str], seconds: float) -> dict[str, Any]:
    """Runs those `stages` of STAGES that are named; each takes about `seconds`.

    Returns what the JSON holds: times in ms, rates per second, bytes and FLOPs per step.
    """
    config, steps = ConfigDict(config.to_dict()), config.total_steps
    config.total_steps = max(steps, 10**6)
    config = resolve(config)
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    device = mesh.devices.flat[0]
    result: dict[str, Any] = {
        "config": {"method": config.method.name, "data": config.data.name, "size": config.data.size}
        | config.batch.to_dict()
        | {"model": config.model.to_dict()},
        "device": f"{mesh.size} x {device.device_kind}",
        "jax": jax.__version__,
        "total_steps": steps,
    }
    compiled = None
    with data(config) as prepared:
        if "step" in stages:
            result["step"], compiled = time_step(method, prepared, mesh, seconds)
            result["peak_bytes"] = peak_bytes(device)
            result["ceilings"] = ceilings(device, config.model.dtype)
        plain = train_step.without_specialists(config)
        if plain and {"step", "specialists"} <= stages:
            alone = train_step.make_method(plain)
            result["without_specialists"], _ = time_step(alone, prepared, mesh, seconds)
        if "input" in stages:
            result["input"] = time_input(method, prepared, mesh, seconds)
        if "loop" in stages:
            result["loop"] = time_loop(method, prepared, mesh, seconds, compiled)
        if "evaluation" in stages:
            result["evaluation"] = time_evaluation(method, prepared, mesh)
    return result | {"bound": bound(result)}


@contextlib.contextmanager
def data(config: ConfigDict) -> Iterator[Prepared]:
    """The prepared scans of `config`, or random ones where its folder is not there."""
    if pathlib.Path(config.data.root).exists():
        yield cache.prepare(config)
        return
    say(f"no {config.data.root}: random scans")
    rng, entries, splits = np.random.default_rng(0), {}, case_lists.Splits([], [], [], [])
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks.tasks(config.data).values():
            cases = [task.full_name(f"case{i}") for i in range(12)]
            for listed, some in zip(splits, (cases[:8], cases[8:], [], cases[:2]), strict=True):
                listed += some
            size, classes = task.data.size, len(task.data.classes)
            for case in cases:
                smooth = ndimage.gaussian_filter(rng.normal(size=(12, size, size)), (1, 8, 8))
                cuts = np.quantile(smooth, np.linspace(0.5, 1, classes + 1)[:-1])
                label = np.searchsorted(cuts, smooth).astype(np.uint8)
                image = cache.quantise(label / label.max())
                image = np.stack([image] * config.data.channels)
                entries[case] = Entry(pathlib.Path(folder, case), task)
                cache.write(entries[case].folder, Volume(image, label, None), Grid(size))
        volumes = config.data.depth > 0
        yield Prepared(entries, splits, config.data.classes, volumes=volumes)


def time_step(
    method: Any, prepared: Prepared, mesh: Mesh, seconds: float
) -> tuple[dict[str, Any], Any]:
    """The jitted train step on batches that are on the devices already; returned with it."""
    state = train_step.init_state(method, mesh)
    dataset = loop.host_batches(method, prepared, mesh)
    batches = list(itertools.islice(streams.device_batches(dataset, mesh), 4))
    step = train_step.make_train_step(method, mesh)
    seed = train_step.seed_of(method.config)
    traced = step.trace(state, batches[0], seed)
    floor = convolution_bytes(traced.jaxpr.jaxpr)
    started = time.perf_counter()
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - started
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()

    def some(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for i in range(count):
            state, metrics = compiled(state, batches[i % len(batches)], seed)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - started) / count

    some(1)
    once = some(2)
    block = BLOCK if once < seconds / 50 else 1
    blocks = int(np.clip(seconds / once / block, 3, 40))
    ms = [1000 * some(block) for _ in range(blocks)]
    images = sum(stream.count for stream in method.streams().values()) // method.draws
    result = {
        "compile_s": compile_s,
        "blocks_ms": ms,
        "ms": float(np.median(ms)),
        "images_per_s": 1000 * images / float(np.median(ms)),
        "flops": cost["flops"] * mesh.size,
        "bytes": cost["bytes accessed"] * mesh.size,
        "floor_bytes": floor,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return result, compiled


def convolution_bytes(jaxpr: Any) -> int:
    """Bytes that convolutions and matrix products of a traced step read and write: what must move
    between the chip and its memory even if all other work is fused into them. Of branches the one
    that moves most counts, and a loop without a known length counts once."""
    total, has_equations = 0, lambda x: hasattr(x, "eqns")
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(equation.params, is_leaf=has_equations)
        parts = [convolution_bytes(part) for part in parts if has_equations(part)]
        inner = max(parts) if "branches" in equation.params else sum(parts)
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            variables = (*equation.invars, *equation.outvars)
            total += sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
    return total


def ceilings(device: jax.Device, dtype: str) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of doubling a large array on `device`."""
    n = 2048 if device.platform == "cpu" else 8192
    with jax.default_device(device):
        x = jax.random.normal(jax.random.key(0), (n, n), dtype)
        y = jnp.ones((n, 8 * n), jnp.float32)
        double = jax.jit(lambda y: 2 * y, donate_argnums=0)  # in place: no page is made anew
        product, seconds = jax.jit(jnp.matmul), {"flops": [], "bytes": []}
        for _ in range(8):
            started = time.perf_counter()
            jax.block_until_ready(product(x, x))
            middle = time.perf_counter()
            y = jax.block_until_ready(double(y))
            seconds["flops"].append(middle - started)
            seconds["bytes"].append(time.perf_counter() - middle)
    return {
        "flops_per_s": 2 * n**3 / min(seconds["flops"]),
        "bytes_per_s": 2 * y.nbytes / min(seconds["bytes"]),
    }


def time_input(method: Any, prepared: Prepared, mesh: Mesh, seconds: float) -> dict[str, float]:
    """Host batches, read one after the other on one core."""
    dataset = loop.host_batches(method, prepared, mesh)
    started, count = time.perf_counter(), 0
    while count < len(dataset) and time.perf_counter() - started < min(seconds, 10):
        dataset[count]
        count += 1
    per_batch = (time.perf_counter() - started) / count
    return {
        "ms": 1000 * per_batch,
        "slices_per_s": sum(stream.count for stream in method.streams().values()) / per_batch,
    }


def time_loop(
    method: Any, prepared: Prepared, mesh: Mesh, seconds: float, step: Any = None
) -> dict[str, float]:
    """The training loop with its input and logging, without validation; `step` if compiled."""
    state = train_step.init_state(method, mesh)
    step = step or train_step.make_train_step(method, mesh)
    config = ConfigDict(method.config.to_dict())
    config.eval_every = 10**9
    batches = streams.device_batches(loop.host_batches(method, prepared, mesh), mesh)
    config.log_every = 1
    steps = loop.steps(config, step, state, batches, 0, None, processes.Stop())
    for _ in range(3):
        _, state, _ = next(steps)
    started = time.perf_counter()
    _, state, _ = next(steps)
    config.log_every = int(np.clip(seconds / 2 / (time.perf_counter() - started), 2, 50))
    marks = []
    for count, _, _ in steps:
        marks.append((count, time.perf_counter()))
        if len(marks) > 2 and marks[-1][1] - marks[0][1] > seconds:
            break
    (first, start), (last, end) = marks[0], marks[-1]
    return {"ms": 1000 * (end - start) / (last - first), "steps": last - first}


def time_evaluation(method: Any, prepared: Prepared, mesh: Mesh) -> dict[str, float]:
    """Prediction alone, and evaluation with all metrics, of the validation volumes."""
    state = train_step.init_state(method, mesh)
    predictor = make_predictor(method)(state)
    cases = prepared.splits.val
    for some in (cases[:1], cases):  # the first compiles
        started = time.perf_counter()
        for _ in summaries.segmented(predictor, prepared, some, predictor.scoring):
            pass
    predicted = time.perf_counter()
    summaries.evaluate(predictor, prepared, cases, True, predictor.scoring)
    evaluated = time.perf_counter()
    return {
        "volumes": len(cases),
        "slices": sum(prepared.volume(case).image.shape[1] for case in cases),
        "prediction_ms": 1000 * (predicted - started) / len(cases),
        "evaluation_ms": 1000 * (evaluated - predicted) / len(cases),
    }


def peak_bytes(device: jax.Device) -> int:
    """Peak memory of the device, or of this process where the device is the CPU."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def bound(result: dict[str, Any]) -> str:
    """What a faster program would have to improve first."""
    step, source = result.get("step"), result.get("input")
    if step and source and source["ms"] > step["ms"]:
        return "input pipeline"
    if not step:
        return "not measured"
    count = int(result["device"].split()[0])
    ceiling = {k: v * count for k, v in result["ceilings"].items()}
    shares = {
        "arithmetic": step["flops"] / ceiling["flops_per_s"],
        "convolutions' memory": step["floor_bytes"] / ceiling["bytes_per_s"],
        "all memory": step["bytes"] / ceiling["bytes_per_s"],
    }
    shares = {name: 1000 * seconds / step["ms"] for name, seconds in shares.items()}
    name = max(shares, key=shares.get)
    if shares[name] < 0.3:
        return "no peak: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"{name}, at {shares[name]:.0%} of what the device does"


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['device']}, jax {result['jax']}: {result['config']}"]
    if step := result.get("step"):
        ms, peak = step["blocks_ms"], result["ceilings"]
        floor_ms = (
            1000 * step["floor_bytes"] / peak["bytes_per_s"] / int(result["device"].split()[0])
        )
        lines += [
            f"compile       {step['compile_s']:.1f} s",
            f"step          {step['ms']:.2f} ms (min {min(ms):.2f}, max {max(ms):.2f}, "
            f"{len(ms)} blocks), {step['images_per_s']:.0f} images/s",
            f"FLOPs         {step['flops'] / 1e9:.1f} G a step, "
            f"{step['flops'] / step['ms'] / 1e9:.2f} TFLOP/s; "
            f"a large matrix product does {peak['flops_per_s'] / 1e12:.2f}",
            f"bytes         {step['bytes'] / 1e9:.2f} GB a step by XLA, "
            f"{step['bytes'] / step['ms'] / 1e6:.0f} GB/s; "
            f"doubling an array does {peak['bytes_per_s'] / 1e9:.0f}",
            f"training      {result['total_steps']} steps take "
            f"{result['total_steps'] * step['ms'] / 3.6e6:.3g} h, without validation",
            f"memory floor  {step['floor_bytes'] / 1e9:.2f} GB through convolutions = "
            f"{floor_ms:.2f} ms; the step takes {step['ms'] / floor_ms:.1f} times that",
            f"peak memory   {result['peak_bytes'] / 1e9:.2f} GB; the step's own arrays "
            f"{step['temporary_bytes'] / 1e9:.2f}",
        ]
    if plain := result.get("without_specialists"):
        more = {k: step[k] / plain[k] - 1 for k in ("ms", "temporary_bytes")}
        lines.append(
            f"specialists   {more['ms']:+.1%} time and {more['temporary_bytes']:+.1%} memory of "
            f"the step's own arrays, beyond {plain['ms']:.2f} ms and "
            f"{plain['temporary_bytes'] / 1e9:.2f} GB without them"
        )
    if source := result.get("input"):
        lines.append(
            f"input         {source['ms']:.2f} ms a step on one core, "
            f"{source['slices_per_s']:.0f} slices/s"
        )
    if loop := result.get("loop"):
        lines.append(f"loop          {loop['ms']:.2f} ms a step over {loop['steps']} steps")
        if {"step", "input"} <= result.keys():
            slower = max(result["step"]["ms"], result["input"]["ms"])
            lines[-1] += f", {loop['ms'] / slower - 1:+.1%} to the slower of step and input"
    if evaluation := result.get("evaluation"):
        lines.append(
            f"per volume    prediction {evaluation['prediction_ms']:.0f} ms, evaluation with all "
            f"metrics {evaluation['evaluation_ms']:.0f} ms "
            f"({evaluation['volumes']} volumes, {evaluation['slices']} slices)"
        )
    return "\n".join([*lines, f"bound by      {result['bound']}"])


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _STAGES = flags.DEFINE_list("stages", STAGES, "what to time")
    _SECONDS = flags.DEFINE_float("seconds", 20, "for each stage, about")
    _OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")
    flags.mark_flags_as_required(["config"])

    def _main(_):
        for stage in _STAGES.value:
            check_choice("stage", stage, STAGES)
        if not _SECONDS.value > 0:
            raise UserError("--seconds must be more than 0")
        stages = set(_STAGES.value) | ({"step"} if "specialists" in _STAGES.value else set())
        output = output_file(_OUTPUT.value)
        jax.config.update("jax_enable_compilation_cache", False)
        result = benchmark(_CONFIG.value, stages, _SECONDS.value)
        say(report(result))
        if output:
            write_text(output, to_json(result, indent=1) + "\n")

    cli(_main)
