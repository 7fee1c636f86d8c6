"""Uncertainty-aware mean teacher (Yu et al., 1907.07034): agreement where the teacher is sure.

Its uncertainty is the entropy of the mean of several noisy passes with dropout. The threshold rises
from 3/4 to all of the largest entropy, ln C; SSL4MIS keeps ln 2, that of two classes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cgs_jax.methods import base, losses, mean_teacher


class Method(mean_teacher.Method):
    """Mean teacher with a mask."""

    def passes(self, params, state, views, key):
        k_passes, k_draws = jax.random.split(key)
        passes = super().passes(params, state, views, k_passes)

        def draw(total, key):
            k_noise, k_teacher = jax.random.split(key)
            image = mean_teacher.noisy(k_noise, views["unlabelled"]["weak"])
            outputs, _ = self.teacher(state, image, k_teacher)
            return total + jax.nn.softmax(outputs.generalist.astype(jnp.float32)), None

        ((student, teacher, *_),) = passes.pairs
        keys = jax.random.split(k_draws, self.config.method.samples)
        total, _ = jax.lax.scan(draw, jnp.zeros(teacher.generalist.shape), keys)
        mean = total / len(keys)
        entropy = -jnp.sum(mean * jnp.log(mean + 1e-6), -1)
        share = losses.gaussian_ramp(state.step, self.config.total_steps, 0.25) + 0.75
        sure = entropy < share * np.log(mean.shape[-1])
        return passes._replace(pairs=[base.Pair(student, teacher, sure)])

    def unsupervised(self, pairs):
        ((student, teacher, sure, _),) = pairs
        error = mean_teacher.squared_error(student.generalist, teacher.generalist)
        mean = jnp.sum(error * sure) / (jnp.sum(sure) + 1e-16)
        return {"unsup/mse": mean}, {"cover/sure": jnp.mean(sure)}
