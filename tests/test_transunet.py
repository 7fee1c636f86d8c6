"""TransUNet: its encoder against plain numpy, its weights, and steps of a tiny one."""

import math

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import plain_encoder
from cgs_jax.models import network, resnet_vit, transunet, vit_weights
from cgs_jax.runtime import devices
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import batch_norm, train_step
from cgs_jax.training.checkpoints import Checkpoints
from cgs_jax.training.resolve import check
from cgs_jax.training.train_state import TrainState
from configs import acdc, common
from steps import tiny_batch

TINY = {
    "model.units": (1, 1, 1),
    "model.width": 1 / 8,
    "model.groups": 4,
    "model.hidden": 8,
    "model.mlp": 12,
    "model.heads": 2,
    "model.layers": 1,
    "model.decoder": (8, 8, 8, 4, 4),
}


def tiny(method="cgs", **fields):
    """The published configuration, shrunk."""
    config = common.get_config(method, model="transunet")
    config.data.update(name="acdc", classes=("big", "small"), size=32)
    config.batch.update(labelled=2, unlabelled=2)
    config.total_steps = 60
    if "tau" in config.method:
        config.method.tau = 0.3  # so that an untrained network is sure of something
    config.update_from_flattened_dict(TINY | fields)
    return config


def full(size=256, **fields):
    config = acdc.get_config("model=transunet")
    config.update_from_flattened_dict({"data.size": size} | fields)
    return config


def at(tree, key):
    for name in key.split("/"):
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("classes", "size", "expected"),
    [(9, 224, 105_277_081), (4, 224, 105_276_356), (4, 256, 105_322_436), (4, 384, 105_568_196)],
)
def test_number_of_parameters(classes, size, expected):
    config = full(size, **{"data.classes": tuple("abcdefgh"[: classes - 1])})
    net, image = network.build(config, specialists=False), jnp.zeros((1, size, size, 1))
    params = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    parts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert sum(parts.values()) == expected
    assert parts["generalist"] == 9 * 16 * classes + classes
    encoder = sum(x.size for x in jax.tree.leaves(params["backbone"]["encoder"]))
    assert parts["backbone"] - encoder == 7_387_200


def test_public_weights_land_where_they_belong(monkeypatch, capsys):
    """All 353 arrays, each of one value of its own; nothing is initialised."""
    shapes = plain_encoder.table((3, 4, 9), 64, 768, 3072, 12, 12, tokens=197)
    assert len(shapes) == 353
    assert sum(map(math.prod, shapes.values())) == 115_277_971 - 768 * (1 + 769 + 21843) - 21843
    values = {key: i for i, key in enumerate(shapes, 1)}
    arrays = {k: np.broadcast_to(np.float32(values[k]), shape) for k, shape in shapes.items()}
    arrays["gn_root/scale"] = arrays["gn_root/scale"].reshape(1, 1, 1, 64)
    arrays |= {"cls": np.zeros((1, 1, 768)), "head/bias": np.zeros(21843)}
    monkeypatch.setattr(vit_weights, "read", lambda source: arrays)
    config = full(**{"model.weights": "public.npz"})
    method = train_step.make_method(config)
    params, stats = train_step.starting_weights(method)
    encoder = params["backbone"].pop("encoder")
    assert len(jax.tree.leaves(encoder)) == 353
    for key, value in values.items():
        shape = (1, 256, 768) if key.endswith("pos_embedding") else shapes[key]
        assert at(encoder, key).shape == shape
        np.testing.assert_allclose(at(encoder, key).ravel()[[0, -1]], value, rtol=1e-6)
    for leaf in jax.tree.leaves((params, stats)):  # decoder and heads stay as they are
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert "353 arrays read, ignored: cls, head/bias; 14 x 14 positions, zoomed to 16 x 16" in (
        capsys.readouterr().out
    )


