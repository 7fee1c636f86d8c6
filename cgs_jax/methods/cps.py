"""Cross pseudo supervision (Chen et al., 2106.01226): two networks label for each other."""

import jax
import jax.numpy as jnp

from cgs_jax.methods import base, losses

NAMES = ("first", "second")


class Method(base.Method):
    """Two networks that differ in their start, and their dropout, only; the first predicts. From
    weights in a file both begin with the same backbone, and each with heads of its own."""

    loads_heads = False

    def init(self, key, image):
        keys = dict(zip(NAMES, jax.random.split(key), strict=True))
        both = {name: super(Method, self).init(k, image) for name, k in keys.items()}
        params, model_state = ({name: both[name][i] for name in NAMES} for i in (0, 1))
        # Copies: two that start from the same weights must not share buffers, for they are donated.
        return jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, model_state), {}

    def passes(self, params, state, views, key):
        image = views["labelled"]["image"]
        weak, labelled, unlabelled, model_state = views["unlabelled"]["weak"], [], [], {}
        for name, k in zip(NAMES, jax.random.split(key), strict=True):
            outputs, own, model_state[name] = self.student(
                params[name], state.model_state[name], image, weak, k
            )
            labelled.append(base.labelled(outputs, views))
            unlabelled.append(own)
        pairs = map(base.Pair, unlabelled, jax.lax.stop_gradient(unlabelled[::-1]))
        return base.Passes(labelled, list(pairs), model_state, state.extra)

    def unsupervised(self, pairs):
        def ce(pair):
            label = jnp.argmax(pair.teacher.generalist, -1)
            return losses.segmentation_loss(pair.student.generalist, label)[0]

        return {"unsup/ce": sum(map(ce, pairs))}, {}

    def inference_variables(self, state):
        return state.params["first"], state.model_state["first"]

    def with_inference_state(self, state, model_state):
        return state.replace(model_state=state.model_state | {"first": model_state})

    labelling_variables = inference_variables
