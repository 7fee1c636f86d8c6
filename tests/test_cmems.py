"""CMEMS-style: the losses of two networks, against numbers made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import augment, base, cmems
from cgs_jax.models.network import Outputs
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny, tiny_batch


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
    views["counts"] = jnp.asarray(rng.random((2, 4, 4)) < 0.8)
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
    valid = np.asarray(views["counts"])[1:] & (certain[1:] | ~sure_organ)
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
        (("exemplar",), set()),
        (("exemplar", "image"), {"unsup/image_ce", "unsup/image_dice"}),
        (("exemplar", "feature"), {"unsup/feature_ce", "unsup/feature_dice"}),
        (("exemplar", "synthetic"), set()),
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
    y, image = np.asarray(views["labelled"]["label"]), views["labelled"]["image"]
    if terms == ("exemplar", "synthetic"):
        np.testing.assert_allclose(metrics["sup"], every["sup"], rtol=1e-6)
    elif terms == ("synthetic",):
        of_one = [
            ce_and_dice(prob(image[:1], p), y[:1], np.ones((1, 4, 4))) for p in PARAMS.values()
        ]
        both = np.asarray(every["sup"])
        np.testing.assert_allclose(metrics["sup"], both - np.sum(of_one), rtol=1e-5)
    else:
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


@pytest.mark.parametrize("name", ["cmems", "cps"])
def test_the_mean_of_both_predicts(name):
    """Each with statistics of its own, also with those that are averaged over many batches."""
    made = {
        who: train_step.make_method(tiny(name, **{"method.predicts": who}))
        for who in ("first", "mean")
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
    first_organ = np.array([True, False])
    alone = jax.jit(made["mean"].predict)(state, image, first_organ)
    expected = jnp.stack([mean[..., 0] + mean[..., 2], mean[..., 1], 0 * mean[..., 2]], -1)
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
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
        ("cmems", {"method.terms": ("copies",)}, "unknown --config.method.terms copies; there"),
        ("cmems", {"method.terms": ("image",)}, "cmems needs 'exemplar' or 'synthetic'"),
        ("cmems", {"method.rim": -1}, "method.rim=-1 must be at least 0"),
        ("cmems", {"method.predicts": "both"}, "unknown method.predicts 'both'; there are: first"),
        ("cps", {"method.predicts": "both"}, "unknown method.predicts 'both'; there are: first"),
        ("cmems", {"batch.labelled": 1}, "method.exemplars=0.5 of batch.labelled=1 must leave"),
        ("cmems", {"method.exemplars": 1.0}, "method.exemplars=1.0 of batch.labelled=2 must leave"),
        ("cmems", {"method.scale": (1.2, 0.8)}, r"method.scale=\(1.2, 0.8\): the least and the"),
        ("cmems", {"method.scale": ("a", "b")}, r"method.scale=\('a', 'b'\): the least and the"),
        ("cmems", {"method.shift": -0.1}, "method.shift=-0.1 must be between 0 and 1"),
        ("cmems", {"method.jitter": 1.5}, "method.jitter=1.5 must be between 0 and 1"),
        ("cgs:cmems", {"method.terms": ("synthetic",)}, "CGS over cmems needs 'image' or"),
    ],
)
def test_bad_options(name, fields, message):
    with pytest.raises(UserError, match=message):
        train_step.make_method(tiny(name, **fields))
