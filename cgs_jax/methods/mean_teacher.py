"""Mean teacher (Tarvainen and Valpola, 1703.01780): the student agrees with its moving average.

As SSL4MIS trains it: mean squared error of the softmaxes on the same weak view, with noise on the
teacher's input.
"""

import jax
import jax.numpy as jnp

from cgs_jax.methods import base


class Method(base.WithTeacher):
    """The student predicts."""

    def __init__(self, config, specialists=False):
        super().__init__(config, specialists)
        self.begin = base.steps_of(config, "begin")

    def passes(self, params, state, views, key):
        k_student, k_noise, k_teacher = jax.random.split(key, 3)
        image = views["labelled"]["image"]
        weak = views["unlabelled"]["weak"]
        teacher, extra = self.teacher(state, noisy(k_noise, weak), k_teacher)
        labelled, unlabelled, model_state = self.student(
            params, state.model_state, image, weak, k_student
        )
        pair = base.Pair(unlabelled, teacher)
        return base.Passes([base.labelled(labelled, views)], [pair], model_state, extra)

    def unsupervised(self, pairs):
        ((student, teacher, *_),) = pairs
        error = squared_error(student.generalist, teacher.generalist)
        return {"unsup/mse": jnp.mean(error)}, {}

    def weight(self, step):
        return super().weight(step) * (step >= self.begin)


def noisy(key: jax.Array, image: jax.Array) -> jax.Array:
    """Adds normal noise of deviation .1, cut at .2."""
    return image + jnp.clip(0.1 * jax.random.normal(key, image.shape), -0.2, 0.2)


def squared_error(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over the classes of the squared difference of the softmaxes: [B, *S]."""
    student, teacher = (jax.nn.softmax(x.astype(jnp.float32)) for x in (student, teacher))
    return jnp.mean((student - teacher) ** 2, -1)
