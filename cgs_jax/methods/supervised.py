"""Labelled slices only: the baseline that every semi-supervised gain is measured against."""

from ml_collections import ConfigDict

from cgs_jax.methods import base


class Method(base.Method):
    """CE + Dice on the labelled stream; `config.method.specialists` adds them as auxiliary heads,
    the control that separates "more heads" from "unlabelled data"."""

    unlabelled = False

    def __init__(self, config: ConfigDict):
        self.specialists = config.method.specialists
        super().__init__(config)

    def loss(self, params, state, views, key):
        image, label = views["labelled"]["image"], views["labelled"]["label"]
        outputs, model_state = self.forward(params, state.model_state, image, key)
        terms = base.supervised_loss(outputs, label)
        loss = sum(terms.values())
        return loss, (model_state, state.extra, {"loss": loss, **terms})
