"""Interpolation consistency training, ICT (Verma et al., 1903.03825).

Two unlabelled images are blended; what the student says of the blend agrees with the blend of what
the teacher says of either. As in SSL4MIS, but for the partners: each image with its neighbour.
"""

import jax
import jax.numpy as jnp

from cgs_jax.methods import base, batches, mean_teacher


class Method(base.WithTeacher):
    """The student predicts."""

    mixes = "unlabelled"

    def passes(self, params, state, views, key):
        k_student, k_teacher, k_share = jax.random.split(key, 3)
        image = views["labelled"]["image"]
        weak, alpha = views["unlabelled"]["weak"], self.config.method.alpha
        share = jax.random.beta(k_share, alpha, alpha, (len(weak),))
        blend = lambda own: _blend(share, own)  # noqa: E731
        teacher, extra = self.teacher(state, weak, k_teacher)
        teacher = jax.tree.map(
            lambda x: jnp.log(blend(jax.nn.softmax(x.astype(jnp.float32))) + 1e-10), teacher
        )
        labelled, blended, model_state = self.student(
            params, state.model_state, image, blend(weak), k_student
        )
        pair = base.Pair(blended, teacher)
        return base.Passes([base.labelled(labelled, views)], [pair], model_state, extra)

    def unsupervised(self, pairs):
        ((student, teacher, *_),) = pairs
        error = mean_teacher.squared_error(student.generalist, teacher.generalist)
        return {"unsup/mse": jnp.mean(error)}, {}


def _blend(share, own):
    share = share.reshape(-1, *[1] * (own.ndim - 1))
    return share * own + (1 - share) * batches.rolled(own)
