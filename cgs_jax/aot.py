"""Compiles the train step for accelerators that are not there, and says what it would need.

pip install libtpu
python -m cgs_jax.aot --config configs/segthor.py --topology v5e:4x4

The real TPU compiler counts; the time is an estimate from its counts and the chip's peaks. Exit
code 1 where the step does not fit into a chip's memory.

XLA's own count of bytes takes in on-chip memory, and a whole map for each slice of it that is
fetched. What passes between the chip and its memory (HBM), which bounds the time, is read off the
compiled module, and so are the cycles that the compiler expects of what it runs.

`--topology h100:1`, after `pip install "jax[cuda12]"`, compiles for GPUs. That tells only whether
the step compiles and fits: XLA counts no FLOPs there, and tries algorithms only on a real GPU.
"""

import collections
import math
import os
import re
import sys
import time
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict, config_flags

from cgs_jax.models import network
from cgs_jax.runtime import devices
from cgs_jax.runtime.cli import cli, output_file
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import to_json, write_text
from cgs_jax.training import train_step
from cgs_jax.training.resolve import resolve

# Of a chip: bfloat16 FLOP/s, bytes/s, bytes of memory, by the makers' public figures, and cycles a
# second, of which the FLOP/s are made (v6e's are not public).
CHIPS = {
    "v4": (275e12, 1228e9, 32e9, 1.05e9),
    "v5e": (197e12, 819e9, 16e9, 1.5e9),
    "v5p": (459e12, 2765e9, 95e9, 1.75e9),
    "v6e": (918e12, 1640e9, 32e9, None),
    "h100": (989e12, 3352e9, 80e9, None),
}
# What XLA must know of a GPU to compile for one that is not there: an H100 SXM with 80 GB.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}  # others: 4
# libtpu is told what it would ask the cloud's metadata server, and complain that there is none.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so a run that uses one does not matter
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
COPIES = "(copy|.*slice|collective-permute)-start"
# These move nothing themselves; calls of XLA's own only set memory aside.
MOVES_NOTHING = "parameter|constant|bitcast|tuple|get-tuple-element|custom-call|while|.*-done"


def compile_step(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Compiles the step of `config` for `topology`, e.g. 'v5e:4x4' or 'h100:8'.

    Counts are per chip; for v4 and v5p per core, of which their chips have two.

    Raises:
      UserError: what compiles for it or the topology is not there, or the batch does not divide.
    """
    chip = topology.partition(":")[0]
    there = _devices(topology)
    config = ConfigDict(config.to_dict())
    network.choose_lowering(config.model, "gpu" if chip == "h100" else "tpu")
    config = resolve(config)
    method = train_step.make_method(config)
    mesh = devices.make_mesh(config, there)
    inputs = train_step.abstract_inputs(method, mesh)
    cores = max(getattr(device, "core_on_chip", 0) for device in there) + 1
    result = {"topology": topology, "devices": mesh.size, "cores_per_chip": cores}
    result |= {"mesh": dict(mesh.shape), "batch": config.batch.to_dict(), "size": config.data.size}
    started = time.perf_counter()
    step = train_step.make_train_step(method, mesh)
    try:
        compiled = step.lower(*inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = " ".join(str(error).split())[:200]
        return result | {"fits": False, "why": first}
    result["compile_s"] = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops_per_s, bytes_per_s, capacity, cycles_per_s = CHIPS[chip]
    result |= {
        "memory_bytes": used,
        "fits": used <= capacity / cores,
        "collectives": collectives(text),
        "gathers": len(re.findall(r" gather\(", text)),
        "grouped_convolutions": len(re.findall(r"feature_group_count=(?!1\b)", text)),
    }
    if chip == "h100":
        return result
    cost, traffic = compiled.cost_analysis(), memory_traffic(text)
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return result | {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "traffic_bytes": traffic,
        "cycles": cycles,
        "flops_ms": 1000 * cost["flops"] / (flops_per_s / cores),
        "traffic_ms": 1000 * traffic / (bytes_per_s / cores),
        "cycles_ms": 1000 * cycles / cycles_per_s if cycles_per_s else None,
    }


def _devices(topology):
    """Devices of a topology that need not be there."""
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS:
        raise UserError(f"unknown chip in --topology {topology!r}; there are: {', '.join(CHIPS)}")
    if chip == "h100":
        package = '"jax[cuda12]"'
        options = {"platform": "cuda", "target_config": H100, "topology": f"1x1x{shape or 1}"}
    else:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        package, options = "libtpu", {"platform": "tpu", "topology_name": topology}
        if shape in ("1x1", "1x1x1"):
            options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(**options).devices
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no --topology {topology} ({reason}); is {package} installed?") from error


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count and bytes by kind of the collectives in a compiled module."""
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for shapes, kind in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text):
        found[kind]["count"] += 1
        arrays = _arrays(shapes)
        if kind == "collective-permute" and len(arrays) > 1:
            arrays = arrays[1:2]  # operand, result and two counters
        found[kind]["bytes"] += sum(size for size, _ in arrays)
    return dict(found)


