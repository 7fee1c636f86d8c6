"""CMEMS-style: synthetic images and the losses of two networks, against numbers made by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import command, start
from steps import tiny, tiny_batch

from cgs_jax.methods import augment, base, cmems, synthesis
from cgs_jax.models.network import Outputs
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState

STILL = {"rotation": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "flip": 0.0, "jitter": 0.0}
SQUARE = np.uint8([[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]])


def options(**fields):
    section = tiny("cmems").method
    section.update(fields)
    return section


def move(label, image=None, mirror=False, degrees=0.0, scale=1.0, shift=(0, 0)):
    image = label[..., None] / 4 if image is None else image
    of = synthesis.Move(
        jnp.asarray(mirror), jnp.deg2rad(degrees), jnp.float32(scale), jnp.float32(shift)
    )
    return jax.tree.map(np.asarray, synthesis.moved(of, jnp.asarray(image), jnp.asarray(label)))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, SQUARE),
        ({"shift": (1, -1)}, np.roll(SQUARE, (1, -1), (0, 1))),
        ({"degrees": 90}, np.rot90(SQUARE, -1)),
        ({"mirror": True}, SQUARE[:, ::-1]),
        # first mirrored, then rotated
        ({"mirror": True, "degrees": 90}, np.rot90(SQUARE[:, ::-1], -1)),
    ],
)
def test_moves_by_hand(how, expected):
    image, label = move(SQUARE, **how)
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_allclose(image[..., 0] * (label > 0), expected / 4, atol=1e-5)


def test_twice_as_large():
    """About its own centre; the image between its pixels, the label the nearest pixel's."""
    image, label = move(SQUARE, scale=2.0)
    np.testing.assert_array_equal(label, np.kron([[1, 2], [3, 4]], np.ones((2, 2))))
    x, y = 0.75 + np.arange(4) / 2, np.arange(4)
    rows = np.stack([np.interp(x, y, column) for column in SQUARE.T / 4], 1)
    expected = np.stack([np.interp(x, y, row) for row in rows])
    np.testing.assert_allclose(image[..., 0], expected, atol=1e-5)


def test_nothing_comes_from_outside():
    _, label = move(np.full((4, 4), 2, np.uint8), shift=(2, -1))
    expected = np.full((4, 4), 2)
    expected[:2] = expected[:, 3:] = 0
    np.testing.assert_array_equal(label, expected)
    _, label = move(np.zeros((4, 4), np.uint8), scale=2.0, shift=(1, 1))
    assert not label.any()


def scene(batch=8, size=16):
    """Images that say where each pixel is from, with two organs; a background of another range."""
    places = np.stack(np.mgrid[:size, :size], -1) / 32
    label = np.zeros((batch, size, size), np.uint8)
    label[:, 4:8, 5:12], label[:, 8:11, 5:9] = 1, 2
    image = np.broadcast_to(places, (batch, size, size, 2))
    return jnp.asarray(image), jnp.asarray(label), jnp.ones((batch, size, size, 2))


@pytest.fixture(scope="module")
def paste():
    """paste(key, **options) of the scene; compiled once for both kinds of parts."""
    made = {}

    def run(key, **fields):
        name = tuple(fields.items())
        if name not in made:
            section = options(**fields)
            made[name] = jax.jit(
                lambda key: synthesis.copy_paste(key, *scene(), organs=2, options=section)
            )
        return jax.tree.map(np.asarray, made[name](jax.random.key(key)))

    return run


@pytest.mark.parametrize("per_organ", [False, True])
def test_image_and_label_move_together(paste, per_organ):
    """Where a pixel comes from, as its image says, its label was."""
    _, own, background = (np.asarray(x) for x in scene())
    image, label, pasted = paste(0, per_organ=per_organ, jitter=0.0, shift=0.3, rotation=90.0)
    np.testing.assert_array_equal(pasted, label > 0)
    np.testing.assert_array_equal(image[~pasted], background[~pasted])
    rows, columns = np.round(image[pasted] * 32).astype(int).T
    assert len(rows) > 100
    # A pixel halfway between two may have come from either.
    assert (own[0][rows, columns] == label[pasted]).mean() > 0.99
    assert len({x.tobytes() for x in label}) == len(label)  # each image by its own draw


