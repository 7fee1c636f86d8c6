"""The optimisers that the oracle does not cover."""

import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.runtime.errors import UserError
from cgs_jax.training import optimizers, train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny


def test_sgd_by_hand():
    """Two steps with the options of the config: decay goes through the momentum."""
    fields = {"optimizer.lr": 0.1, "optimizer.momentum": 0.5, "optimizer.weight_decay": 0.1}
    optimizer, _ = optimizers.make_optimizer(tiny(**fields))
    params = {"w": jnp.array([2.0])}
    state = TrainState(jnp.zeros((), int), params, {}, optimizer.init(params), {})
    for gradient, expected in ((0.3, 1.95), (-0.1, 1.91602)):
        state = train_step.apply_gradients(optimizer, state, {"w": jnp.array([gradient])})
        np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)


def test_adamw_by_hand():
    """Two steps; kernels decay, biases, scales and positions do not. SGD is the default."""
    fields = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.5, "optimizer.lr": 0.1}
    fields |= {"optimizer.momentum": 0.5, "optimizer.momentum_squares": 0.99}
    config = tiny(**fields)
    optimizer, schedule = optimizers.make_optimizer(config)
    names = ("kernel", "bias", "scale", "pos_embedding", "conv2_kernel")
    params = {"layer": {name: jnp.array([2.0, -1.0]) for name in names}}
    state = TrainState(jnp.zeros((), int), params, {}, optimizer.init(params), {})
    w = {name: np.array([2.0, -1.0]) for name in names}
    m, v = 0, 0
    for t, g in enumerate((np.array([0.3, -4.0]), np.array([-0.1, 1.0])), 1):
        grads = {"layer": {name: jnp.asarray(g, jnp.float32) for name in names}}
        state = train_step.apply_gradients(optimizer, state, grads)
        m, v = 0.5 * m + 0.5 * g, 0.99 * v + 0.01 * g * g
        move = m / (1 - 0.5**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        lr = 0.1 * (1 - (t - 1) / 60) ** 0.9
        np.testing.assert_allclose(schedule(t - 1), lr, rtol=1e-6)
        for name in names:
            decay = 0.5 if name.endswith("kernel") else 0
            w[name] = w[name] - lr * (move + decay * w[name])
            np.testing.assert_allclose(state.params["layer"][name], w[name], rtol=1e-5)
    assert tiny().optimizer.name == "sgd"
    config.optimizer.name = "adam"
    with pytest.raises(UserError, match="unknown optimizer.name 'adam'; there are: adamw, sgd"):
        optimizers.make_optimizer(config)
