"""Looks at your scans, and proposes the options to train with.

python -m cgs_jax.plan --config configs/nnunet.py --config.data.root=FOLDER

Nothing is trained or changed. The memory is what the compiler says of the step on this machine's
device; the rest are rules of thumb that docs/own_data.md explains.
"""

import math
import shlex
from collections.abc import Mapping

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from cgs_jax.data import completion, fingerprint, proposal, tasks
from cgs_jax.data.fingerprint import WINDOW, Facts
from cgs_jax.models import network
from cgs_jax.runtime import devices
from cgs_jax.runtime.cli import cli
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.resolve import resolve


def describe(facts: Mapping[str, Facts]) -> str:
    """Sizes, voxels and organs of the scans, as text."""

    def spread(values):
        low, middle, high = np.percentile(values, (0, 50, 100), axis=0)
        rows = (" x ".join(f"{x:g}" for x in np.round(row, 2)) for row in (middle, low, high))
        return "{} (from {} to {})".format(*rows)

    labelled = [case for case in facts.values() if case.voxels is not None]
    lines = [
        f"{len(facts)} scans, {len(labelled)} with labels",
        f"slices x height x width   {spread([case.shape for case in facts.values()])}",
        f"millimetres               {spread([case.spacing for case in facts.values()])}",
    ]
    values = [channels for case in labelled for channels in case.intensities]
    if values:
        low, middle, high = np.percentile(values, (WINDOW[0], 50, WINDOW[1]))
        lines.append(
            f"intensities in organs     {middle:.0f} (.5 to 99.5 %: {low:.0f} to {high:.0f})"
        )
    for organ in dict.fromkeys(organ for case in labelled for organ in case.voxels):
        counts = [case.voxels[organ] for case in labelled if organ in case.voxels]
        there = [n for n in counts if n]
        size = f"{np.median(there):.0f} voxels in the median case" if there else "nowhere"
        lines.append(f"{organ:<25} {size}, in {len(there)} of {len(counts)} cases")
    return "\n".join(lines)


def memory(config: ConfigDict) -> tuple[float, float]:
    """Bytes of state and batch, and of all else that a step of `config` needs on a device here."""
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    step = train_step.make_train_step(method, mesh)
    inputs = train_step.abstract_inputs(method, mesh)
    needs = step.lower(*inputs).compile().memory_analysis()
    return needs.argument_size_in_bytes, needs.temp_size_in_bytes


def tell_of_little_memory(needed: float) -> None:
    """Warns where a device here has less memory than `needed` bytes."""
    there = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if needed > there:
        say(
            f"WARNING: that is more than the {there / 1e9:.1f} GB that a device has for it; try "
            "--config.model.dtype=bfloat16, --config.model.head_bytes=500000000, a smaller batch "
            "or smaller windows"
        )


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flags_as_required(["config"])

    def _main(_):
        config, given = _CONFIG.value, flags.FLAGS["config"].override_values
        if config.data.name == tasks.COLLECTION:
            raise UserError("plan looks at one data set: give the --config of each member")
        config = ConfigDict(config.to_dict())
        stride, poolings = network.stride(config), network.poolings(config)
        network.backbone(config).check(config.model)
        completion.complete(config.data, None, stride, poolings)
        facts = fingerprint.of_training(config.data)
        say("Training cases, without those that validate or test:")
        say(describe(facts))
        pixel = config.data.spacing if "data.spacing" in given else 0
        strides = given.get("model.depth_strides", ())
        found = proposal.of_scans(facts, stride, jax.default_backend(), poolings, pixel, strides)
        if "data.size" in given:  # squares are wanted
            found = {name: value for name, value in found.items() if not name.startswith("data.")}
        if config.method.name == "supervised":
            found |= {"batch.labelled": 2 * found["batch.labelled"], "batch.unlabelled": 0}
        found = proposal.for_devices(found, jax.device_count())
        found = {name: value for name, value in found.items() if name not in given}
        for name, value in found.items():
            with config.ignore_type():
                config.update_from_flattened_dict({name: value})
        config = resolve(config)
        say(f"\nintensities {config.data.normalise}, mirror images {config.augment.flip:g}")
        held, rest = memory(config)
        say(f"a step needs {(held + rest) / 1e9:.1f} GB, of which {rest / 1e9:.1f} while it runs")
        tell_of_little_memory(held + rest)
        options = [f"--config.{name}={value}" for name, value in (given | found).items()]
        options = [shlex.quote(option) for option in options]
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        say("\npython -m cgs_jax.main --workdir RUN --config " + " ".join([name, *options]))

    cli(_main)
