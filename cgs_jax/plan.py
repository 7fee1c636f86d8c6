"""Looks at your scans, and proposes the options to train with.

python -m cgs_jax.plan --config configs/nnunet.py --config.data.root=FOLDER

Nothing is trained or changed. The memory is what the compiler says of the step on this machine's
device; the rest are rules of thumb that docs/own_data.md explains.
"""

import math
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from cgs_jax.data import completion, fingerprint, tasks
from cgs_jax.data.fingerprint import WINDOW, Facts
from cgs_jax.models import network
from cgs_jax.runtime import devices
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.errors import UserError
from cgs_jax.runtime.logs import say
from cgs_jax.training import optimizers, train_step
from cgs_jax.training.resolve import resolve

# pixels a side of what a step sees, by platform
LARGEST = {"cpu": 128, "other": 256}
LARGEST_OF_VOLUMES = {"cpu": (32, 64), "other": (64, 128)}  # slices, and pixels a side
# Where windows are smaller than scans, organs may lie where those near the centre do not reach.
ANYWHERE = {"data.patch_anywhere": 0.5, "data.patch_foreground": 0.4}


def describe(facts: Mapping[str, Facts]) -> str:
    """Sizes, voxels and organs of the scans, as text."""

    def spread(values):
        low, middle, high = np.percentile(values, (0, 50, 100), axis=0)
        rows = (" x ".join(f"{x:g}" for x in np.round(row, 2)) for row in (middle, low, high))
        return "{} (from {} to {})".format(*rows)

    labelled = [of for of in facts.values() if of.voxels is not None]
    lines = [
        f"{len(facts)} scans, {len(labelled)} with labels",
        f"slices x height x width   {spread([of.shape for of in facts.values()])}",
        f"millimetres               {spread([of.spacing for of in facts.values()])}",
    ]
    values = [channels for of in labelled for channels in of.intensities]
    if values:
        low, middle, high = np.percentile(values, (WINDOW[0], 50, WINDOW[1]))
        lines.append(
            f"intensities in organs     {middle:.0f} (.5 to 99.5 %: {low:.0f} to {high:.0f})"
        )
    for organ in dict.fromkeys(organ for of in labelled for organ in of.voxels):
        counts = [of.voxels[organ] for of in labelled if organ in of.voxels]
        there = [n for n in counts if n]
        size = f"{np.median(there):.0f} voxels in the median case" if there else "nowhere"
        lines.append(f"{organ:<25} {size}, in {len(there)} of {len(counts)} cases")
    return "\n".join(lines)


def propose(facts: Mapping[str, Facts], stride: int, platform: str) -> dict[str, Any]:
    """Fields of the configuration: the grid, what a step sees of it, and how much of it.

    Scans of one shape and voxel size are taken as they are, if they are square and not large; all
    others are resampled to their median pixel, and a step sees windows about as large as the median
    slice, at most what the device is fit for.
    """
    largest = LARGEST.get(platform, LARGEST["other"])
    shapes = np.array([of.shape[1:] for of in facts.values()])
    pixels = np.array([of.spacing[1:] for of in facts.values()])
    side = int(shapes[0, 0])
    alike = (shapes == side).all() and np.allclose(pixels, pixels[0], rtol=0.02)
    batch = 6 if platform == "cpu" else 12
    fields = {"batch.labelled": batch, "batch.unlabelled": batch}
    if alike and side % stride == 0 and side <= largest:
        return {"data.size": side} | fields
    extent = np.median(1 + (shapes - 1) * pixels / np.median(pixels), 0).max()
    patch = min(stride * math.ceil(extent / stride), largest)
    fields = {"data.spacing": "median", "data.patch": patch} | fields
    return fields | (ANYWHERE if patch < extent else {})


def propose_volumes(
    facts: Mapping[str, Facts], poolings: int, stride: int, platform: str
) -> dict[str, Any]:
    """The same for a backbone that sees volumes and pools them so often: all scans at their median
    voxel, windows about as large as the median scan, and slices that are pooled once pixels have
    become as large as they are thick (as nnU-Net does it)."""
    spacings = np.array([of.spacing for of in facts.values()])
    between, pixel = np.median(spacings[:, 0]), np.median(spacings[:, 1:])
    extents = 1 + (np.array([of.shape for of in facts.values()]) - 1) * spacings
    depth, *sides = np.median(extents / (between, pixel, pixel), 0)
    strides, thick, wide = [], between, pixel
    for _ in range(poolings):
        strides.append(1 if thick > 2 * wide else 2)
        thick, wide = thick * strides[-1], 2 * wide
    most = LARGEST_OF_VOLUMES.get(platform, LARGEST_OF_VOLUMES["other"])
    fields = {"model.depth_strides": tuple(strides)}
    fields |= {"data.spacing": "median", "data.slice_spacing": "median"}
    for name, extent, step, largest in (
        ("data.depth", depth, math.prod(strides), most[0]),
        ("data.patch", max(sides), stride, most[1]),
    ):
        fields[name] = min(step * math.ceil(extent / step), largest)
        fields |= ANYWHERE if fields[name] < extent else {}
    return fields | {"batch.labelled": 2, "batch.unlabelled": 2}


def memory(config: ConfigDict) -> tuple[float, float]:
    """Bytes of state and batch, and of all else that a step of `config` needs on a device here."""
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    optimizer, _ = optimizers.make_optimizer(config)
    step = train_step.make_train_step(method, optimizer, config, mesh)
    inputs = train_step.abstract_inputs(method, optimizer, config, mesh)
    needs = step.lower(*inputs).compile().memory_analysis()
    return needs.argument_size_in_bytes, needs.temp_size_in_bytes


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flags_as_required(["config"])

    def _main(_):
        config, given = _CONFIG.value, flags.FLAGS["config"].override_values
        if config.data.name == tasks.COLLECTION:
            raise UserError("plan looks at one data set: give the --config of each member")
        config = ConfigDict(config.to_dict())
        completion.complete(config.data)
        facts = fingerprint.of_cases(
            tasks.layout(config.data).find(config.data).values(), config.data
        )
        say(describe(facts))
        stride, platform = network.stride(config), jax.default_backend()
        if network.sees_volumes(config):
            poolings = network.levels(config) - 1
            found = propose_volumes(facts, poolings, stride, platform)
        else:
            found = propose(facts, stride, platform)
        if "data.size" in given:  # squares are wanted
            found = {name: value for name, value in found.items() if not name.startswith("data.")}
        if config.method.name == "supervised":
            found |= {"batch.labelled": 2 * found["batch.labelled"], "batch.unlabelled": 0}
        found = {name: value for name, value in found.items() if name not in given}
        for name, value in found.items():
            with config.ignore_type():
                config.update_from_flattened_dict({name: value})
        config = resolve(config)
        say(f"\nintensities {config.data.normalise}, mirror images {config.augment.flip:g}")
        held, rest = memory(config)
        say(f"a step needs {(held + rest) / 1e9:.1f} GB, of which {rest / 1e9:.1f} while it runs")
        options = [f"--config.{name}={value}" for name, value in (given | found).items()]
        options = [shlex.quote(option) for option in options]
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        say("\npython -m cgs_jax.main --workdir RUN --config " + " ".join([name, *options]))

    cli(_main)