def memory_traffic(text: str) -> int:
    """Bytes that a module compiled for a TPU reads from and writes to the chip's memory.

    Of each instruction that runs: its operands and results but those in on-chip memories, whose
    layouts have S(1) or another number. A fusion counts operands whole of which it may read a part.
    Bodies of loops are left out, which UA-MT, VerSemi and BCP have: for them it is too low.
    """
    entry = text[text.index("\nENTRY ") :]
    shapes, total = {}, 0
    for name, shape, kind, rest in re.findall(r"%([\w.-]+) = (.*?) ([a-z-]+)\((.*)", entry):
        shapes[name] = arrays = _arrays(shape)
        if re.fullmatch(MOVES_NOTHING, kind):
            continue
        if re.fullmatch(COPIES, kind):  # operand, result and counters: reads as much as it writes
            moved = [array for array in arrays if array[0] > 4][:2]
            smaller = min((size for size, _ in moved), default=0)
            arrays = [(smaller, on_chip) for _, on_chip in moved]
        else:
            operands = rest.split("), ")[0]
            for operand in re.findall(r"%([\w.-]+)", operands):
                arrays = arrays + shapes[operand]
        total += sum(size for size, on_chip in arrays if not on_chip)
    return total


def _arrays(shapes):
    """(bytes, whether it lies on the chip) of each array in the text of a shape."""
    found = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shapes):
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        found.append((size * BYTES.get(dtype, 4), "S(" in layout))
    return found


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    unit = "chip" if result["cores_per_chip"] == 1 else "core"
    unit = "GPU" if result["topology"].startswith("h100") else unit
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    lines = [f"{result['topology']}, {result['devices']} {unit}s as {mesh}; per {unit}:"]
    if "why" in result:
        return f"{lines[0]} does not fit: {result['why']}"
    if "flops" in result:
        cycles = f", {result['cycles_ms']:.2f} ms" if result["cycles_ms"] else ""
        lines += [
            f"FLOPs       {result['flops'] / 1e9:.1f} G, {result['flops_ms']:.2f} ms at the peak",
            f"moved       {result['traffic_bytes'] / 1e9:.2f} GB, {result['traffic_ms']:.2f} ms at "
            f"the peak; XLA counts {result['bytes'] / 1e9:.2f} GB with on-chip memory",
            f"cycles      {result['cycles'] / 1e6:.1f} M by the compiler{cycles}",
        ]
    lines += [
        f"memory      {result['memory_bytes'] / 1e9:.2f} GB: "
        + ("fits" if result["fits"] else "does not fit"),
        f"gathers {result['gathers']}, grouped convolutions {result['grouped_convolutions']}",
    ]
    for kind, numbers in result["collectives"].items():
        lines.append(f"{kind:<11} {numbers['count']}, {numbers['bytes'] / 1e6:.1f} MB")
    compiled = f"compiled in {result['compile_s']:.0f} s"
    if "flops" in result:
        longest = max(result["flops_ms"], result["traffic_ms"], result["cycles_ms"] or 0)
        bound = "" if result["cycles_ms"] else "at least "
        compiled = f"estimate    {bound}{longest:.2f} ms a step ({compiled})"
    return "\n".join([*lines, compiled])


def share_of_specialists(result: dict[str, Any], plain: dict[str, Any]) -> str:
    """What they add to the step that is without them `plain`, as text."""
    names = {"flops": "FLOPs", "traffic_bytes": "moved", "bytes": "bytes"}
    names |= {"cycles": "cycles", "memory_bytes": "memory"}
    more = [f"{result[k] / plain[k] - 1:+.1%} {name}" for k, name in names.items() if k in result]
    return f"specialists {', '.join(more)}"


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "e.g. v5e:4x4, v4:2x2x1, v6e:16x16, h100:1")
    _SPECIALISTS = flags.DEFINE_boolean(
        "specialists", True, "say what specialists cost, which compiles the step without them, too"
    )
    _OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")
    flags.mark_flags_as_required(["config", "topology"])

    def _main(_):
        output = output_file(_OUTPUT.value)
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # can not be read without a chip
        result = compile_step(_CONFIG.value, _TOPOLOGY.value)
        say(report(result))
        plain = train_step.without_specialists(_CONFIG.value) if _SPECIALISTS.value else None
        if plain and result["fits"]:
            result["without_specialists"] = compile_step(plain, _TOPOLOGY.value)
            say(share_of_specialists(result, result["without_specialists"]))
        if output:
            write_text(output, to_json(result, indent=1) + "\n")
        if not result["fits"]:
            sys.exit(1)

    cli(_main)