def test_draws_follow_the_key(paste):
    fields = {"per_organ": False, "jitter": 0.0, "shift": 0.3, "rotation": 90.0}
    first, again, other = (paste(key, **fields) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[1] != other[1]).any()


def test_pasted_is_the_moved_foreground(paste):
    """A mirror image about the centre of mass; nothing else of the image arrives."""
    image, own, background = (np.asarray(x)[0] for x in scene())
    expected_image, expected = move(own, image, mirror=True)
    image, label, pasted = (x[0] for x in paste(2, **STILL | {"flip": 1.0}))
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(pasted, expected > 0)
    expected_image = np.where(pasted[..., None], expected_image, background)
    np.testing.assert_allclose(image, expected_image, atol=1e-5)


def test_later_organs_cover_earlier_ones(paste):
    """Twice as large, the two overlap; each covers the other in some images."""
    _, own, _ = (np.asarray(x)[0] for x in scene())
    whole = [move(np.where(own == k, own, 0), scale=2.0)[1] > 0 for k in (1, 2)]
    assert (whole[0] & whole[1]).any()
    _, labels, pasted = paste(3, **STILL | {"scale": (2.0, 2.0), "per_organ": True})
    on_top = []
    for label, where in zip(labels, pasted, strict=True):
        np.testing.assert_array_equal(where, whole[0] | whole[1])
        seen = [np.array_equal(label == k, whole[k - 1]) for k in (1, 2)]
        assert sum(seen) == 1
        on_top.append(seen.index(True))
    assert set(on_top) == {0, 1}


def test_draws_stay_in_their_ranges():
    section = options(rotation=30.0, scale=(0.5, 2.0), shift=0.25, flip=0.25)
    keys = jax.random.split(jax.random.key(0), 400)
    moves = jax.jit(jax.vmap(lambda key: synthesis.draw(key, (8, 16), section)))(keys)
    for values, least, greatest in (
        (jnp.rad2deg(moves.angle), -30, 30),
        (moves.scale, 0.5, 2),
        (moves.shift[:, 0], -2, 2),
        (moves.shift[:, 1], -4, 4),
    ):
        margin = 0.02 * (greatest - least)
        assert least <= values.min() < least + margin
        assert greatest - margin < values.max() <= greatest
    assert 0.18 < moves.mirror.mean() < 0.32


def test_valid_pixels_by_hand():
    """Pasted pixels count always; of the others those where no network is sure of an organ."""
    probs = lambda *p: jnp.log(jnp.array([p, [1 - x for x in p]])).T[None, None]  # noqa: E731
    # of background: sure background, sure organ, unsure, unsure
    first, second = probs(0.99, 0.01, 0.4, 0.4), probs(0.4, 0.4, 0.01, 0.4)
    nowhere = jnp.zeros((1, 1, 4), bool)
    got = cmems.valid(nowhere, [first, second], 0.95)
    np.testing.assert_array_equal(got, [[[True, False, False, True]]])
    assert cmems.valid(~nowhere, [first, second], 0.95).all()


# What follows runs on images of 4 x 4 by networks of one parameter each: the logit of class 1 is
# the image times it, the perturbed half doubles that.


def simple(**fields):
    method = train_step.make_method(tiny("cmems", 4, **{"method.tau": 0.6} | fields))

    def forward(params, stats, image, key, perturb=False):
        image = jnp.concatenate([image, 2 * image]) if perturb else image
        logits = jnp.concatenate([jnp.zeros_like(image), params * image], -1)
        return Outputs(logits, None), {"passes": stats["passes"] + 1}

    method.forward = forward
    return method


def simple_views():
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.normal(size=(3, 2, 4, 4, 1)))  # of labelled, weak, strong
    label = jnp.asarray(rng.integers(0, 2, (2, 4, 4)))
    views = {"labelled": {"image": image[0], "label": label}}
    views["unlabelled"] = {"weak": image[1], "strong": image[2]}
    return views | {"certain": jnp.asarray(rng.random((2, 4, 4)) < 0.5)}


