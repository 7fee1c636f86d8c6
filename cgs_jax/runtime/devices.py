"""The mesh: 'data' splits batches, 'space' splits the rows of images; the state is on every device,
unless `mesh.shard_params` splits it, too.

The compiler propagates shardings from the inputs and exchanges the rows that convolutions need from
their neighbours.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cgs_jax.runtime.by_name import load_by_name
from cgs_jax.runtime.errors import UserError


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over the devices of all processes, or over `devices`.

    Raises:
      UserError: the axes do not make up the devices, or batches or images do not divide by them.
    """
    count = jax.device_count() if devices is None else len(devices)
    data, space = config.mesh.data, config.mesh.space
    if data == -1 and space > 0:
        data = count // space
    if data < 1 or data * space != count:
        raise UserError(
            f"mesh.data={config.mesh.data} times mesh.space={space} must be the {count} devices"
        )
    smallest = min(p or config.data.size for p in (config.data.patch, *config.data.grow_to))
    backbone = load_by_name("cgs_jax.models", config.model.name, "model")
    coarsest = smallest // backbone.stride(config.model)

    def problem(data, space):
        for name, size in config.batch.items():
            if size % data:
                return f"batch.{name}={size} does not divide by mesh.data, {data} devices"
        if coarsest % space:
            rows = f"the {coarsest} rows of the coarsest feature map"
            return f"mesh.space={space} does not divide {rows}"
        return ""

    if found := problem(data, space):
        most = 1 if config.data.depth else count  # only rows of slices are split
        spaces = (space for space in range(1, most + 1) if count % space == 0)
        space = next((space for space in spaces if not problem(count // space, space)), None)
        fit = (
            f"--config.mesh.data={count // space} --config.mesh.space={space} fit" if space else ""
        )
        raise UserError(f"{found}; {fit or 'use fewer devices, or another batch'}")
    return _mesh(data, space, devices)


def local_mesh() -> Mesh:
    """The devices of this process along 'data': each process predicts by itself."""
    return _mesh(jax.local_device_count(), 1, jax.local_devices())


def _mesh(data, space, devices):
    shape, names = (data, space), ("data", "space")
    auto = (AxisType.Auto, AxisType.Auto)  # so the compiler propagates shardings
    if devices and any(getattr(device, "core_on_chip", 0) for device in devices):
        # jax.make_mesh knows no chips of several cores; compiling for v4 and v5p gives such.
        return Mesh(np.reshape(devices, shape), names, axis_types=auto)
    return jax.make_mesh(shape, names, axis_types=auto, devices=devices)


# Where the compiler's own choice is slower, by platform; measured by `cgs_jax.benchmark`.
COMPILER_OPTIONS = {
    "cpu": {
        # Large convolutions of YNNPACK run on one core: 8.1 s a step against 4.6 with Eigen's.
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        # Level 3 takes 1.6 times as long to compile, and makes no faster steps.
        "xla_backend_optimization_level": 2,
    },
    # Packed maps fill the tiles; moving columns to the batch would only copy them.
    "tpu": {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    },
}


# Of what runs once: random weights take 25 s of processor time to compile at level 3, 4 at level 0.
COMPILER_OPTIONS_ONCE = {"cpu": {"xla_backend_optimization_level": 0}}


def jit(function: Callable, mesh: Mesh, once: bool = False, **options: Any) -> Any:
    """`jax.jit` with the compiler options of the mesh's platform, but for those that XLA_FLAGS has;
    of what runs `once`, with those that compile quickly."""
    known = COMPILER_OPTIONS_ONCE if once else COMPILER_OPTIONS
    chosen = known.get(mesh.devices.flat[0].platform, {})
    if not once:
        flags = os.environ.get("XLA_FLAGS", "")
        chosen = {name: value for name, value in chosen.items() if name not in flags}
    return jax.jit(function, compiler_options=chosen, **options)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis is split over 'data'."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_rows(mesh: Mesh, images: Any) -> Any:
    """Inside jit: splits every [B, H, ...] of a tree over 'data' and 'space', and what has no rows
    over 'data'."""

    def split(x):
        axes = ("data", "space") if x.ndim > 1 and x.shape[1] > 1 else ("data",)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(split, images)


def of_state(mesh: Mesh, state: Any, threshold: int) -> Any:
    """Shardings of a state: on every device whole, but arrays of at least `threshold` values are
    split over 'data' along their longest axis that divides; 0 splits none."""

    def of(x: Any) -> NamedSharding:
        parts: list[str | None] = [None] * x.ndim
        axes = [i for i, n in enumerate(x.shape) if n % mesh.shape["data"] == 0]
        if axes and 0 < threshold <= x.size:
            parts[max(axes, key=lambda i: x.shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree.map(of, state)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes of `tree` with `shardings`: a tree like it, or one for all."""
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(shape, tree, jax.tree.broadcast(shardings, tree))


def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold."""
    mine = _mine(mesh)
    return np.arange(batch).reshape(len(mine), -1)[mine].ravel()


def _mine(mesh):
    """Which places along 'data' have a device of this process."""
    return np.isin(mesh.devices, mesh.local_devices).any(axis=1)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This process's rows of a batch -> global arrays, split along their first axis."""
    mine = _mine(mesh)

    def put(x: np.ndarray) -> jax.Array:
        # The global shape is given, for jax can not infer it on every mesh.
        shape = (len(x) * len(mine) // mine.sum(), *x.shape[1:])
        return jax.make_array_from_process_local_data(batched(mesh), x, shape)

    return jax.tree.map(put, batch)


def localise(mesh: Mesh, tree: Any) -> Any:
    """Global arrays -> the same on the devices of `mesh`, the local one; each whole."""

    def whole(x: jax.Array) -> jax.Array:
        if not x.is_fully_replicated:
            x = jax.device_put(x, replicated(x.sharding.mesh))
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, replicated(mesh), parts)

    return jax.tree.map(whole, tree)
