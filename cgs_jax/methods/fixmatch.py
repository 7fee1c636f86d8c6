"""FixMatch (Sohn et al., 2001.07685): confident labels of the weak view teach the strong view.

What the method intends: pixels below the threshold are ignored. (The SSL4MIS script labels them
background.) With the Dice loss beside the cross-entropy, as CGS has it, and its kind of ramp.
"""

import jax

from cgs_jax.methods import base


class Method(base.Method):
    """The student teaches itself."""

    def passes(self, params, state, views, key):
        k_weak, k_strong = jax.random.split(key)
        image = views["labelled"]["image"]
        unlabelled = views["unlabelled"]
        own, model_state = self.forward(
            jax.lax.stop_gradient(params), state.model_state, unlabelled["weak"], k_weak
        )
        labelled, strong, model_state = self.student(
            params, model_state, image, unlabelled["strong"], k_strong
        )
        pair = base.Pair(strong, own)
        return base.Passes([base.labelled(labelled, views)], [pair], model_state, state.extra)

    def unsupervised(self, pairs):
        ((student, teacher, *_),) = pairs
        ce, dice, sure = base.confident_loss(student, teacher, self.config.method.tau)
        return {"unsup/ce": ce, "unsup/dice": dice}, {"cover/sure": sure}
