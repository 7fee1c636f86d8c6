"""What methods share that train two networks of one structure at once."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cgs_jax.methods import base
from cgs_jax.runtime.errors import check_choice

NAMES = ("first", "second")


class TwoNetworks(base.Method):
    """Networks that differ in their start, and their dropout, only. From weights in a file both
    begin with the same backbone, and each with heads of its own.

    The first predicts, or with `config.method.predicts` 'mean' the mean of both.
    """

    loads_heads = False

    def __init__(self, config: ConfigDict, specialists: bool = False):
        super().__init__(config, specialists)
        check_choice("method.predicts", config.method.predicts, ("first", "mean"))
        self._both_predict = config.method.predicts == "mean"

    def init(self, key, image):
        keys = dict(zip(NAMES, jax.random.split(key), strict=True))
        both = {name: super(TwoNetworks, self).init(k, image) for name, k in keys.items()}
        params, model_state = ({name: both[name][i] for name in NAMES} for i in (0, 1))
        # Copies: two that start from the same weights must not share buffers, for they are donated.
        return jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, model_state), {}

    def predict(self, state, image, members=None):
        if not self._both_predict:
            return super().predict(state, image, members)
        total = 0
        for name in NAMES:
            alone = state.replace(params=state.params[name], model_state=state.model_state[name])
            total += super().predict(alone, image, members)
        return total / len(NAMES)

    def inference_variables(self, state):
        """Those of the first network, or of both by name."""
        return (state.params, state.model_state) if self._both_predict else _first(state)

    def with_inference_state(self, state, model_state):
        if not self._both_predict:
            model_state = state.model_state | {"first": model_state}
        return state.replace(model_state=model_state)

    def statistics(self, params, model_state, image, key):
        alone = super().statistics
        if not self._both_predict:
            return alone(params, model_state, image, key)
        return {name: alone(params[name], model_state[name], image, key) for name in NAMES}

    def labelling_variables(self, state):
        """Those of the first network."""
        return _first(state)


def _first(state):
    return state.params["first"], state.model_state["first"]