PARAMS = {"first": jnp.float32(1.5), "second": jnp.float32(-2.0)}


def simple_state(step=60):
    stats = {name: {"passes": 0} for name in PARAMS}
    return TrainState(jnp.asarray(step), PARAMS, stats, None, {})


def prob(image, parameter):
    """Of class 1."""
    return 1 / (1 + np.exp(-np.asarray(image)[..., 0] * float(parameter)))


def ce_and_dice(p, y, mask):
    """One image after the other, pixel by pixel as the equations say."""
    ce = -np.sum(mask * (y * np.log(p) + (1 - y) * np.log(1 - p))) / y.size
    classes = (1 - p, 1 - y), (p, y)
    dice = [1 - 2 * np.sum(mask * q * z) / np.sum(mask * (q * q + z)) for q, z in classes]
    return ce, np.mean(dice)


def test_losses_by_hand():
    """L_E, L_S, L_img and L_fea of both networks, each weighted; and the pixels that count."""
    fields = {"method.lambda_max": 3.0, "method.image_weight": 0.5, "method.feature_weight": 0.25}
    method, views = simple(**fields), simple_views()
    _, (model_state, extra, metrics) = method.loss(PARAMS, simple_state(), views, jax.random.key(0))
    labelled, certain = views["labelled"], np.asarray(views["certain"])
    weak, strong = views["unlabelled"]["weak"], views["unlabelled"]["strong"]
    others = {"first": "second", "second": "first"}
    says = {name: prob(weak, parameter) for name, parameter in PARAMS.items()}
    sure_organ = np.max([p[:1] for p in says.values()], 0) > 0.6  # background of image 1 is image 0
    valid = certain[1:] | ~sure_organ
    assert 0 < valid.mean() < 1
    terms, sure = dict.fromkeys(("sup", "image", "feature"), np.zeros(2)), []
    for name, other in others.items():
        y = np.asarray(labelled["label"])
        p = prob(labelled["image"], PARAMS[name])
        terms["sup"] = terms["sup"] + ce_and_dice(p[:1], y[:1], np.ones_like(p[:1]))
        terms["sup"] = terms["sup"] + ce_and_dice(p[1:], y[1:], valid)
        pseudo, mask = says[other] > 0.5, np.maximum(says[other], 1 - says[other]) > 0.6
        sure.append(mask.mean())
        image = prob(strong, PARAMS[name])
        feature = prob(2 * weak, PARAMS[name])
        terms["image"] = terms["image"] + ce_and_dice(image, pseudo, mask)
        terms["feature"] = terms["feature"] + ce_and_dice(feature, pseudo, mask)
    got = [metrics["sup/generalist_ce"], metrics["sup/generalist_dice"]]
    np.testing.assert_allclose(got, terms["sup"], rtol=1e-5)
    for name, weight in (("image", 0.5), ("feature", 0.25)):
        got = [metrics[f"unsup/{name}_ce"], metrics[f"unsup/{name}_dice"]]
        np.testing.assert_allclose(got, weight * terms[name], rtol=1e-5)
    unsupervised = 0.5 * terms["image"].sum() + 0.25 * terms["feature"].sum()
    np.testing.assert_allclose(metrics["loss"], terms["sup"].sum() + 3 * unsupervised, rtol=1e-5)
    np.testing.assert_allclose(metrics["cover/sure"], np.mean(sure), rtol=1e-6)
    assert model_state == {name: {"passes": 2} for name in PARAMS}
    assert extra == {}
    halfway = method.loss(PARAMS, simple_state(30), views, jax.random.key(0))[1][2]
    np.testing.assert_allclose(halfway["lambda"], 3 * np.exp(-5 / 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ((), set()),
        (("image",), {"unsup/image_ce", "unsup/image_dice"}),
        (("feature",), {"unsup/feature_ce", "unsup/feature_dice"}),
        (("synthetic",), set()),
    ],
)
def test_terms_are_chosen(terms, names):
    """Each alone has the value that it has among all; without synthetic images none is masked."""
    views, key = simple_views(), jax.random.key(0)
    method = simple(**{"method.terms": terms})
    metrics = method.loss(PARAMS, simple_state(), views, key)[1][2]
    every = simple().loss(PARAMS, simple_state(), views, key)[1][2]
    assert {name for name in metrics if name.startswith("unsup/")} == names
    for name in names:
        np.testing.assert_allclose(metrics[name], every[name], rtol=1e-6)
    if "synthetic" in terms:
        np.testing.assert_allclose(metrics["sup"], every["sup"], rtol=1e-6)
    else:
        y, image = np.asarray(views["labelled"]["label"]), views["labelled"]["image"]
        each = [ce_and_dice(prob(image, p), y, np.ones(y.shape)) for p in PARAMS.values()]
        np.testing.assert_allclose(metrics["sup"], np.sum(each), rtol=1e-5)


