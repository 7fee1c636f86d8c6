"""Cross pseudo supervision (Chen et al., 2106.01226): two networks label for each other."""

import jax
import jax.numpy as jnp

from cgs_jax import losses
from cgs_jax.methods import base


class Method(base.Method):
    """Two networks that differ in their start only; the first predicts."""

    def init(self, key, image):
        pair = [super(Method, self).init(k, image)[:2] for k in jax.random.split(key)]
        # Copies: two that start from the same weights must not share buffers, for they are donated.
        params, model_state = zip(*jax.tree.map(jnp.copy, pair), strict=True)
        return params, model_state, {}

    def passes(self, params, state, views, key):
        image, label = views["labelled"]["image"], views["labelled"]["label"]
        weak = views["unlabelled"]["weak"]
        labelled, unlabelled, model_state = zip(
            *(
                self.student(own, stats, image, weak, k)
                for own, stats, k in zip(
                    params, state.model_state, jax.random.split(key), strict=True
                )
            ),
            strict=True,
        )
        teachers = jax.lax.stop_gradient(unlabelled[::-1])
        pairs = [base.Pair(*pair) for pair in zip(unlabelled, teachers, strict=True)]
        labelled = [base.Labelled(outputs, label) for outputs in labelled]
        return base.Passes(labelled, pairs, model_state, state.extra)

    def unsupervised(self, pairs, step):
        def ce(pair):
            label = jnp.argmax(pair.teacher.generalist, -1)
            return losses.segmentation_loss(pair.student.generalist, label)[0]

        return {"unsup/ce": sum(map(ce, pairs))}, {}

    def inference_variables(self, state):
        return state.params[0], state.model_state[0]
