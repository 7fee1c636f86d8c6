"""How good pseudo-labels are: measured on training cases whose labels were withheld.

Nothing here reaches the training or the choice of a checkpoint.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cgs_jax.data import tasks
from cgs_jax.data.grid import Grid
from cgs_jax.data.prepared import Prepared
from cgs_jax.data.volume import NO_LABEL
from cgs_jax.methods import augment, pseudo_labels
from cgs_jax.methods.base import Method
from cgs_jax.models.network import Outputs
from cgs_jax.runtime import devices
from cgs_jax.scoring import summaries
from cgs_jax.training.train_state import TrainState


def sources(outputs: Outputs, tau: float) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Labels and where they teach, [B, *S] each: of the generalist where it is surer than `tau`,
    and of the merged specialists everywhere, where IHED finds no contradiction, and where the
    generalist agrees."""
    if outputs.specialists is None:
        return {"generalist": pseudo_labels.confident(outputs.generalist, tau)}
    pseudo = pseudo_labels.from_teacher(outputs, tau)
    merged = pseudo.specialists
    return {
        "generalist": (pseudo.generalist, pseudo.confident),
        "specialists": (merged, jnp.ones_like(pseudo.consistent)),
        "ihed": (merged, pseudo.consistent),
        "consensus": (merged, merged == pseudo.generalist),
    }


def counts(label: jax.Array, mask: jax.Array, truth: jax.Array, num_targets: int) -> jax.Array:
    """Four numbers of pixels for every target, int32 [4, K]: those that are taught as the target;
    of these, those that are the target; those that are the target; and of these, those that are
    taught as anything.

    `label`, `mask` and `truth` are [B, H, W]; pixels outside of `mask` are not taught.
    """
    k = jnp.arange(1, num_targets + 1)
    taught = (label[..., None] == k) & mask[..., None]
    there = truth[..., None] == k
    sums = (taught, taught & there, there, there & mask[..., None])
    return jnp.stack([jnp.sum(x, (0, 1, 2), dtype=jnp.int32) for x in sums])


def make_measure(method: Method, prepared: Prepared) -> Callable[[TrainState], dict[str, float]]:
    """state -> 'pseudo/SOURCE/precision' and '.../coverage' (%), and both by organ.

    Precision: of the pixels taught as the organ those that are. Coverage: of the organ's pixels
    those that teach anything. Measured in evaluation mode on `pseudo_slices` slices, spread
    evenly over those unlabelled training cases that have labels of all organs; {} where there are
    none, or where images have many shapes (`data.spacing`, `data.depth`). Masks and label cleaning
    of a method's own (UA-MT, BCP) are not applied, and one without `tau` counts as sure everywhere.
    """
    config = method.config
    withheld = set(prepared.splits.train) - set(prepared.splits.labelled)
    every = set(config.data.classes)
    withheld = {case for case in withheld if set(prepared.organs(case)) == every}
    known = prepared.rows(filter(prepared.has_label, withheld))
    grids = {Grid.of(own) for own in tasks.members(config.data).values()}
    many_shapes = len(grids) > 1 or any(grid.pixel for grid in grids) or config.data.depth
    if many_shapes or not (len(known) and method.unlabelled and config.pseudo_slices):
        return lambda state: {}
    spread = np.linspace(0, len(known) - 1, min(config.pseudo_slices, len(known)))
    rows = known[spread.round().astype(int)]
    mesh, tau = devices.local_mesh(), config.get("cgs", config.method).get("tau", 0.0)
    size = -(-min(config.eval_batch, len(rows)) // mesh.size) * mesh.size

    def measure(state, image, truth):
        params, model_state = method.labelling_variables(state)
        variables = {"params": params, **model_state}
        outputs = method.network.apply(variables, augment.to_image(image))
        # Padding counts nowhere: it is no organ, and taught as none.
        real = truth != NO_LABEL
        return {
            name: counts(label, mask & real, truth, method.num_targets)
            for name, (label, mask) in sources(outputs, tau).items()
        }

    compiled = devices.jit(measure, mesh)

    def run(state):
        state, total = devices.localise(mesh, state.replace(opt_state=None)), {}
        for some in (rows[i : i + size] for i in range(0, len(rows), size)):
            pad = ((0, size - len(some)), (0, 0), (0, 0))
            batch = (
                np.pad(prepared.images(some), (*pad, (0, 0))),
                np.pad(prepared.labels(some), pad, constant_values=NO_LABEL),
            )
            for name, part in compiled(state, *devices.put_batch(mesh, batch)).items():
                total[name] = total.get(name, 0) + np.asarray(part)
        return shares(total, config.data.classes)

    return run


def shares(total: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, float]:
    """Precision and coverage in % of `counts` by source; nan is a share of nothing."""
    scores = {}
    for name, (taught, right, there, covered) in total.items():
        for what, part, whole in (("precision", right, taught), ("coverage", covered, there)):
            share = 100 * np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
            scores |= {
                f"pseudo/{name}/{what}/{c}": float(x) for c, x in zip(classes, share, strict=True)
            }
            scores[f"pseudo/{name}/{what}"] = summaries.mean(share)
    return scores
