"""Losses and masks against numbers made by hand, and steps that learn."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.methods import cgs, losses, pseudo_labels
from cgs_jax.models.network import Outputs
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
                ("cgs:cps", {"cutmix": 1.0, "jitter": True}),
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
    assert train_step.seed_of(tiny(seed=5)) == 5
    kernels = []
    for seed in (0, 1, 1):
        own = tiny(seed=seed)
        state = train_step.init_state(train_step.make_method(own), make_mesh(own))
        kernels.append(np.asarray(state.params["backbone"]["down0"]["conv1"]["kernel"]))
    assert (kernels[0] != kernels[1]).all()
    np.testing.assert_array_equal(kernels[1], kernels[2])
