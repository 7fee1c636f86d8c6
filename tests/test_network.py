"""Parts of the network against plain computations, and weights that it starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import base, pseudo_labels
from cgs_jax.models import packed, pieces, torch_weights, unet
from cgs_jax.models.heads import Specialists
from cgs_jax.models.network import build
from cgs_jax.runtime.devices import make_mesh
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny


@pytest.mark.parametrize("pack", [1, 2, 8])
def test_upsampling_is_corner_aligned_bilinear(pack):
    x = np.random.default_rng(0).normal(size=(2, 5, 16, 4)).astype(np.float32)
    expected = x
    for axis in (1, 2):
        n = expected.shape[axis]
        at = np.linspace(0, n - 1, 2 * n)
        expected = np.apply_along_axis(
            lambda v, at=at, n=n: np.interp(at, np.arange(n), v), axis, expected
        )
    upsampled = packed.upsample_2x(packed.pack_pixels(x, pack), pack, packed=True)
    np.testing.assert_allclose(packed.unpack_pixels(upsampled, 2 * pack), expected, atol=1e-6)
    if pack == 1:
        upsampled = packed.upsample_2x(jnp.asarray(x), 1, packed=False)
        np.testing.assert_allclose(upsampled, expected, atol=1e-6)


@pytest.mark.parametrize("pack", [1, 2, 8])
def test_max_pool(pack):
    x = np.random.default_rng(0).normal(size=(2, 4, 16, 3)).astype(np.float32)
    expected = x.reshape(2, 2, 2, 8, 2, 3).max((2, 4))
    pooled = packed.max_pool_2x2(packed.pack_pixels(x, pack), pack)
    np.testing.assert_array_equal(packed.unpack_pixels(pooled, max(pack // 2, 1)), expected)


@pytest.mark.parametrize("size", [1, 3])
def test_packed_convolution(size):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 16, 3)), rng.normal(size=(size, size, 3, 5))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    edge = size // 2
    wide = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (size, size), (1, 2))
    expected = np.einsum("bhwcyx,yxcd->bhwd", windows, kernel)
    for pack in (1, 2, 8):
        y = packed.conv(packed.pack_pixels(x, pack), kernel, pack)
        np.testing.assert_allclose(packed.unpack_pixels(y, pack), expected, atol=1e-4)


def test_packed_network_computes_the_same():
    """Outputs, statistics, losses and gradients, whatever the lanes, the groups of heads and the
    pieces of the batch that these are made in."""
    config = tiny(size=32)
    config.data.classes = tuple("abcde")
    config.model.update(channels=(4, 4, 8), dropout=(0.0, 0.0, 0.0))
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 1))
    label = jax.random.randint(jax.random.key(2), (2, 32, 32), 0, 6, jnp.uint8)
    results = []
    half = 5 * 32 * 32 * 4 * 4  # bytes of hidden maps of one image
    for lanes, group, bytes_ in ((1, 2, 10**9), (16, 1, 10**9), (1, 5, 10**9), (1, 2, half)):
        config.model.update(lanes=lanes, head_group=group, head_bytes=bytes_)
        network = build(config, specialists=True)
        variables = variables if results else jax.jit(network.init)(jax.random.key(1), image)  # noqa: F821

        def loss(params, network=network, variables=variables):
            variables = variables | {"params": params}
            outputs, state = network.apply(variables, image, train=True, mutable=["batch_stats"])
            terms = base.supervised_loss(base.Labelled(outputs, label))
            return sum(terms.values()), (outputs, state, terms)

        trained = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        (total, (train, state, terms)), grads = trained
        predict = jax.jit(network.apply)(variables, image)
        heads = [pseudo_labels.specialist_probs(x) for x in (train, predict)]
        generalists = train.generalist, predict.generalist
        results.append((total, state, terms, grads, heads, generalists))
    for others in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), others, results[0])


def test_pieces_need_less_memory_for_the_same():
    """Gradients by the batch, and by what all pieces share, of a sum that has wide maps inside."""

    def wide(x, weights):
        return {"values": jnp.tanh(x @ weights) @ weights.T, "sum": jnp.sum(x**2, (0, 1))[None]}

    def loss(x, weights, count):
        made = pieces.in_pieces(wide, count)(x, weights)
        return jnp.sum(made["values"] ** 3) + jnp.sum(made["sum"].sum(0) ** 2)

    rng, found = np.random.default_rng(0), []
    x, weights = (rng.normal(size=s).astype(np.float32) / 4 for s in ((6, 50, 8), (8, 512)))
    weights /= 20
    for count in (1, 4):  # of 2, 2, 1 and 1
        compiled = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2).lower(x, weights, count)
        compiled = compiled.compile()
        found.append((compiled(x, weights), compiled.memory_analysis().temp_size_in_bytes))
    (whole, most), (cut, least) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), cut, whole)
    assert least < most / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_compute_what_plain_layers_would(dtype):
    """The folded batch norm against one of hidden maps, of features with a large mean."""
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 4)) + 5
    heads = Specialists(2)
    variables = jax.jit(lambda key: heads.init(key, x, 1, True))(jax.random.key(1))
    apply = lambda v, x: heads.apply(v, x, 1, True, mutable=["batch_stats"])  # noqa: E731
    got, state = jax.jit(apply)(variables, x.astype(dtype))
    p = variables["params"]
    hidden = jnp.einsum("bhwi,kif->kbhwf", x, p["conv1_kernel"][:, 0, 0], precision="highest")
    mean, var = hidden.mean((1, 2, 3)), hidden.var((1, 2, 3))
    np.testing.assert_allclose(state["batch_stats"]["bn"]["mean"], 0.1 * mean, rtol=0.01)
    np.testing.assert_allclose(state["batch_stats"]["bn"]["var"], 0.9 + 0.1 * var, rtol=1e-3)
    hidden = (hidden - mean[:, None, None, None]) / jnp.sqrt(var + 1e-5)[:, None, None, None]
    hidden = jnp.maximum(hidden, 0.01 * hidden)
    wanted = jnp.stack([packed.conv(hidden[k], p["conv2_kernel"][k], 1) for k in range(2)], -2)
    assert np.abs(got[0] - wanted).max() < (1e-4 if dtype == "float32" else 0.05)


def test_dropout_drops_its_share_and_keeps_the_mean():
    drop = jax.jit(lambda key: unet.dropout(jnp.ones((4, 10, 64, 16)), 0.3, key))
    kept = np.asarray(drop(jax.random.key(0)))
    np.testing.assert_allclose((kept == 0).mean(), 77 / 256, atol=0.01)
    np.testing.assert_allclose(kept[kept > 0], 256 / 179, rtol=1e-6)
    rows = kept.transpose(1, 0, 2, 3).reshape(10, -1)  # four rows share a random word
    assert np.abs(np.corrcoef(rows) - np.eye(10)).max() < 0.1


def test_stacked_specialists_are_independent_heads():
    """Head k computes with its own row of parameters what a single head would."""
    network = build(tiny(), specialists=True)
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    variables = jax.jit(network.init)(jax.random.key(1), image)
    apply = jax.jit(network.apply)
    rows = variables["params"]["specialists"]["conv1_kernel"]
    assert np.abs(rows[0] - rows[1]).max() > 0.01
    (before,) = apply(variables, image).specialists
    kernel = variables["params"]["specialists"]["conv2_kernel"]
    variables["params"]["specialists"]["conv2_kernel"] = kernel.at[1].multiply(2)
    (after,) = apply(variables, image).specialists
    np.testing.assert_array_equal(before[..., 0, :], after[..., 0, :])
    assert np.abs(before[..., 1, :] - after[..., 1, :]).max() > 1e-4


def test_weights_with_another_class_count_are_refused():
    network = build(tiny(), specialists=True)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    weights = torch_weights.to_torch(variables)
    weights["decoder.out_conv.bias"] = np.zeros(7, np.float32)
    with pytest.raises(UserError, match=r"mine.npz: decoder.out_conv.bias has shape \(7,\)"):
        torch_weights.from_torch(weights, variables, "mine.npz")
    del weights["decoder.out_conv.bias"]
    with pytest.raises(UserError, match=r"mine.npz lacks decoder.out_conv.bias"):
        torch_weights.from_torch(weights, variables, "mine.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_training_starts_from_given_weights(tmp_path, suffix):
    config = tiny()
    network = build(config, specialists=True)
    variables = jax.jit(network.init)(jax.random.key(7), jnp.zeros((1, 16, 16, 1)))
    path, weights = tmp_path / f"weights{suffix}", torch_weights.to_torch(variables)
    if suffix == ".npz":
        np.savez(path, **weights)
    else:
        weights = {k: np.ascontiguousarray(v) for k, v in weights.items()}
        pytest.importorskip("safetensors.numpy").save_file(weights, path)
    config.model.weights = str(path)
    method = train_step.make_method(config)
    mesh = make_mesh(config)
    state = train_step.init_state(method, mesh)
    for tree in (state.params, state.extra["params"]):
        jax.tree.map(np.testing.assert_array_equal, tree, variables["params"])
    (tmp_path / "weights.pth").write_bytes(b"")
    config.model.weights = str(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="pickles run code"):
        train_step.init_state(method, mesh)


@pytest.mark.parametrize("with_head", [True, False])
def test_a_prompted_network_starts_from_a_file(with_head):
    """It has no generalist, so the file may have one or not."""
    image, config = jnp.zeros((1, 16, 16, 1)), tiny("versemi")
    given = jax.eval_shape(build(tiny(), specialists=False).init, jax.random.key(7), image)
    given = jax.tree.map(lambda x: np.full(x.shape, 0.25, x.dtype), given)
    weights = torch_weights.to_torch(given)
    if not with_head:
        weights = {name: x for name, x in weights.items() if "out_conv" not in name}
    network = train_step.make_method(config).network
    like = jax.eval_shape(network.init, jax.random.key(0), image)
    loaded = torch_weights.from_torch(weights, like, "mine.npz")
    for name, tree in given.items():
        jax.tree.map(np.testing.assert_array_equal, loaded[name]["backbone"], tree["backbone"])
    assert loaded["params"].keys() == like["params"].keys()
    assert torch_weights.to_torch(loaded).keys() == {x for x in weights if "out_conv" not in x}
    with pytest.raises(UserError, match=r"mine.npz has unknown more \(1 such"):
        torch_weights.from_torch(weights | {"more": np.zeros(1)}, like, "mine.npz")


def test_two_networks_from_one_file_differ(tmp_path):
    """Their backbones are that of the file, their heads are not."""
    config = tiny("cps", **{"model.weights": str(tmp_path / "weights.npz")})
    variables = jax.jit(build(config, False).init)(jax.random.key(7), jnp.zeros((1, 16, 16, 1)))
    np.savez(config.model.weights, **torch_weights.to_torch(variables))
    state = train_step.init_state(train_step.make_method(config), make_mesh(config))
    given = variables["params"]
    for network, stats in zip(state.params.values(), state.model_state.values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, network["backbone"], given["backbone"])
        jax.tree.map(np.testing.assert_array_equal, stats["batch_stats"], variables["batch_stats"])
    heads = [tree["generalist"]["conv"]["kernel"] for tree in (*state.params.values(), given)]
    for i in range(3):
        assert np.abs(heads[i] - heads[i - 1]).max() > 1e-3


def test_starting_weights_reach_every_network_of_a_state():
    """Two students and a teacher have them, each its own copy; momentum has not."""
    params, statistics = {"kernel": jnp.zeros(2)}, {"batch_stats": {"mean": jnp.zeros(2)}}
    both = {"first": params, "second": params}
    extra = {"teacher": {"params": params, "model_state": statistics}, "count": jnp.zeros(())}
    before = TrainState(jnp.zeros((), int), both, {"first": statistics}, both, extra)
    weights = {"kernel": np.ones(2)}, {"batch_stats": {"mean": np.full(2, 2.0)}}
    state = train_step.with_weights(before, *weights)
    networks = [*state.params.values(), state.extra["teacher"]["params"]]
    assert [network["kernel"].tolist() for network in networks] == [[1, 1]] * 3
    assert len({network["kernel"].unsafe_buffer_pointer() for network in networks}) == 3
    for found in (state.model_state["first"], state.extra["teacher"]["model_state"]):
        assert found["batch_stats"]["mean"].tolist() == [2, 2]
    assert state.opt_state["first"]["kernel"].tolist() == [0, 0]
    assert state.extra["count"] == 0
