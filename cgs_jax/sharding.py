"""One mesh axis, 'data': batches are split over it, the state is on every device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cgs_jax.errors import UserError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices along 'data'; the compiler propagates shardings from the inputs."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


# Where the compiler's own choice is slower, by platform; measured by `cgs_jax.benchmark`.
COMPILER_OPTIONS = {
    # Large convolutions of YNNPACK run on one core: 8.1 s a step against 4.6 with Eigen's.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    # Packed maps fill the tiles; moving columns to the batch would only copy them.
    "tpu": {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    },
}


def jit(function: Callable, mesh: Mesh, **options: Any) -> Any:
    """`jax.jit` with the compiler options of the mesh's platform."""
    compiler_options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    return jax.jit(function, compiler_options=compiler_options, **options)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes of `tree`, to be sharded so."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This host's rows of a batch -> global arrays, split along their first axis."""

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(batched(mesh), x)

    return jax.tree.map(put, batch)


def check_divisible(mesh: Mesh, **sizes: int) -> None:
    """Raises UserError unless every named batch size divides by the number of devices."""
    for name, size in sizes.items():
        if size % mesh.size:
            raise UserError(f"{name}={size} does not divide by the {mesh.size} devices")