def test_training_starts_from_public_weights(tmp_path, capsys):
    """Of every network; what is not in the file is as without it. Wrong files are one line."""
    shapes = plain_encoder.table((1, 1, 1), 8, 8, 12, 2, 1, tokens=5)
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    np.savez(tmp_path / "mine.npz", **arrays)
    config = tiny("mean_teacher")
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    plain = train_step.init_state(method, mesh)
    config.model.weights = str(tmp_path / "mine.npz")
    state = train_step.init_state(method, mesh)
    for params in (state.params, state.extra["params"]):
        for key, value in arrays.items():
            value = value[:, 1:] if key.endswith("pos_embedding") else value
            np.testing.assert_array_equal(at(params["backbone"]["encoder"], key), value)
        apart = [{**p["backbone"], "encoder": p["generalist"]} for p in (params, plain.params)]
        jax.tree.map(np.testing.assert_array_equal, *apart)
    assert "ignored: nothing; 2 x 2 positions\n" in capsys.readouterr().out

    def message(**changed):
        changed = {k: v for k, v in (arrays | changed).items() if v is not None}
        np.savez(tmp_path / "odd.npz", **changed)
        config.model.weights = str(tmp_path / "odd.npz")
        with pytest.raises(UserError) as error:
            train_step.starting_weights(method)
        return str(error.value).removeprefix(config.model.weights)

    key = "block2/unit1/conv2/kernel"
    assert message(**{key: None}) == f" lacks {key} (1 such keys)"
    assert message(**{"block2/unit3/gn1/bias": np.zeros(2), "a": np.zeros(1)}) == (
        " has unknown a (2 such keys)"
    )
    wrong = message(**{key: np.zeros((3, 3, 16, 8))})
    assert wrong.startswith(f": {key} has shape (3, 3, 16, 8), which does not fit the model's (3, ")
    positions = "Transformer/posembed_input/pos_embedding"
    for shape in ((1, 6, 8), (1, 5, 4), (5, 8)):  # no square; another width; no batch
        assert f"{positions} has shape {shape}" in message(**{positions: np.zeros(shape)})
    assert "gn_root/bias has shape (1, 1, 8)" in message(**{"gn_root/bias": np.zeros((1, 1, 8))})


def test_what_has_no_weights_stays_as_it_is_in_each_network():
    shape = jax.ShapeDtypeStruct((2,), np.float32)
    both = {name: {"in": jnp.zeros(2), "out": jnp.full(2, x)} for name, x in (("a", 1), ("b", 2))}
    before = TrainState(jnp.zeros((), int), both, {}, (), {})
    state = train_step.with_weights(before, {"in": np.full(2, 7.0), "out": shape})
    assert [x.tolist() for x in jax.tree.leaves(state.params)] == [[7, 7], [1, 1], [7, 7], [2, 2]]


def tiny_encoder(form, units=(1, 1, 1)):
    config = tiny(**{"model.form": form, "model.units": units}).model
    names = ("form", "units", "width", "groups", "hidden", "mlp", "heads", "layers", "dropout")
    return resnet_vit.Encoder(**{name: config[name] for name in names})


@pytest.fixture(scope="module")
def encoder_params():
    """Random ones, without the regularity of a fresh network."""
    rng = np.random.default_rng(0)
    image = jnp.zeros((1, 32, 32, 1))
    encoder = tiny_encoder("google", units=(1, 2, 1))
    init = lambda key: encoder.init(key, image, False)["params"]  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0.3, 0.5, x.shape), shapes)


@pytest.mark.parametrize("form", resnet_vit.FORMS)
def test_encoder_against_numpy(form, encoder_params):
    image = np.random.default_rng(1).random((2, 32, 32, 1))
    encoder = tiny_encoder(form, units=(1, 2, 1))
    apply = jax.jit(lambda p, x: encoder.apply({"params": p}, x, False))
    single = jax.tree.map(np.float32, (encoder_params, image))
    skips, out = apply(*single)
    expected_skips, expected = plain_encoder.encoder(image, encoder_params, form)
    for found, wanted in zip([*skips, out], [*expected_skips, expected], strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-4 * np.abs(wanted).max())


