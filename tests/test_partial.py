"""Images that are annotated for some organs only: the marginal loss against numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import base, losses, pseudo_labels
from cgs_jax.models.network import Outputs
from cgs_jax.runtime import devices
from cgs_jax.training import train_step
from steps import tiny, tiny_batch

ALL = jnp.ones((1, 1, 1, 2), bool)
FIRST = jnp.array([True, False]).reshape(1, 1, 1, 2)


def log(probs):
    return jnp.log(jnp.asarray(probs, jnp.float32))


def test_marginal_probabilities_by_hand():
    """What is not annotated joins the background, whose probability it adds to."""
    probs = jax.nn.softmax(losses.marginal(log([[[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]]]), FIRST))
    np.testing.assert_allclose(probs, [[[[0.5, 0.5, 0], [0.9, 0.1, 0]]]], atol=1e-6)
    same = jax.nn.softmax(losses.marginal(log([[[[0.2, 0.5, 0.3]]]]), ALL))
    np.testing.assert_allclose(same, [[[[0.2, 0.5, 0.3]]]], rtol=1e-6)


def test_loss_of_the_generalist_by_hand():
    """Two pixels, labelled organ 1 and background; organ 2, of probability .3 and .8, is not
    annotated."""
    generalist, label = (
        log([[[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]]]),
        jnp.array([[[1, 0]]], jnp.uint8),
    )
    terms = base.supervised_loss(base.Labelled(Outputs(generalist, None), label, None, FIRST))
    ce = -np.mean(np.log([0.5, 0.9]))
    np.testing.assert_allclose(terms["sup/generalist_ce"], ce, rtol=1e-5)
    background = 1 - 2 * 0.9 / (0.5**2 + 0.9**2 + 1)
    organ = 1 - 2 * 0.5 / (0.5**2 + 0.1**2 + 1)
    dice = (background + organ + 0) / 3
    np.testing.assert_allclose(terms["sup/generalist_dice"], dice, rtol=1e-5)


def test_loss_of_the_specialists_by_hand():
    """Only that of the annotated organ learns; labelled background may be a remaining organ."""
    heads = log([[[[[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]], [[0.1, 0.3, 0.6], [0.5, 0.4, 0.1]]]]])
    label = jnp.array([[[1, 0]]], jnp.uint8)
    outputs = Outputs(log(np.full((1, 1, 2, 3), 1 / 3)), (heads[..., :1, :], heads[..., 1:, :]))
    terms = base.supervised_loss(base.Labelled(outputs, label, None, FIRST))
    ce = -np.mean(np.log([0.5, 0.7])) / 2  # mean of both heads, of which the second has none
    np.testing.assert_allclose(terms["sup/specialists_ce"], ce, rtol=1e-5)
    background = 1 - 2 * 0.7 / (0.2**2 + 0.7**2 + 1)
    target = 1 - 2 * 0.5 / (0.5**2 + 0.3**2 + 1)
    dice = (background + target + 1) / 3 / 2  # of the remaining ones there is none
    np.testing.assert_allclose(terms["sup/specialists_dice"], dice, rtol=1e-5)


def test_all_annotated_is_the_plain_loss():
    rng = np.random.default_rng(0)
    generalist, heads = rng.normal(size=(2, 4, 4, 3)), rng.normal(size=(2, 4, 4, 2, 3))
    outputs = Outputs(jnp.asarray(generalist), (jnp.asarray(heads),))
    label = jnp.asarray(rng.integers(0, 3, (2, 4, 4)), jnp.uint8)
    plain = base.supervised_loss(base.Labelled(outputs, label))
    marked = base.supervised_loss(base.Labelled(outputs, label, None, jnp.repeat(ALL, 2, 0)))
    for name, value in plain.items():
        np.testing.assert_allclose(marked[name], value, rtol=1e-6, err_msg=name)


def test_what_is_not_annotated_gets_no_gradient():
    rng = np.random.default_rng(0)
    generalist, heads = rng.normal(size=(1, 4, 4, 3)), rng.normal(size=(1, 4, 4, 2, 3))
    label = jnp.asarray(rng.integers(0, 2, (1, 4, 4)), jnp.uint8)

    def loss(outputs):
        return sum(base.supervised_loss(base.Labelled(outputs, label, None, FIRST)).values())

    grad = jax.grad(loss)(Outputs(jnp.asarray(generalist), (jnp.asarray(heads),)))
    (of_heads,) = grad.specialists
    assert not of_heads[..., 1, :].any()
    assert of_heads[..., 0, :].all()
    organ = (label == 1)[0]
    assert jnp.isfinite(grad.generalist).all()
    # In the background organ 2 may rise at the cost of organ 1, and does not fall against 0.
    ratio = grad.generalist[0, ..., 2] / grad.generalist[0, ..., 0]
    expected = np.exp(generalist[0, ..., 2] - generalist[0, ..., 0])
    np.testing.assert_allclose(ratio[~organ], expected[~organ], rtol=1e-3)


def test_truth_that_is_pasted_is_known_where_nothing_hides():
    label = jnp.array([[[0, 1]], [[0, 1]]], jnp.uint8)
    method = train_step.make_method(tiny(**{"method.copy_paste": 0.5}))
    annotated = jnp.concatenate([FIRST, ALL])
    truth = method._truth(base.Labelled(None, label, annotated=annotated))
    assert (
        truth.confident.tolist() == truth.consistent.tolist() == [[[False, True]], [[True, True]]]
    )
    assert isinstance(truth, pseudo_labels.PseudoLabels)


@pytest.mark.parametrize("ihed", [True, False])
def test_organs_that_a_pasted_image_may_hide_get_no_gradient(ihed):
    """Whatever teaches: where whole images are pasted, the terms count on known pixels alone."""
    config = tiny(**{"method.copy_paste": 1.0, "method.cutmix": 1.0, "method.ihed": ihed})
    batch = tiny_batch(config)
    batch["labelled"]["annotated"] = np.array([[True, False]] * 2).reshape(2, 1, 1, 2)
    batch["labelled"]["label"] %= 2
    method, mesh = train_step.make_method(config), devices.local_mesh()
    views = train_step.make_views(method, mesh, batch, jax.random.key(0))
    views["keep"] = jnp.zeros_like(views["keep"])
    state = train_step.init_state(method, mesh)
    (pair,) = method.passes(state.params, state, views, jax.random.key(1)).pairs
    np.testing.assert_array_equal(pair.where, views["labelled"]["label"] > 0)
    _, coverage = method.unsupervised([pair])
    assert 0 < pair.where.mean() < 1
    assert coverage["cover/e"] == pytest.approx(pair.where.mean())
    assert coverage["cover/s"] == pytest.approx(pair.where.mean())


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("bcp", "urpc")]


@pytest.mark.parametrize("method", ["supervised", "cgs", *SLOWLY])
def test_a_step_on_partly_annotated_images(method):
    """The networks do learn, and a CutMix of two images knows of each pixel whose it is."""
    fields = (
        {"model.channels": (4, 4, 4, 8), "model.dropout": (0.0,) * 4} if method == "urpc" else {}
    )
    if method == "supervised":
        fields = {"method.cutmix": 1.0}
    config = tiny(method, **fields)
    batch = tiny_batch(config)
    batch["labelled"]["annotated"] = np.array([[True, False], [True, True]]).reshape(2, 1, 1, 2)
    batch["labelled"]["label"][0] %= 2
    if method == "supervised":
        del batch["unlabelled"]
    made, mesh = train_step.make_method(config), devices.local_mesh()
    views = train_step.make_views(made, mesh, batch, jax.random.key(0))
    if method == "supervised":
        annotated = views["labelled"]["annotated"]
        assert annotated.shape == (2, 16, 16, 2)
        assert 0 < annotated[..., 1].sum() < annotated[..., 1].size
        assert annotated[..., 0].all()
    state = train_step.init_state(made, mesh)
    step, seed = train_step.make_train_step(made, mesh), np.uint32(0)
    losses_of = []
    for _ in range(8):
        state, metrics = step(state, batch, seed)
        losses_of.append(float(metrics["sup"]))
    assert np.isfinite(losses_of).all()
    assert np.mean(losses_of[-3:]) < np.mean(losses_of[:3])
