"""Labelled slices only: the baseline that every semi-supervised gain is measured against.

With `config.method.jitter` and `config.method.cutmix` it has the augmentation of the
semi-supervised methods, too: what they gain beyond that comes from the unlabelled images.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cgs_jax.methods import augment, base


class Method(base.Method):
    """CE + Dice on the labelled stream; `config.method.specialists` adds them as auxiliary heads,
    the control that separates "more heads" from "unlabelled data"."""

    unlabelled = False

    def __init__(self, config: ConfigDict, specialists: bool = False):
        super().__init__(config, specialists or config.method.specialists)

    def views(self, batch, key):
        """As the base class; with probabilities of their own jittered, and CutMixed with the
        neighbour in the batch, label and all."""
        labelled = super().views(batch, key)["labelled"]
        *_, k_strong, k_keep = jax.random.split(key, 5)  # the base class has the first three
        image, label = labelled["image"], labelled["label"]
        if self.config.method.jitter:
            image = augment.strong(k_strong, image, self.config.augment)
        if self.config.method.cutmix:
            keep = augment.cutmix_keep(k_keep, *label.shape[:2], self.config.method.cutmix)
            image = base.cutmix(keep, image, base.rolled(image))
            label = jnp.where(keep, label, jnp.roll(label, 1, axis=0))
        return {"labelled": {"image": image, "label": label}}

    def passes(self, params, state, views, key):
        image, label = views["labelled"]["image"], views["labelled"]["label"]
        outputs, model_state = self.forward(params, state.model_state, image, key)
        return base.Passes([base.Labelled(outputs, label)], [], model_state, state.extra)
