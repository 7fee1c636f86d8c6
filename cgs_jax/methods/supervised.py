"""Labelled slices only: the baseline that every semi-supervised gain is measured against.

With `config.method.jitter` and `config.method.cutmix` it has the augmentation of the
semi-supervised methods, too: what they gain beyond that comes from unlabelled images, or from a
teacher that averages.
"""

import jax
from ml_collections import ConfigDict

from cgs_jax.methods import augment, base, batches


class Method(base.Method):
    """CE + Dice on the labelled stream; `config.method.specialists` adds them as auxiliary heads,
    the control that separates "more heads" from "unlabelled data"."""

    unlabelled = False
    mixes = "labelled"

    def __init__(self, config: ConfigDict, specialists: bool = False):
        super().__init__(config, specialists or config.method.specialists)

    def views(self, batch, key):
        """As the base class; with probabilities of their own jittered, and CutMixed with the
        neighbour in the batch, label and all."""
        labelled = super().views(batch, key)["labelled"]
        *_, k_strong, k_keep = jax.random.split(key, 5)  # the base class has the first three
        if self.config.method.jitter:
            labelled["image"] = augment.strong(k_strong, labelled["image"], self.config.augment)
        if self.config.method.cutmix:
            shape = labelled["label"].shape
            keep = augment.cutmix_keep(k_keep, shape, self.config.method.cutmix)
            labelled = batches.cutmix(keep, labelled, batches.rolled(labelled))
        return {"labelled": labelled}

    def passes(self, params, state, views, key):
        image = views["labelled"]["image"]
        outputs, model_state = self.forward(params, state.model_state, image, key)
        return base.Passes([base.labelled(outputs, views)], [], model_state, state.extra)
