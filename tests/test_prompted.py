"""Prompted heads against a loop over images and prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.models import packed
from cgs_jax.models.prompted import Prompted


@pytest.mark.parametrize("pack", [1, 2])
def test_prompted_heads_are_what_a_loop_computes(pack):
    """Batch norm of the batch, its running averages, and for each image and prompt a network of
    its own."""
    rng = np.random.default_rng(0)
    bottleneck, features = rng.normal(2, 3, (2, 2, 2, 6)), rng.normal(1, 2, (2, 4, 4, 3))
    maps = [(packed.pack_pixels(jnp.float32(x), pack), pack) for x in (bottleneck, features)]
    heads = Prompted(2)
    shapes = jax.eval_shape(lambda: heads.init(jax.random.key(0), *maps, train=True))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    variables = {"params": jax.tree.map(draw, shapes["params"])}
    variables["batch_stats"] = jax.tree.map(jnp.zeros_like, shapes["batch_stats"])
    apply = jax.jit(lambda v: heads.apply(v, *maps, train=True, mutable=["batch_stats"]))
    logits, state = apply(variables)
    p = jax.tree.map(np.asarray, variables["params"])

    def activated(x, name):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        running = state["batch_stats"][name]
        np.testing.assert_allclose(running["mean"], 0.1 * mean, rtol=1e-4)
        np.testing.assert_allclose(running["var"], 0.1 * var, rtol=1e-4)
        normed = (x - mean) / np.sqrt(var + 1e-5) * p[name]["scale"] + p[name]["bias"]
        return np.maximum(normed, 0)

    context = activated(bottleneck, "bottleneck_bn").mean((1, 2))
    x = activated(features, "features_bn") @ p["reduce"]["kernel"][0, 0] + p["reduce"]["bias"]
    assert logits.shape == (2, 4, 4, 3, 2)
    for i in range(2):
        for k in range(3):
            read = np.concatenate([context[i], 6**0.5 * np.eye(3)[k]])
            made = read @ p["controller_kernel"] + p["controller_bias"]
            w1, b1, w2, b2, w3, b3 = np.split(made, np.cumsum([64, 8, 64, 8, 16]))
            y = np.maximum(x[i] @ w1.reshape(8, 8) + b1, 0)
            y = np.maximum(y @ w2.reshape(8, 8) + b2, 0)
            y = y @ w3.reshape(8, 2) + b3
            np.testing.assert_allclose(
                logits[i, :, :, k], y, rtol=1e-3, atol=1e-3 * np.abs(y).max()
            )


def test_size_of_the_controller():
    """256 channels at the bottleneck, four classes and the synthetic task; nothing else is there
    but a convolution, two batch norms and their statistics."""
    maps = (jnp.zeros((1, 2, 2, 256)), 1), (jnp.zeros((1, 32, 32, 16)), 1)
    init = lambda: Prompted(4).init(jax.random.key(0), *maps, train=False)  # noqa: E731
    params = jax.eval_shape(init)["params"]
    assert params["controller_kernel"].shape == (256 + 4 + 1, 2 * (8 * 8 + 8) + (8 * 2 + 2))
    assert params["controller_bias"].shape == (162,)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == 261 * 162 + 162 + 16 * 8 + 8 + 2 * 256 + 2 * 16


def test_prompts_are_not_drowned_by_the_image():
    """A fresh head asks other things of the same pixel at least as much by its prompt as by its
    image."""
    keys = jax.random.split(jax.random.key(0), 3)
    maps = jax.random.normal(keys[0], (8, 2, 2, 256)), jnp.ones((8, 1, 1, 16))
    heads = Prompted(7)
    variables = jax.jit(lambda: heads.init(keys[1], *[(x, 1) for x in maps], train=False))()
    logits = heads.apply(variables, *[(x, 1) for x in maps], train=False)[:, 0, 0, :, 1]
    by_image, by_prompt = np.std(logits, 0).mean(), np.std(logits, 1).mean()
    assert by_prompt > by_image > 0
