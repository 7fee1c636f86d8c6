"""Losses, masks and network parts against numbers made by hand, and steps that learn."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import base, cgs, losses, pseudo_labels
from cgs_jax.models import packed, pieces, torch_weights, unet
from cgs_jax.models.heads import Specialists
from cgs_jax.models.network import Outputs, build
from cgs_jax.runtime.devices import make_mesh
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny, tiny_batch


def heads_first(x):
    return np.moveaxis(np.asarray(x), -1, 0)


def test_losses_by_hand():
    # one image of two pixels, two classes: p = (.8, .2) with label 0, p = (.4, .6) with label 1
    logits = jnp.log(jnp.array([[[[0.8, 0.2], [0.4, 0.6]]]]))
    labels = jnp.array([[[0, 1]]])
    ce, dice = losses.segmentation_loss(logits, labels)
    assert ce == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2, abs=1e-6)
    per_class = [1 - 2 * 0.8 / (0.8**2 + 0.4**2 + 1), 1 - 2 * 0.6 / (0.2**2 + 0.6**2 + 1)]
    assert dice == pytest.approx(np.mean(per_class), abs=1e-6)
    # masking the second pixel: CE still over all pixels, class 1 keeps only its false positive
    ce, dice = losses.segmentation_loss(logits, labels, jnp.array([[[1, 0]]]))
    assert ce == pytest.approx(-np.log(0.8) / 2, abs=1e-6)
    assert dice == pytest.approx((1 - 1.6 / 1.64 + 1) / 2, abs=1e-6)
    nothing = losses.segmentation_loss(logits, labels, jnp.zeros((1, 1, 2)))
    assert nothing == (0, 0)


def test_masked_pixels_have_no_gradient():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    labels = jax.random.randint(jax.random.key(1), (2, 4, 4), 0, 3)
    mask = jnp.arange(32).reshape(2, 4, 4) % 3 == 0
    loss = lambda x: sum(losses.segmentation_loss(x, labels, mask))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(logits)
    touched = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(touched, mask)


def test_ramp():
    assert losses.gaussian_ramp(0, 100, 2.0) == pytest.approx(2 * np.exp(-5))
    assert losses.gaussian_ramp(50, 100, 2.0) == pytest.approx(2 * np.exp(-1.25))
    assert losses.gaussian_ramp(100, 100, 2.0) == 2
    # Of a method with and without a ramp, and with one over a quarter of the run of 60 steps.
    for name, start, quarter in (("cgs", 2 * np.exp(-5), 2 * np.exp(-2.8125)), ("bcp", 0.5, 0.5)):
        weight = train_step.make_method(tiny(name)).weight
        assert (weight(0), weight(15)) == (pytest.approx(start), pytest.approx(quarter))
        assert train_step.make_method(tiny(name, **{"method.ramp": 0.25})).weight(15) == weight(60)
    with pytest.raises(UserError, match="method.ramp=2.0: it is a share of total_steps"):
        train_step.make_method(tiny(**{"method.ramp": 2.0}))


@pytest.mark.parametrize("name", ["cgs", "mean_teacher"])
def test_student_or_teacher_predicts(name):
    """Either can; what is put there as statistics is what predicts."""
    state = TrainState(jnp.asarray(1), "student", "its", None, {"params": 0, "model_state": 1})
    of_teacher = name == "cgs"  # whose authors let the teacher predict
    for who in ("", "student", "teacher"):
        method = train_step.make_method(tiny(name, predict_with=who))
        teaches = who == "teacher" or (not who and of_teacher)
        assert method.inference_variables(state) == ((0, 1) if teaches else ("student", "its"))
        params, statistics = method.inference_variables(method.with_inference_state(state, "new"))
        assert (params, statistics) == (0 if teaches else "student", "new")


def test_relabel_by_hand():
    labels = jnp.array([[[0, 1], [2, 3]]])
    expected = [[[[0, 1], [2, 2]]], [[[0, 2], [1, 2]]], [[[0, 2], [2, 1]]]]
    np.testing.assert_array_equal(heads_first(pseudo_labels.relabel(labels, 3)), expected)


@pytest.mark.parametrize("k", range(1, 9))
def test_ihed_sum_test_is_the_rule(k):
    """All say background, or one says target and all others remaining: over all 3^K votes."""
    votes = np.indices((3,) * k).reshape(k, 1, 1, -1)
    rule = (votes == 0).all(0) | (((votes == 1).sum(0) == 1) & ((votes == 2).sum(0) == k - 1))
    np.testing.assert_array_equal(pseudo_labels.ihed_mask(np.moveaxis(votes, 0, -1)), rule)
    assert rule.sum() == k + 1


def test_merge_by_hand():
    probs = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).reshape(1, 1, 1, 2, 3)
    np.testing.assert_allclose(pseudo_labels.merge(probs)[0, 0, 0], [0.3, 0.3, 0.6], atol=1e-6)


def test_pseudo_labels_by_hand():
    def one_hot(index, confidence, classes=3):
        rest = (1 - confidence) / (classes - 1)
        return np.log(np.where(np.arange(classes) == index, confidence, rest))

    # two pixels: sure target 1, unsure target 2; specialists agree on the first only
    generalist = np.stack([one_hot(1, 0.95), one_hot(2, 0.6)])[None, None]
    heads = [[one_hot(1, 0.9), one_hot(1, 0.9)], [one_hot(2, 0.9), one_hot(1, 0.8)]]
    heads = jnp.moveaxis(jnp.asarray(heads), 0, 1)[None, None]
    teacher = Outputs(jnp.asarray(generalist), (heads,))
    pseudo = pseudo_labels.from_teacher(teacher, tau=0.9)
    np.testing.assert_array_equal(pseudo.generalist, [[[1, 2]]])
    np.testing.assert_array_equal(pseudo.confident, [[[True, False]]])
    np.testing.assert_array_equal(pseudo.specialists, [[[1, 1]]])
    np.testing.assert_array_equal(pseudo.consistent, [[[True, False]]])
    _, cover = cgs.consistency_losses(teacher, pseudo)
    assert (cover["cover/g"], cover["cover/s"], cover["cover/e"]) == (0.5, 0.5, 0.5)


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cgs", {}),
        ("cgs", {"plan": "full"}),
        ("cgs:bcp", {"pretrain": 1 / 3}),
        ("cps", {}),
        ("cmems", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("mean_teacher", {"begin": 0}),
                ("ua_mt", {}),
                ("fixmatch", {}),
                ("unimatch", {}),
                ("bcp", {"pretrain": 1 / 3}),
                ("cgs:mean_teacher", {"begin": 0}),
                ("cgs:ua_mt", {}),
                ("cgs:fixmatch", {}),
                ("cgs:cps", {}),
                ("cgs:cmems", {"per_organ": True}),
                ("cgs:ad_mt", {"ramp": 1 / 3}),
                ("cgs:unimatch", {}),
                ("ad_mt", {"ramp": 1 / 3}),
                ("urpc", {}),
                ("ict", {}),
                ("versemi", {}),
                ("cgs:versemi", {}),
                ("cgs", {"teacher": "eval"}),
            )
        ),
        ("supervised", {}),
        ("supervised", {"specialists": True}),
    ],
)
def test_step_learns_and_every_part_gets_gradient(name, options):
    config = tiny(name, **{"model.channels": (4, 4, 8), "model.dropout": (0.1,) * 3})
    config.method.update(options)
    if "tau" in config.method:
        config.method.tau = 0.5
    # Adam would move by rounding errors what has no gradient.
    config.optimizer.update(name="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
    method = train_step.make_method(config)
    mesh = make_mesh(config)
    state = train_step.init_state(method, mesh)
    start = jax.device_get(state.params)
    step = train_step.make_train_step(method, mesh)
    batch = tiny_batch(config, method.draws)
    if not method.unlabelled:
        del batch["unlabelled"]
    seen = []
    for _ in range(config.total_steps):
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch), train_step.seed_of(config))
        seen.append(dict(zip(metrics.names, metrics.values.tolist(), strict=True)))
    supervised = [sum(v for k, v in row.items() if k.startswith("sup/")) for row in seen]
    assert np.mean(supervised[-5:]) < 0.6 * np.mean(supervised[:5])
    assert all(np.isfinite(v) for row in seen for v in row.values())
    unsupervised = {k for row in seen for k in row if k.startswith("unsup/")}
    assert bool(unsupervised) == method.unlabelled
    assert all(any(row[k] > 0 for row in seen) for k in unsupervised)
    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), start, state.params)
    for path, changed in jax.tree.leaves_with_path(moved):
        # Batch norm cancels the bias before it: its gradient is 0.
        cancelled = re.search(
            r"down.*conv\d'.*bias|up\d'.*bias|conv1_bias", jax.tree_util.keystr(path)
        )
        assert changed != bool(cancelled and "bn" not in cancelled[0]), path
    if hasattr(method, "teacher"):
        teacher = state.extra["params"]
        gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), teacher, state.params)
        assert 0 < max(jax.tree.leaves(gap)) < (0.2 if name == "cgs" else 0.5)


def test_every_unsupervised_term_has_a_gradient():
    key = jax.random.key(0)
    heads = jax.random.normal(key, (2, 8, 8, 2, 3))
    student = Outputs(jax.random.normal(key, (2, 8, 8, 3)), (heads,))
    teacher = Outputs(student.generalist * 5, (heads[..., ::-1, :] * 5,))
    pseudo = pseudo_labels.from_teacher(teacher, 0.5)
    gradients = jax.jit(jax.jacrev(lambda s: cgs.consistency_losses(s, pseudo)[0]))(student)
    assert len(gradients) == 12
    for name, gradient in gradients.items():
        reached = [bool(np.abs(g).max() > 0) for g in jax.tree.leaves(gradient)]
        assert reached == [name.startswith("unsup/G"), name.startswith("unsup/S")], name


def test_keys_follow_seed_and_step():
    """The same step draws the same views, the next one and another seed others; by one program."""
    config = tiny()
    method = train_step.make_method(config)
    step = train_step.make_train_step(method, make_mesh(config))
    losses_seen = []
    for seed, count in ((0, 0), (0, 0), (0, 1), (1, 0)):
        state = train_step.init_state(method, make_mesh(config))
        state = state.replace(step=jnp.asarray(count))
        batch = jax.tree.map(jnp.asarray, tiny_batch(config))
        _, metrics = step(state, batch, np.uint32(seed))
        losses_seen.append(float(metrics["sup"]))
    assert losses_seen[0] == losses_seen[1]
    assert len(set(losses_seen)) == 3
    assert step._cache_size() == 1
