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

    def passes(self, params, state, views, key):
        image, label = views["labelled"]["image"], views["labelled"]["label"]
        outputs, model_state = self.forward(params, state.model_state, image, key)
        return base.Passes([base.Labelled(outputs, label)], [], model_state, state.extra)
