"""VerSemi: its losses and targets against numbers made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import base, batches, pseudo_labels, versemi
from cgs_jax.models.network import Outputs
from cgs_jax.models.prompted import merge
from cgs_jax.runtime.devices import make_mesh
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny, tiny_batch


def prompts_of(probs):
    """Logits [..., 2] whose foreground has these probabilities [...]."""
    probs = jnp.asarray(probs, jnp.float32)
    return jnp.log(jnp.stack([1 - probs, probs], -1))


def dice(p, y):
    y = np.asarray(y, np.float64)
    return 1 - (2 * (p * y).sum() + 1e-5) / ((p * p).sum() + (y * y).sum() + 1e-5)


def test_dice_by_hand():
    """The foreground of two pixels of two images, pooled; a soft target counts by its square."""
    odds = prompts_of([[0.8], [0.4]])[..., 1] - prompts_of([[0.8], [0.4]])[..., 0]
    hard = versemi.dice_loss(odds, jnp.array([[True], [False]]))
    assert hard == pytest.approx(1 - (1.6 + 1e-5) / (0.64 + 0.16 + 1 + 1e-5), abs=1e-6)
    soft = versemi.dice_loss(odds, jnp.array([[0.5], [1.0]]))
    assert soft == pytest.approx(1 - (1.6 + 1e-5) / (0.8 + 1.25 + 1e-5), abs=1e-6)
    only = versemi.dice_loss(odds, jnp.array([[0.5], [1.0]]), jnp.array([[False], [True]]))
    assert only == pytest.approx(1 - (0.8 + 1e-5) / (0.16 + 1 + 1e-5), abs=1e-6)
    nothing = versemi.dice_loss(odds, jnp.zeros((2, 1)), jnp.zeros((2, 1), bool))
    assert nothing == 0


def test_a_class_that_is_nowhere_has_no_dice_loss():
    """Or it would drive its probability to nothing: image 1 is asked for a class that it has not,
    and is as sure as where that pull is strongest."""
    probs = np.array([[0.8, 0.4], [2e-3, 2e-3]])
    odds = jnp.log(probs / (1 - probs))
    target = jnp.array([[True, False], [False, False]])
    loss, gradient = jax.value_and_grad(versemi.dice_loss)(odds, target, None, jnp.eye(2))
    assert loss == pytest.approx(dice(probs[0], [1, 0]), abs=1e-6)
    assert (np.abs(gradient) > 0).tolist() == [[True, True], [False, False]]
    together = versemi.dice_loss(odds, target)
    assert together == pytest.approx(dice(probs.ravel(), [1, 0, 0, 0]), abs=1e-6)
    loss, gradient = jax.value_and_grad(versemi.dice_loss)(odds[1:], target[1:])
    assert loss == 0
    assert (gradient == 0).all()


def test_loss_of_the_drawn_class_by_hand():
    """Image 0 is asked for class 1, image 1 for class 2; other prompts have no say."""
    label = jnp.array([[[1, 0]], [[1, 2]]])
    probs = np.full((2, 1, 2, 3), 0.123)
    probs[0, ..., 0], probs[1, ..., 1] = [[0.9, 0.2]], [[0.3, 0.6]]
    student = Outputs(None, None, None, prompts_of(probs))
    asked = versemi.Asked(base.Labelled(student, label), (jnp.array([0, 1]),))
    each = [dice(np.array([0.9, 0.2]), [1, 0]), dice(np.array([0.3, 0.6]), [0, 1])]
    pooled = dice(np.array([0.9, 0.2, 0.3, 0.6]), [1, 0, 0, 1])
    for together, expected in ((True, pooled), (False, np.mean(each))):
        terms = versemi.task_loss(asked, together)
        ce = -np.log([0.9, 0.8, 0.7, 0.6]).mean()
        np.testing.assert_allclose(terms["sup/task_ce"], ce, rtol=1e-5)
        np.testing.assert_allclose(terms["sup/task_dice"], expected, rtol=1e-5)
    same = asked._replace(tasks=(jnp.array([1, 1]),))
    terms = [versemi.task_loss(same, together)["sup/task_dice"] for together in (True, False)]
    np.testing.assert_allclose(*terms, rtol=1e-6)


def test_auxiliary_loss_by_hand():
    """One image of class 1 with a box of the other one, on the right half of 4 x 4.

    The same class in both: both targets are the whole mix. Other classes: each is absent from the
    part of the other image where it is not annotated, and has its label there where it is.
    """
    probs = np.random.default_rng(0).uniform(0.1, 0.9, (1, 4, 4, 3))
    student = Outputs(None, None, None, prompts_of(probs))
    left = np.arange(4) < 2
    own, other = np.zeros((4, 4), int), np.zeros((4, 4), int)
    own[1:3], other[2:] = 1, 2

    def loss(label, *tasks):
        asked = base.Labelled(student, jnp.asarray(label)[None])
        asked = versemi.Asked(asked, tuple(jnp.array([t]) for t in tasks))
        both = [versemi.auxiliary_loss(asked, pooled) for pooled in (True, False)]
        np.testing.assert_allclose(*both, rtol=1e-6)  # of one image
        return both[0]

    first, second = probs[0, ..., 0], probs[0, ..., 1]
    mixed = np.where(left, own, other)
    expected = (dice(first, (own == 1) * left) + dice(second, (other == 2) * ~left)) / 2
    np.testing.assert_allclose(loss(mixed, 0, 1), expected, rtol=1e-5)
    same = np.where(left, own, other == 2)  # the other image, too, has class 1
    np.testing.assert_allclose(loss(same, 0, 0), dice(first, same), rtol=1e-5)
    other[0] = 1  # annotated for both classes
    mixed = np.where(left, own, other)
    expected = (dice(first, mixed == 1) + dice(second, mixed == 2)) / 2
    np.testing.assert_allclose(loss(mixed, 0, 1), expected, rtol=1e-5)


def test_aggregate_loss_by_hand():
    """Two pixels: the surest of two classes says .7 and .4, the synthetic task .6 and .2."""
    prompts = prompts_of([[[[0.7, 0.1, 0.6], [0.3, 0.4, 0.2]]]])
    expected = dice(np.array([0.6, 0.2]), [0.7, 0.4])
    for detach in (True, False):
        np.testing.assert_allclose(versemi.aggregate_loss(prompts, detach), expected, rtol=1e-5)
        gradient = np.asarray(jax.grad(versemi.aggregate_loss)(prompts, detach))[0, 0]
        reached = np.abs(gradient).max(-1) > 0
        surest = [[True, False], [False, True]]
        np.testing.assert_array_equal(reached[:, :2], np.zeros((2, 2)) if detach else surest)
        assert reached[:, 2].all()


@pytest.mark.parametrize("known", ["", "all", "partly", "of another member"])
def test_what_a_step_asks(known):
    """Mixes, targets and doubt of three labelled and four unlabelled 4 x 4 images, in numpy; if all
    classes are known to be annotated, or those that are not are of another data set, the numbers
    are those without such knowledge."""
    rng = np.random.default_rng(0)
    fields = {"method.lambda_max": 0.7, "method.pooled_dice": True}
    method = train_step.make_method(tiny("versemi", **fields))
    label = rng.integers(0, 3, (3, 4, 4))
    annotated, partly = np.ones((3, 1, 1, 2), bool), known == "partly"
    if known in ("partly", "of another member"):  # the second image has class 2 alone
        annotated[1, ..., 0] = False
        label[1][label[1] == 1] = 0
    image, weak = rng.uniform(size=(3, 4, 4, 1)), rng.uniform(size=(4, 4, 4, 1))
    keep, outside = rng.integers(0, 2, (3, 4, 4)) > 0, rng.integers(0, 2, (4, 4, 4)) > 0
    plain, mixed, boxed = (rng.uniform(0.05, 0.95, (n, 4, 4, 3)) for n in (3, 3, 4))
    task, partner = np.array([0, 1, 1]), np.array([1, 0, 1])  # of the image before
    views = {
        "labelled": {"image": image, "label": label, "task": task, "keep": keep},
        "unlabelled": {"weak": weak, "keep": outside},
    }
    if known:
        views["labelled"]["annotated"] = annotated
    if known == "of another member":
        views["labelled"]["member"] = annotated
    views, seen = jax.tree.map(jnp.asarray, views), []

    def student(params, model_state, both, unlabelled, key):
        seen.extend([*batches.split(both, 3), unlabelled])
        both = batches.join(prompts_of(plain), prompts_of(mixed))
        return Outputs(both, None, None, both), Outputs(boxed, None, None, prompts_of(boxed)), {}

    method.student = student
    state = TrainState(jnp.asarray(3), {}, {}, None, {})
    loss, (_, _, metrics) = method.loss({}, state, views, None)

    before, first = [2, 0, 1], [0, 1, 2, 0]
    np.testing.assert_array_equal(seen[0], np.float32(image))
    mix = np.where(keep[..., None], image, image[before])
    np.testing.assert_array_equal(seen[1], np.float32(mix))
    mix = np.where(outside[..., None], weak, image[first])
    np.testing.assert_array_equal(seen[2], np.float32(mix))
    y = np.where(keep, label, label[before])
    unmarked = partly & ~annotated & (label == 0)[..., None]
    hidden = (plain[..., :2] > 0.5) & unmarked
    assert hidden.any() == partly
    everywhere = ~np.where(keep[..., None], hidden, hidden[before]).any(-1)
    counts = ~np.where(keep[..., None], unmarked, unmarked[before])
    in_box = ~outside & ~hidden[first].any(-1)
    rows = np.arange(3)

    def asked_for(k):
        where = counts[rows, :, :, k]
        return dice(mixed[rows, :, :, k] * where, (y == k[:, None, None] + 1) * where)

    own, target = plain[rows, :, :, task], label == task[:, None, None] + 1
    expected = {
        "sup/task_ce": -np.log(np.where(target, own, 1 - own)).mean(),
        "sup/task_dice": dice(own, target),
        "sup/synthetic_dice": dice(mixed[..., 2] * everywhere, (y > 0) * everywhere),
        "sup/auxiliary_dice": (asked_for(task) + asked_for(partner)) / 2,
        "unsup/aggregate_dice": dice(boxed[..., 2], boxed[..., :2].max(-1)),
        "unsup/box_dice": dice(boxed[..., 2] * in_box, (label[first] > 0) * in_box),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    parts = {s: sum(v for n, v in expected.items() if n.startswith(s)) for s in ("sup/", "unsup/")}
    np.testing.assert_allclose(metrics["sup"], parts["sup/"], rtol=1e-4)
    np.testing.assert_allclose(loss, parts["sup/"] + 0.7 * parts["unsup/"], rtol=1e-4)
    if known:
        np.testing.assert_allclose(metrics["cover/certain"], everywhere.mean(), rtol=1e-6)
        assert everywhere.all() != partly
    assert ("cover/certain" in metrics) == bool(known)


def test_terms_and_ramp_can_be_chosen():
    method = train_step.make_method(tiny("versemi", **{"method.ramp": 1.0}))
    assert method.weight(30) == pytest.approx(np.exp(-1.25))
    assert train_step.make_method(tiny("versemi")).weight(0) == 1
    student = Outputs(None, None, None, prompts_of(np.full((1, 4, 4, 3), 0.3)))
    labelled = base.Labelled(student, jnp.ones((1, 4, 4), int))
    task = jnp.array([0])
    asked = [versemi.Asked(labelled, tasks) for tasks in ((task,), (task, task), ())]
    always = {"sup/task_ce", "sup/task_dice", "sup", "unsup", "loss", "lambda"}
    names = {"syn": "sup/synthetic", "aux": "sup/auxiliary", "agg": "unsup/aggregate"}
    for terms in ((), *[(name,) for name in versemi.TERMS]):
        method = train_step.make_method(tiny("versemi", **{"method.terms": terms}))
        _, metrics = method.objective(base.Passes(asked, [], {}, {}), 0)
        assert set(metrics) - always == {f"{names.get(n, 'unsup/box')}_dice" for n in terms}
        train_step.Metrics.of(metrics)


def boxes_of(keep):
    """Side, and first row and column, of each box; each is a square."""
    inside = ~np.asarray(keep)
    rows, columns = inside.any(2), inside.any(1)
    np.testing.assert_array_equal(rows.sum(1) * columns.sum(1), inside.sum((1, 2)))
    np.testing.assert_array_equal(rows.sum(1), columns.sum(1))
    return rows.sum(1), rows.argmax(1), columns.argmax(1)


def test_views_draw_annotated_classes_and_boxes():
    config = tiny("versemi", **{"augment.degrees": 0.0})
    config.data.classes = ("a", "b", "c")
    method, count = train_step.make_method(config), 200
    annotated = np.tile([[True, False, True], [False, True, False]], (count // 2, 1))
    image = np.zeros((count, 16, 16, 1), np.float32)
    labelled = {"image": image, "label": np.zeros(image.shape[:3], np.uint8)}
    batch = {"labelled": labelled, "unlabelled": {"image": image}}
    assert set(jax.eval_shape(method.views, batch, jax.random.key(0))["unlabelled"]) == {
        "weak", "strong", "keep"
    }  # fmt: skip
    drawn = lambda v: [v["labelled"]["task"], *(x["keep"] for x in v.values())]  # noqa: E731
    views = jax.jit(lambda batch: drawn(method.views(batch, jax.random.key(0))))
    task = np.asarray(views(batch)[0])
    assert (np.bincount(task, minlength=3) > 40).all()  # uniform, though no class is there
    labelled["annotated"] = annotated[:, None, None]
    task, of_labelled, of_unlabelled = map(np.asarray, views(batch))
    assert annotated[np.arange(count), task].all()
    assert 30 < (task == 0).sum() < 70
    side, *corner = boxes_of(of_labelled)
    assert set(side) == {10}
    assert all(set(places) == set(range(7)) for places in corner)
    side, *corner = boxes_of(of_unlabelled)
    assert set(side) == set(range(4, 10))
    assert all((places.min(), (places + side).max()) == (0, 16) for places in corner)
    side, *_ = boxes_of(versemi.boxes(jax.random.key(0), (2, 96, 96), (2 / 3, 2 / 3)))
    assert set(side) == {64}


def test_merged_generalist_by_hand():
    prompts = prompts_of([[0.3, 0.6, 0.99], [0.1, 0.2, 0.01]])
    expected = [np.array([0.4, 0.3, 0.6]) / 1.3, np.array([0.8, 0.1, 0.2]) / 1.1]
    np.testing.assert_allclose(np.exp(merge(prompts)), expected, rtol=1e-5)
    scores = pseudo_labels.merge(jax.nn.softmax(prompts[..., :2, :]))
    shares = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(merge(prompts)), shares, rtol=1e-5)
    extreme = merge(jnp.array([[[-200.0, 200.0], [200.0, -200.0], [0.0, 0.0]]]))
    assert np.isfinite(extreme).all()


def test_network_has_prompts_in_place_of_a_generalist():
    method = train_step.make_method(tiny("versemi", **{"model.dtype": "bfloat16"}))
    image = jnp.zeros((1, 16, 16, 1))
    params, stats, _ = jax.eval_shape(method.init, jax.random.key(0), image)
    assert set(params) == set(stats["batch_stats"]) == {"backbone", "prompts"}
    state = TrainState(0, params, stats, None, {})
    predicted = jax.eval_shape(method.predict, state, image)
    assert (predicted.shape, predicted.dtype) == ((1, 1, 16, 16, 3), jnp.float32)


def test_every_term_reaches_trunk_and_controller():
    """And of the controller only the rows of the prompts that it asks; the surest class does not
    learn from the synthetic task."""
    method = train_step.make_method(tiny("versemi", **{"model.dropout": (0.0,) * 2}))
    params, stats, _ = jax.jit(method.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 1)))
    state = TrainState(jnp.asarray(0), params, stats, None, {})
    batch = jax.tree.map(jnp.asarray, tiny_batch(method.config))
    keep = jnp.arange(16)[:, None] < jnp.full((2, 16, 16), 6)
    views = {"labelled": batch["labelled"] | {"task": jnp.array([1, 1]), "keep": keep}}
    views["labelled"]["image"] = batch["labelled"]["image"] / 65535
    views["unlabelled"] = {"weak": batch["unlabelled"]["image"] / 65535, "keep": keep}

    def terms(params):
        metrics = method.loss(params, state, views, jax.random.key(2))[1][2]
        return {name: value for name, value in metrics.items() if "/" in name}

    gradients = jax.jit(jax.jacrev(terms))(params)
    assert len(gradients) == 6
    for name, gradient in gradients.items():
        assert np.abs(gradient["backbone"]["down0"]["conv1"]["kernel"]).max() > 0, name
        kernel = np.asarray(gradient["prompts"]["controller_kernel"])
        assert np.isfinite(kernel).all(), name
        assert np.abs(kernel[:8]).max() > 0, name
        asks = [False, True, False] if "task" in name or "aux" in name else [False, False, True]
        assert (np.abs(kernel[8:]).max(1) > 0).tolist() == asks, name


@pytest.mark.parametrize(("labelled", "unlabelled"), [(1, 1), (3, 5), (5, 2)])
def test_any_number_of_images(labelled, unlabelled):
    method = train_step.make_method(tiny("versemi"))
    whole = tiny_batch(method.config, draws=3)
    shapes = {"labelled": labelled, "unlabelled": unlabelled}
    batch = {n: {k: jnp.asarray(v[:m]) for k, v in whole[n].items()} for n, m in shapes.items()}

    def loss(key):
        params, stats, _ = method.init(key, jnp.zeros((1, 16, 16, 1)))
        state = TrainState(jnp.asarray(0), params, stats, None, {})
        views = train_step.make_views(method, make_mesh(method.config), batch, key)
        return method.loss(params, state, views, key)[0]

    assert jax.eval_shape(loss, jax.random.key(0)).shape == ()


def test_cgs_over_it_adds_specialists_on_the_unlabelled_part():
    method = train_step.make_method(tiny("cgs:versemi"))
    rng = np.random.default_rng(0)
    prompts = prompts_of(rng.uniform(0.1, 0.9, (2, 4, 4, 3)))
    specialists = jnp.asarray(rng.normal(size=(2, 4, 4, 2, 3)), jnp.float32)
    student = Outputs(merge(prompts), (specialists,), None, prompts)
    label, task = jnp.asarray(rng.integers(0, 3, (2, 4, 4))), jnp.array([0, 1])
    labelled = base.Labelled(student, label)
    asked = [versemi.Asked(labelled, tasks) for tasks in ((task,), (task, task), ())]
    outside = jnp.arange(4)[:, None] < jnp.full((2, 4, 4), 2)
    pair = base.Pair(student, jax.lax.stop_gradient(student), outside)
    method.method.passes = lambda *_: base.Passes(asked, [pair], {}, {})
    state = TrainState(jnp.asarray(60), {}, {}, None, {})
    loss, (_, _, metrics) = jax.jit(lambda: method.loss({}, state, {}, None))()
    heads = jax.jit(lambda: base.supervised_loss(labelled))()
    for name in ("sup/specialists_ce", "sup/specialists_dice"):
        np.testing.assert_allclose(metrics[name], heads[name], rtol=1e-6)
    assert "sup/generalist_ce" not in metrics
    parts = {n: sum(v for k, v in metrics.items() if k.startswith(n)) for n in ("sup/", "unsup/")}
    added = sum(v for k, v in metrics.items() if k.startswith("cgs/") and "_from_" in k)
    expected = parts["sup/"] + parts["unsup/"] + metrics["cgs/lambda"] * added
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["cover/s"] <= 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method.terms": ("syn", "x")},
            "unknown --config.method.terms x; there are: syn, aux, agg, cons",
        ),
        ({"method.box": (0.5, 1.2)}, "method.box=.* two shares of a side"),
        ({"method.box_unlabelled": (0.6, 0.3)}, "method.box_unlabelled=.*smaller one first"),
    ],
)
def test_options_that_can_not_be(fields, message):
    with pytest.raises(UserError, match=message):
        train_step.make_method(tiny("versemi", **fields))


def test_steps_learn():
    config = tiny("versemi", **{"optimizer.lr": 0.01})  # 20 steps have to do
    method = train_step.make_method(config)
    mesh = make_mesh(config)
    state = train_step.init_state(method, mesh)
    step = train_step.make_train_step(method, mesh)
    batch, seen = jax.tree.map(jnp.asarray, tiny_batch(config)), []
    for _ in range(20):
        state, metrics = step(state, batch, train_step.seed_of(config))
        seen.append(dict(zip(metrics.names, metrics.values.tolist(), strict=True)))
    losses = [row["loss"] for row in seen]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
