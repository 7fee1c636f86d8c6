"""One mesh axis, 'data': batches are split over it, the state is on every device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cgs_jax.errors import UserError


def make_mesh() -> Mesh:
    """All devices along 'data'; the compiler propagates shardings from the inputs."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This host's rows of a batch -> global arrays, split along their first axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def check_divisible(mesh: Mesh, **sizes: int) -> None:
    """Raises UserError unless every named batch size divides by the number of devices."""
    for name, size in sizes.items():
        if size % mesh.size:
            raise UserError(f"{name}={size} does not divide by the {mesh.size} devices")