def test_organs_that_are_not_annotated_may_be_in_the_background():
    """Both parts keep what their images are annotated for, so the marginal loss holds for them."""
    views = simple_views()
    annotated = jnp.array([[True, False], [False, True]])[:, None, None]
    views["labelled"]["annotated"] = annotated
    labelled = simple().passes(PARAMS, simple_state(), views, jax.random.key(0)).labelled
    for part, row in zip(labelled, (0, 1, 0, 1), strict=True):
        np.testing.assert_array_equal(part.annotated, annotated[row : row + 1])


def test_views_by_hand():
    """On its own background an image keeps its other organs, with their labels; on an unlabelled
    one only what was pasted is certain. One without organs stays on itself."""
    fields = {f"method.{name}": value for name, value in STILL.items()}
    fields |= {"batch.labelled": 8, "augment.flip": 0.0, "augment.rotate": 0.0}
    method = train_step.make_method(tiny("cmems", **fields | {"method.scale": (0.5, 0.5)}))
    batch = jax.tree.map(jnp.asarray, tiny_batch(method.config, 4))
    batch["labelled"]["annotated"] = jnp.ones((8, 1, 1, 2), bool)
    batch["labelled"]["label"] = batch["labelled"]["label"].at[7].set(0)
    batch["unlabelled"]["image"] = batch["unlabelled"]["image"][:2]
    batch = {k: v | {"image": augment.to_image(v["image"])} for k, v in batch.items()}
    # This key draws for rows 1 and 5 their own background, for 3 and 7 another.
    views = jax.jit(method.views)(batch, jax.random.key(3))
    source, weak, got = batch["labelled"], batch["unlabelled"]["image"], views["labelled"]
    assert got["annotated"].shape == (8, 1, 1, 2)
    for row in range(0, 8, 2):  # every other image stays
        np.testing.assert_array_equal(got["image"][row], source["image"][row])
        np.testing.assert_array_equal(got["label"][row], source["label"][row])
        assert views["certain"][row].all()
    for row, own in ((1, True), (3, False), (5, True), (7, True)):
        image, small = move(source["label"][row], source["image"][row], scale=0.5)
        pasted = small > 0
        assert pasted.any() == (row < 7)
        background = source["image"][row] if own else weak[0]
        label = np.where(pasted, small, source["label"][row] if own else 0)
        np.testing.assert_array_equal(got["label"][row], label)
        expected = np.where(pasted[..., None], image, background)
        np.testing.assert_allclose(got["image"][row], expected, atol=1e-5)
        np.testing.assert_array_equal(views["certain"][row], pasted | own)


def test_organs_change_sides_only_where_images_do():
    assert train_step.make_method(tiny("cmems")).paste.flip == 0.5
    assert train_step.make_method(tiny("cmems", **{"augment.flip": 0.0})).paste.flip == 0.0


