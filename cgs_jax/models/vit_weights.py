"""Reads the encoder of TransUNet from public Flax checkpoints of R50-ViT-B/16.

They are `.npz` files of the Vision Transformer's authors (Dosovitskiy et al., arXiv 2010.11929).
Their names are the paths of our modules; kernels are stored as Flax wants them.
"""

import math
from typing import Any

import flax
import numpy as np

from cgs_jax.models.resnet_vit import zoom
from cgs_jax.models.torch_weights import read
from cgs_jax.runtime.console import say
from cgs_jax.runtime.errors import UserError

ENCODER = ("params", "backbone", "encoder")
POSITIONS = "Transformer/posembed_input/pos_embedding"
# Of the classifier, which a checkpoint may have and a segmentation does not.
CLASSIFIER = ("cls", "pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")


def load(source: str, variables: Any) -> Any:
    """`variables` ({'params', 'batch_stats'}), whose encoder has the arrays of `source`; shapes of
    them are enough. Says what was ignored, and how positions were zoomed.

    Raises:
      UserError: it can not be read, a key is missing or unknown, or a shape differs.
    """
    arrays, flat = read(source), dict(flax.traverse_util.flatten_dict(variables))
    paths = {"/".join(path[len(ENCODER) :]): path for path in flat if path[:3] == ENCODER}
    known = paths.keys() | set(CLASSIFIER)
    for problem, odd in (("lacks", paths.keys() - arrays), ("has unknown", arrays.keys() - known)):
        if odd:
            raise UserError(f"{source} {problem} {min(odd)} ({len(odd)} such keys)")
    fitted = {name: _fitted(name, arrays[name], flat[path].shape) for name, path in paths.items()}
    for name, path in paths.items():
        if fitted[name].shape != flat[path].shape:
            raise UserError(
                f"{source}: {name} has shape {arrays[name].shape}, which does not fit the model's "
                f"{flat[path].shape}; check the options of config.model, and that images have 1 or "
                "3 channels"
            )
        flat[path] = fitted[name]
    ignored = ", ".join(sorted(arrays.keys() & set(CLASSIFIER))) or "nothing"
    old, new = (math.isqrt(x[POSITIONS].shape[1]) for x in (arrays, fitted))
    zoomed = f"{old} x {old} positions" + (f", zoomed to {new} x {new}" if old != new else "")
    say(f"{source}: {len(paths)} arrays read, ignored: {ignored}; {zoomed}")
    return flax.traverse_util.unflatten_dict(flat)


def _fitted(name, value, shape):
    """`value` as the parameter is shaped, where the two may differ; else as it is."""
    if name == POSITIONS and value.ndim == 3:
        old, new = (math.isqrt(count) for count in (value.shape[1], shape[1]))
        if old * old + 1 == value.shape[1]:  # the first is the token of the class
            return np.asarray(zoom(value[:, 1:], new, new)).reshape(1, new * new, -1)
    if name.split("/")[-2].startswith("gn") and value.shape == (1, 1, 1, *shape):
        return value.reshape(shape)  # as old checkpoints have group norms
    return value
