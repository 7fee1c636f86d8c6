"""Cross pseudo supervision (Chen et al., 2106.01226): two networks label for each other.

As in SSL4MIS both see one weak view. With `config.method.cutmix` it is the paper's variant with
CutMix: each labels the whole images, and learns what the other's labels, mixed alike, say of mixed
ones. `config.method.jitter` makes these the strong views, as in the methods that came after it.
"""

import jax
import jax.numpy as jnp

from cgs_jax.methods import augment, base, batches, losses
from cgs_jax.methods.two_networks import NAMES, TwoNetworks


class Method(TwoNetworks):
    """Hard labels of all pixels, without a threshold."""

    mixes = "unlabelled"

    def views(self, batch, key):
        """As the base class, with CutMix also its boxes 'keep'."""
        views = super().views(batch, key)
        if self.config.method.cutmix:
            *_, k_keep = jax.random.split(key, 4)  # the base class has the first three
            shape = views["unlabelled"]["weak"].shape[:-1]
            views["keep"] = augment.cutmix_keep(k_keep, shape, self.config.method.cutmix)
        return views

    def passes(self, params, state, views, key):
        image, unlabelled = views["labelled"]["image"], views["unlabelled"]
        weak, seen, options = unlabelled["weak"], unlabelled["weak"], self.config.method
        if options.jitter:
            seen = unlabelled["strong"]
        if options.cutmix:
            seen = batches.cutmix(views["keep"], seen, batches.rolled(seen))
        apart = options.jitter or options.cutmix  # others are learnt from than are labelled
        labelled, students, teachers, model_state = [], [], [], {}
        for name, k in zip(NAMES, jax.random.split(key), strict=True):
            own, network = state.model_state[name], params[name]
            if apart:
                k_label, k = jax.random.split(k)
                found, own = self.forward(network, own, weak, k_label)
            outputs, student, model_state[name] = self.student(network, own, image, seen, k)
            found = found if apart else student
            if options.cutmix:
                found = batches.cutmix(views["keep"], found, batches.rolled(found))
            labelled.append(base.labelled(outputs, views))
            students.append(student)
            teachers.append(jax.lax.stop_gradient(found))
        pairs = map(base.Pair, students, teachers[::-1])
        return base.Passes(labelled, list(pairs), model_state, state.extra)

    def unsupervised(self, pairs):
        def ce(pair):
            label = jnp.argmax(pair.teacher.generalist, -1)
            return losses.segmentation_loss(pair.student.generalist, label)[0]

        return {"unsup/ce": sum(map(ce, pairs))}, {}
