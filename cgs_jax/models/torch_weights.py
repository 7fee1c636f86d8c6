"""Maps weights between this UNet and PyTorch checkpoints of the SSL4MIS / CGS family.

Reads `.npz` and `.safetensors`, never pickles: a pickle runs code when it is opened.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np
import safetensors.numpy

from cgs_jax.runtime.errors import UserError

Arrays = dict[str, np.ndarray]
GENERALIST = "decoder.out_conv"


def _block(torch_prefix: str, path: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """torch name -> (collection, *path) of one ConvBlock."""
    names = {}
    for i, (conv, norm) in enumerate(((0, 1), (4, 5)), 1):
        names |= _conv(f"{torch_prefix}.{conv}", (*path, f"conv{i}"))
        names |= _norm(f"{torch_prefix}.{norm}", (*path, f"bn{i}"))
    return names


def _conv(torch_prefix, path):
    return {
        f"{torch_prefix}.weight": ("params", *path, "kernel"),
        f"{torch_prefix}.bias": ("params", *path, "bias"),
    }


def _norm(torch_prefix, path):
    return {
        f"{torch_prefix}.weight": ("params", *path, "scale"),
        f"{torch_prefix}.bias": ("params", *path, "bias"),
        f"{torch_prefix}.running_mean": ("batch_stats", *path, "mean"),
        f"{torch_prefix}.running_var": ("batch_stats", *path, "var"),
    }


def _names(flat: Mapping[tuple[str, ...], Any]) -> dict[str, tuple[Any, ...]]:
    """torch name -> path in the Flax variables `flat`; an integer at its end is a specialist's
    row."""
    levels = len({path[2] for path in flat if path[2].startswith("down")})
    bias = flat.get(("params", "specialists", "conv2_bias"))
    names = _block("encoder.in_conv.conv_conv", ("backbone", "down0"))
    for i in range(1, levels):
        names |= _block(f"encoder.down{i}.maxpool_conv.1.conv_conv", ("backbone", f"down{i}"))
        names |= _conv(f"decoder.up{i}.conv1x1", ("backbone", f"up{i}_reduce"))
        names |= _block(f"decoder.up{i}.conv.conv_conv", ("backbone", f"up{i}"))
    if any(path[1] == "generalist" for path in flat):  # else it is prompted
        names |= _conv(GENERALIST, ("generalist", "conv"))
    for k in range(0 if bias is None else bias.shape[0]):
        prefix = f"decoder.projection_heads.{k}"
        for layer, own in (("0", "conv1"), ("3", "conv2")):
            for kind, name in (("weight", "kernel"), ("bias", "bias")):
                names[f"{prefix}.{layer}.{kind}"] = ("params", "specialists", f"{own}_{name}", k)
        for name, path in _norm(f"{prefix}.1", ("specialists", "bn")).items():
            names[name] = (*path, k)
    return names


def from_torch(state_dict: Mapping[str, np.ndarray], variables: Any, source: str) -> Any:
    """Returns `variables` ({'params', 'batch_stats'}) with the values of a torch state_dict; of
    what they hold besides, shapes are enough. A network without a generalist takes none.

    Raises:
      UserError: a name is missing or left over, or a shape differs; names `source`.
    """
    flat = dict(flax.traverse_util.flatten_dict(variables))
    heads = {path[2] for path in flat if path[:2] == ("params", "specialists")}
    if heads and ("conv1_kernel" not in heads or "hidden2_kernel" in heads):
        raise UserError(f"{source}: PyTorch's specialists have model.head_depth=1")
    names = _names(flat)
    given = {k for k in state_dict if not k.endswith("num_batches_tracked")}
    given -= {name for name in given - set(names) if name.startswith(f"{GENERALIST}.")}
    for problem, odd in (("lacks", set(names) - given), ("has unknown", given - set(names))):
        if odd:
            raise UserError(f"{source} {problem} {sorted(odd)[0]} ({len(odd)} such names)")
    loaded = {}
    for name, path in names.items():
        path, row = (path[:-1], path[-1]) if isinstance(path[-1], int) else (path, ...)
        value = np.asarray(state_dict[name])
        value = np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 3 else value
        whole = loaded.setdefault(path, np.empty(flat[path].shape, flat[path].dtype))
        target = whole[row]
        if target.shape != value.shape:
            raise UserError(
                f"{source}: {name} has shape {state_dict[name].shape}, which does not fit the "
                f"model's {target.shape}; check config.data.classes and config.model.channels"
            )
        whole[row] = value
    return flax.traverse_util.unflatten_dict(flat | loaded)


def to_torch(variables: Any) -> Arrays:
    """The torch state_dict of Flax variables, as numpy arrays."""
    flat = flax.traverse_util.flatten_dict(variables)
    state_dict = {}
    for name, path in _names(flat).items():
        path, row = (path[:-1], path[-1]) if isinstance(path[-1], int) else (path, ...)
        value = np.asarray(flat[path])[row]
        state_dict[name] = np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 3 else value
    return state_dict


def read(path: str) -> Arrays:
    """Reads a state_dict from `.npz` or `.safetensors`."""
    suffix = pathlib.Path(path).suffix
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        if suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise UserError(f"no weights at {path}") from None
    except Exception as error:
        raise UserError(f"can not read weights from {path}: {error}") from error
    raise UserError(f"{path}: weights must be .npz or .safetensors (pickles run code when opened)")
