"""How much each organ takes part in training, with and without specialists.

The claim behind specialists (Wang et al., IEEE TMI 2025, figure 4): with K organs, shares come
closer to 1/K, |p' - 1/K| <= |p - 1/K|. Here it is measured on labelled slices of a run:

- supervision: the share of an organ's pixels among those of all organs, p = n_k / n. To each
  specialist all n of them are examples for or against its own organ, so all specialists have 1/K;
  generalist and mean of the specialists weigh alike in the loss, so p' = (p + 1/K) / 2, which obeys
  by construction.
- gradient: the share of an organ's pixels in the absolute gradient of the supervised loss (CE and
  Dice) at the features that all heads share; of the generalist alone, and of all heads.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from cgs_jax.data import tasks
from cgs_jax.data.prepared import Prepared
from cgs_jax.methods import augment, base
from cgs_jax.methods.base import Method
from cgs_jax.models import packed
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.train_state import TrainState


def participation(
    method: Method, state: TrainState, prepared: Prepared, slices: int = 32
) -> pd.DataFrame:
    """A line an organ and measure ('supervision', 'gradient'): shares 'without' and 'with'
    specialists, in training mode on up to `slices` labelled slices.

    Raises:
      UserError: the run has no generalist beside specialists.
    """
    if not method.specialists or method.network.prompts:
        raise UserError(f"{method.config.method.name} has no generalist beside specialists")
    data = method.config.data
    if data.partial or data.depth or any(own.spacing for own in tasks.members(data).values()):
        raise UserError("shares of organs are measured on whole slices with all organs annotated")
    rows = prepared.rows(prepared.splits.labelled)
    rows = rows[np.linspace(0, len(rows) - 1, min(slices, len(rows))).round().astype(int)]
    image, label = augment.to_image(prepared.images(rows)), jnp.asarray(prepared.labels(rows))
    variables = method.labelling_variables(state)
    found = jax.jit(gradients, static_argnums=0)(method, variables, image, label)
    organs = method.config.data.classes
    pixels = np.array([np.sum(label == k) for k in range(1, len(organs) + 1)])
    supervision = pixels / pixels.sum()
    shares = {"supervision": (supervision, (supervision + 1 / len(organs)) / 2)}
    shares["gradient"] = tuple(by_organ(np.asarray(g), label, organs) for g in found)
    return pd.DataFrame(
        [
            {"organ": organ, "measure": measure, "without": float(a), "with": float(b)}
            for measure, pair in shares.items()
            for organ, a, b in zip(organs, *pair, strict=True)
        ]
    )


def gradients(
    method: Method, variables: Any, image: jax.Array, label: jax.Array
) -> list[jax.Array]:
    """Absolute gradient [B, H, W] of the supervised loss at the shared features: of the loss of the
    generalist, and of that of all heads."""

    def loss(added, heads):
        def add(next_function, args, kwargs, context):
            maps = next_function(*args, **kwargs)
            if (context.module.name, context.method_name) != ("backbone", "__call__"):
                return maps
            *coarse, (features, pack) = maps
            return [*coarse, (features + packed.pack_pixels(added, pack), pack)]

        with nn.intercept_methods(add):
            outputs, _ = method.forward(*variables, image, jax.random.key(0))
        terms = base.supervised_loss(base.Labelled(outputs, label))
        return sum(value for name, value in terms.items() if heads in name)

    width = variables[0]["generalist"]["conv"]["kernel"].shape[2]
    nothing = jnp.zeros((*label.shape, width))
    return [jnp.sum(jnp.abs(jax.grad(loss)(nothing, heads)), -1) for heads in ("generalist", "")]


def by_organ(gradient: np.ndarray, label: jax.Array, organs: tuple[str, ...]) -> np.ndarray:
    """Shares of the organs in a gradient [B, H, W]."""
    sums = np.array([gradient[label == k].sum() for k in range(1, len(organs) + 1)])
    return sums / sums.sum()


def keeps_bound(shares: pd.DataFrame) -> pd.Series:
    """Whether |with - 1/K| <= |without - 1/K|, of every line of `participation`."""
    fair = 1 / shares.organ.nunique()
    return (shares["with"] - fair).abs() <= (shares["without"] - fair).abs() + 1e-9