def test_each_term_reaches_one_network_only():
    """Both networks on both kinds of labelled images, and both ways at image and feature level."""
    fields = {"method.tau": 0.3, "model.channels": (4, 8), "model.dropout": (0.1, 0.1)}
    method = train_step.make_method(tiny("cmems", **fields))
    params, model_state, extra = jax.jit(method.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    state = TrainState(jnp.asarray(1), params, model_state, None, extra)
    batch = jax.tree.map(jnp.asarray, tiny_batch(method.config))
    batch = {k: v | {"image": augment.to_image(v["image"])} for k, v in batch.items()}
    views = jax.jit(method.views)(batch, jax.random.key(1))

    def terms(params):
        passes = method.passes(params, state, views, jax.random.key(2))
        labelled = [sum(base.supervised_loss(x).values()) for x in passes.labelled]
        pairs = [sum(base.confident_loss(*x[:2], 0.3)[:2]) for x in passes.pairs]
        return labelled + pairs

    term = jax.jit(jax.grad(lambda params, i: jnp.stack(terms(params))[i]))
    gradients = [term(params, i) for i in range(8)]
    largest = [
        [max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of[name])) for name in cmems.NAMES]
        for of in gradients
    ]
    expected = [[True, False]] * 2 + [[False, True]] * 2 + [[True, False], [False, True]] * 2
    np.testing.assert_array_equal(np.array(largest) > 0, expected)


def test_the_mean_of_both_predicts():
    """Each with statistics of its own, also with those that are averaged over many batches."""
    made = {
        name: train_step.make_method(tiny("cmems", **{"method.predicts": name}))
        for name in ("first", "mean")
    }
    params, model_state, extra = jax.jit(made["mean"].init)(
        jax.random.key(0), jnp.zeros((1, 16, 16, 1))
    )
    state = TrainState(jnp.asarray(1), params, model_state, None, extra)
    swapped = state.replace(
        params={"first": params["second"]}, model_state={"first": model_state["second"]}
    )
    image = jax.random.uniform(jax.random.key(1), (2, 16, 16, 1))
    first = jax.jit(made["first"].predict)
    one, other = first(state, image), first(swapped, image)
    assert jnp.abs(one - other).max() > 1e-3
    mean = jax.jit(made["mean"].predict)(state, image)
    np.testing.assert_allclose(mean, (one + other) / 2, rtol=1e-5)
    for method in made.values():
        of, stats = method.labelling_variables(state)
        assert of is params["first"]
        assert stats is model_state["first"]
    method = simple(**{"method.predicts": "mean"})
    state = simple_state()
    after = method.statistics(*method.inference_variables(state), image, jax.random.key(0))
    assert after == {name: {"passes": 1} for name in PARAMS}
    assert method.with_inference_state(state, after).model_state == after


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("cmems", {"method.terms": ("exemplar",)}, "unknown --config.method.terms exemplar; there"),
        ("cmems", {"method.predicts": "both"}, "unknown method.predicts 'both'; there are: first"),
        ("cmems", {"batch.labelled": 1}, "method.exemplars=0.5 of batch.labelled=1 must leave"),
        ("cmems", {"method.exemplars": 1.0}, "method.exemplars=1.0 of batch.labelled=2 must leave"),
        ("cmems", {"method.scale": (1.2, 0.8)}, r"method.scale=\(1.2, 0.8\): the least and the"),
        ("cmems", {"method.shift": -0.1}, "method.shift=-0.1 must be between 0 and 1"),
        ("cmems", {"method.jitter": 1.5}, "method.jitter=1.5 must be between 0 and 1"),
        ("cgs:cmems", {"method.terms": ("synthetic",)}, "CGS over cmems needs 'image' or"),
    ],
)
def test_bad_options(name, fields, message):
    with pytest.raises(UserError, match=message):
        train_step.make_method(tiny(name, **fields))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh.data": 8}, {"mesh.data": 2, "mesh.space": 4}])
def test_meshes_give_the_same_numbers(scans, tmp_path, mesh):
    losses = []
    for devices, fields in ((1, {}), (8, mesh)):
        workdir = tmp_path / str(devices)
        fields = {"total_steps": 4, "log_every": 1, "pseudo_slices": 0, "test": False} | fields
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        line = command(scans, workdir, *flags)
        line[line.index("--config") + 1] = "configs/segthor.py:method=cmems,labelled=2"
        done = start(line, devices)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-4)
