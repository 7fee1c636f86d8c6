"""Compiles the train step for TPUs that are not there, and says whether and how fast it would run.

pip install libtpu
python -m cgs_jax.aot --config configs/segthor.py --topology v5e:4x4

The real TPU compiler counts; the time is an estimate from its counts and the chip's peaks. Exit
code 1 where the step does not fit into a chip's memory.
"""

import collections
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
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.files import to_json, write_text
from cgs_jax.runtime.logs import say
from cgs_jax.training import train_step
from cgs_jax.training.resolve import resolve

# By generation: bfloat16 FLOP/s, bytes/s and bytes of a chip's memory. Google's public figures.
CHIPS = {
    "v4": (275e12, 1228e9, 32e9),
    "v5e": (197e12, 819e9, 16e9),
    "v5p": (459e12, 2765e9, 95e9),
    "v6e": (918e12, 1640e9, 32e9),
}
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


def compile_step(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Compiles the step of `config` for `topology`, e.g. 'v5e:4x4'.

    Counts are per chip; for v4 and v5p per core, of which their chips have two.

    Raises:
      UserError: libtpu or the topology is not there, or the batch does not divide.
    """
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS:
        raise UserError(f"unknown chip in --topology {topology!r}; there are: {', '.join(CHIPS)}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        alone = {"chips_per_host_bounds": (1, 1, 1)} if shape in ("1x1", "1x1x1") else {}
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no topology {topology} ({reason}); is libtpu installed?") from error
    config = ConfigDict(config.to_dict())
    network.choose_lowering(config.model, "tpu")
    config = resolve(config)
    method = train_step.make_method(config)
    mesh = devices.make_mesh(config, description.devices)
    inputs = train_step.abstract_inputs(method, mesh)
    cores = max(device.core_on_chip for device in description.devices) + 1
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
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    flops_per_s, bytes_per_s, capacity = (peak / cores for peak in CHIPS[chip])
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text()
    return result | {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "memory_bytes": used,
        "flops_ms": 1000 * cost["flops"] / flops_per_s,
        "bytes_ms": 1000 * cost["bytes accessed"] / bytes_per_s,
        "collectives": collectives(text),
        "gathers": len(re.findall(r" gather\(", text)),
        "grouped_convolutions": len(re.findall(r"feature_group_count=(?!1\b)", text)),
        "fits": used <= capacity,
    }


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count and bytes by kind of the collectives in a compiled module."""
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for shapes, kind in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text):
        found[kind]["count"] += 1
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        if kind == "collective-permute" and len(arrays) > 1:
            arrays = arrays[1:2]  # operand, result and two counters
        for dtype, dims in arrays:
            size = 1
            for dim in filter(None, dims.split(",")):
                size *= int(dim)
            found[kind]["bytes"] += size * BYTES.get(dtype, 4)
    return dict(found)


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    unit = "chip" if result["cores_per_chip"] == 1 else "core"
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    head = f"{result['topology']}, {result['devices']} {unit}s as {mesh}; per {unit}:"
    if "flops" not in result:
        return f"{head} does not fit: {result['why']}"
    lines = [
        head,
        f"FLOPs       {result['flops'] / 1e9:.1f} G, {result['flops_ms']:.2f} ms at the peak",
        f"bytes       {result['bytes'] / 1e9:.2f} GB, {result['bytes_ms']:.2f} ms at the peak",
        f"memory      {result['memory_bytes'] / 1e9:.2f} GB: "
        + ("fits" if result["fits"] else "does not fit"),
        f"gathers {result['gathers']}, grouped convolutions {result['grouped_convolutions']}",
    ]
    for kind, numbers in result["collectives"].items():
        lines.append(f"{kind:<11} {numbers['count']}, {numbers['bytes'] / 1e6:.1f} MB")
    longer = max(result["flops_ms"], result["bytes_ms"])
    lines.append(f"estimate    {longer:.2f} ms a step (compiled in {result['compile_s']:.0f} s)")
    return "\n".join(lines)


def share_of_specialists(result: dict[str, Any], plain: dict[str, Any]) -> str:
    """What they add to the step that is without them `plain`, as text."""
    more = {k: result[k] / plain[k] - 1 for k in ("flops", "bytes", "memory_bytes")}
    return (
        f"specialists {more['flops']:+.1%} FLOPs, {more['bytes']:+.1%} bytes, "
        f"{more['memory_bytes']:+.1%} memory"
    )


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "e.g. v5e:4x4, v4:2x2x1, v6e:16x16")
    _SPECIALISTS = flags.DEFINE_boolean(
        "specialists", True, "say what specialists cost, which compiles the step without them, too"
    )
    _OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")
    flags.mark_flags_as_required(["config", "topology"])

    def _main(_):
        output = output_file(_OUTPUT.value)
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # can not be read without a TPU
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
