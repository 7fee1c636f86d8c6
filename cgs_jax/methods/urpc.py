"""Uncertainty rectified pyramid consistency, URPC (Luo et al., 2012.07042).

Heads at every scale of the decoder, each on a map perturbed in its own way, agree with their mean;
a scale that is far from the mean at a pixel weighs less there.
"""

import jax
import jax.numpy as jnp

from cgs_jax.methods import base
from cgs_jax.models.network import backbone
from cgs_jax.runtime.errors import UserError


class Method(base.Method):
    """The student alone; its head at full resolution predicts, and teaches what CGS adds."""

    heads = {"pyramid": True}

    def __init__(self, config, specialists=False):
        super().__init__(config, specialists)
        if backbone(config).levels(config.model) < 3:
            raise UserError(f"urpc: the model, {config.model.name}, needs at least 3 levels")

    def passes(self, params, state, views, key):
        image = views["labelled"]["image"]
        weak = views["unlabelled"]["weak"]
        labelled, unlabelled, model_state = self.student(
            params, state.model_state, image, weak, key
        )
        pair = base.Pair(unlabelled, jax.lax.stop_gradient(unlabelled))
        return base.Passes([base.labelled(labelled, views)], [pair], model_state, state.extra)

    def unsupervised(self, pairs):
        ((student, *_),) = pairs
        log_probs = jax.nn.log_softmax(base.scales(student).astype(jnp.float32))
        mean = jnp.mean(jnp.exp(log_probs), -2, keepdims=True)
        variance = jnp.sum(mean * (jnp.log(mean + 1e-10) - log_probs), -1)  # [B, *S, scales]
        weight = jnp.exp(-variance)
        error = jnp.mean((mean - jnp.exp(log_probs)) ** 2, -1)
        pixels = tuple(range(weight.ndim - 1))
        rectified = jnp.mean(error * weight, pixels) / (jnp.mean(weight, pixels) + 1e-8)
        return {"unsup/mse": jnp.mean(rectified), "unsup/variance": jnp.mean(variance)}, {}