def test_forms_differ_in_the_size_of_the_pooled_map():
    for size, google, torch in ((224, 56, 55), (256, 64, 63)):
        half = jax.ShapeDtypeStruct((1, size // 2, size // 2, 8), np.float32)
        for form, expected in (("google", google), ("torch", torch)):
            pooled = jax.eval_shape(lambda x, form=form: resnet_vit.max_pool(x, form), half)
            assert pooled.shape == (1, expected, expected, 8)
            image = jnp.zeros((1, size, size, 1))
            encoder = tiny_encoder(form)
            run = lambda key, e=encoder, i=image: e.init_with_output(key, i, False)  # noqa: E731
            (skips, x), _ = jax.eval_shape(run, jax.random.key(0))
            assert [s.shape[1] for s in skips] == [size // 2, size // 4, size // 8]
            assert x.shape == (1, size // 16, size // 16, 8)


def test_zoom_of_positions():
    """Bilinear, corner on corner: as scipy does it, and along each axis as np.interp."""
    grid = np.random.default_rng(0).normal(size=(3, 3, 2)).astype(np.float32)
    found = resnet_vit.zoom(grid.reshape(1, 9, 2), 5, 4)
    assert found.shape == (1, 5, 4, 2)
    wanted = ndimage.zoom(grid, (5 / 3, 4 / 3, 1), order=1)
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)
    column = np.interp(np.linspace(0, 2, 5), range(3), grid[:, 0, 1])
    np.testing.assert_allclose(found[0, :, 0, 1], column, atol=1e-6)
    np.testing.assert_array_equal(resnet_vit.zoom(grid.reshape(1, 9, 2), 3, 3)[0], grid)


def test_maps_of_images_of_any_channels_and_size():
    """Positions that were made for 32 x 32 pixels are zoomed to a window, or a larger slice."""
    for channels, inputs in ((2, 2), (3, 3), (1, 3)):
        net = network.build(tiny(**{"data.channels": channels}), specialists=True)
        image = jnp.zeros((2, 32, 32, channels))
        variables = jax.eval_shape(net.init, jax.random.key(0), image)
        root = variables["params"]["backbone"]["encoder"]["conv_root"]["kernel"]
        assert root.shape[2] == inputs
    for side in (16, 48):
        outputs = jax.eval_shape(net.apply, variables, jnp.zeros((2, side, side, 1)))
        assert outputs.generalist.shape == (2, side, side, 3)
        assert [x.shape for x in outputs.specialists] == [(2, side, side, 2, 3)]


def test_norms_and_softmax_are_float32_under_bfloat16():
    net = network.build(tiny(**{"model.dtype": "bfloat16"}), specialists=True)
    image = jnp.zeros((2, 32, 32, 1))
    variables = jax.eval_shape(net.init, jax.random.key(0), image)
    apply = lambda v, x, key: net.apply(  # noqa: E731
        v, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    traced = jax.make_jaxpr(apply)(variables, image, jax.random.key(0))
    types = {name: set() for name in ("exp", "rsqrt", "sqrt", "conv_general_dilated")}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in types:
                types[equation.primitive.name].add(str(equation.invars[0].aval.dtype))
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(traced.jaxpr)
    assert types.pop("conv_general_dilated") == {"bfloat16"}
    assert types == {name: {"float32"} for name in types}


def test_perturbed_copy_loses_channels_of_skips_and_transformer(monkeypatch):
    seen = []
    monkeypatch.setattr(
        transunet, "drop_channels", lambda x, pack, key: seen.append((x.shape, key)) or 0 * x
    )
    net = network.build(tiny("unimatch"), specialists=False)
    image = jnp.zeros((2, 32, 32, 1))
    variables = jax.eval_shape(net.init, jax.random.key(0), image)
    options = {"perturb": True, "rngs": {"dropout": jax.random.key(0)}}
    outputs = jax.eval_shape(lambda v: net.apply(v, image, **options), variables)
    assert outputs.generalist.shape == (4, 32, 32, 3)
    shapes = [(2, 2, 2, 8), (2, 16, 16, 8), (2, 8, 8, 32), (2, 4, 4, 64)]
    assert [shape for shape, _ in seen] == shapes


@pytest.fixture(scope="module")
def stepped():
    """One step of CGS by AdamW: config, method, mesh, states before and after."""
    config = tiny()
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    before = train_step.init_state(method, mesh)
    step = train_step.make_train_step(method, mesh)
    batch = jax.tree.map(jnp.asarray, tiny_batch(config))
    after, metrics = step(jax.tree.map(jnp.copy, before), batch, train_step.seed_of(config))
    assert np.isfinite(metrics.values).all()
    return config, method, mesh, *jax.device_get((before, after))


def check_gradients(gradients):
    largest = jax.tree.map(lambda g: float(np.abs(g).max()), jax.device_get(gradients))
    for path, value in jax.tree.leaves_with_path(largest):
        name = jax.tree_util.keystr(path)
        # Softmax cancels the bias of the keys, batch norm that of the specialists' first layer.
        cancelled = "['key']['bias']" in name or "conv1_bias" in name
        assert (value < 1e-6) if cancelled else (value > 1e-6), (name, value)


def test_step_of_cgs(stepped):
    """Every parameter has a gradient, which the first average of AdamW holds, and moves."""
    config, _, _, before, after = stepped
    check_gradients(jax.tree.map(lambda m: m / 0.1, after.opt_state[0].mu))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(moved)) < 1.1 * config.optimizer.lr
    stats = jax.tree.map(lambda a, b: bool((a != b).any()), before.model_state, after.model_state)
    assert all(jax.tree.leaves(stats))
    backbone = after.model_state["batch_stats"]["backbone"]
    assert "encoder" not in backbone
    assert len(backbone) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unimatch", "fixmatch"])
def test_gradients_of_other_methods(name):
    config = tiny(name)
    method, mesh = train_step.make_method(config), devices.make_mesh(config)
    batch = tiny_batch(config)

    def gradients(key):
        params, model_state, extra = method.init(key, jnp.zeros((1, 32, 32, 1)))
        state = TrainState(jnp.asarray(60), params, model_state, None, extra)
        views = train_step.make_views(method, mesh, batch, key)
        loss = jax.value_and_grad(method.loss, has_aux=True)
        (_, (*_, metrics)), found = loss(params, state, views, key)
        return found, metrics

    found, metrics = devices.jit(gradients, mesh)(jax.random.key(0))
    check_gradients(found)
    assert all(value > 0 for term, value in metrics.items() if term.startswith("unsup/"))


def test_precise_statistics_are_without_dropout(stepped):
    """Twice the same whatever the running averages; the first layer as evaluation mode sees it."""
    _, _, mesh, _, state = stepped
    config = tiny(**{"precise_bn": 1, "model.dropout": 0.5})
    method, batch = train_step.make_method(config), tiny_batch(config)
    precise = batch_norm.make_precise(method, grain.MapDataset.source([batch]), mesh)
    params, start = method.inference_variables(state)
    other = method.with_inference_state(state, jax.tree.map(lambda x: x + 3, start))
    (_, stats), (_, again) = (method.inference_variables(precise(s)) for s in (state, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), stats, again)
    k_views, _ = train_step.step_keys(np.uint32(config.seed), 0)
    views = train_step.make_views(method, mesh, batch, k_views)
    image = jnp.concatenate([views["labelled"]["image"], views["unlabelled"]["weak"]])
    encoder = tiny_encoder("google")
    _, x = jax.jit(lambda p, x: encoder.apply({"params": p}, x, False))(
        params["backbone"]["encoder"], image
    )
    kernel = params["backbone"]["conv_more"]["kernel"]
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    found = stats["batch_stats"]["backbone"]["conv_more"]["bn"]
    np.testing.assert_allclose(found["mean"], y.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["var"], y.var((0, 1, 2)), rtol=1e-3, atol=1e-4)


def test_state_is_saved_restored_and_sharded(stepped, tmp_path):
    config, method, mesh, _, state = stepped
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, dice=0.5)
    like = train_step.abstract_state(method, mesh)
    restored = checkpoints.restore_latest(like)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    several = jax.sharding.AbstractMesh((4, 1), ("data", "space"))
    shardings = devices.of_state(several, like, 100)
    split = jax.tree.map(lambda s: "data" in s.spec, shardings)
    for moments in (split.opt_state[0].mu, split.opt_state[0].nu, split.extra["params"]):
        assert moments == split.params
    assert split.params["backbone"]["conv_more"]["kernel"]
    assert not split.params["backbone"]["conv_more"]["bn"]["scale"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.form": "jax"}, "unknown model.form 'jax'; there are: google, torch"),
        ({"model.units": (3, 4, 6, 3)}, r"model.units=\(3, 4, 6, 3\) must be 3 positive numbers"),
        ({"model.decoder": (8, 8, 8, 4)}, "model.decoder=.* must be 5 positive numbers"),
        ({"model.heads": 0}, "model.heads must be at least 1"),
        ({"model.heads": 3}, "model.hidden=8 must divide by model.heads=3"),
        ({"model.groups": 3}, "makes 8 channels, which must divide by model.groups=3"),
        ({"model.dropout": 1.0}, "model.dropout=1.0 must be between 0 and 0.9"),
        ({"data.size": 40}, "data.size=40 does not divide by 16"),
        ({"data.patch": 24}, "sides of windows divide by 16"),
        ({"model.name": "unet"}, "unet has no option model.decoder; .*FILE.py:model=unet"),
    ],
)
def test_bad_options(fields, message):
    check(tiny())
    with pytest.raises(UserError, match=message):
        check(tiny(**fields))
