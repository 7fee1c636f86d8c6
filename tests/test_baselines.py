"""The other methods: what they do against cases made by hand, and CGS laid over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from cgs_jax.methods import ad_mt, augment, base, cgs, pseudo_labels
from cgs_jax.models import unet
from cgs_jax.models.heads import Pyramid
from cgs_jax.models.network import Outputs, build
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from configs import acdc, nnunet
from steps import tiny, tiny_batch


def logits_of(probs):
    return Outputs(jnp.log(jnp.asarray(probs, jnp.float32)), None)


def test_mean_teacher_by_hand():
    student, teacher = (
        logits_of([[[[0.5, 0.5], [0.9, 0.1]]]]),
        logits_of([[[[0.5, 0.5], [0.4, 0.6]]]]),
    )
    method = train_step.make_method(tiny("mean_teacher"))
    terms, _ = method.unsupervised([base.Pair(student, teacher)])
    np.testing.assert_allclose(terms["unsup/mse"], 0.25 / 2, rtol=1e-5)
    for name, fields, begin in (  # 1/30 and a half of 60 steps
        ("mean_teacher", {}, 2),
        ("ua_mt", {"method.begin": 0.5}, 30),
    ):
        beginning = train_step.make_method(tiny(name, **fields))
        assert beginning.weight(begin - 1) == 0 < beginning.weight(begin)
    sure = jnp.array([[[False, True]]])
    terms, cover = train_step.make_method(tiny("ua_mt")).unsupervised(
        [base.Pair(student, teacher, sure)]
    )
    np.testing.assert_allclose(terms["unsup/mse"], 0.25, rtol=1e-5)
    assert cover["cover/sure"] == 0.5


def test_fixmatch_by_hand():
    """One of two pixels is sure; it alone counts, in the cross-entropy over all pixels."""
    student, teacher = (
        logits_of([[[[0.5, 0.5], [0.9, 0.1]]]]),
        logits_of([[[[0.01, 0.99], [0.4, 0.6]]]]),
    )
    terms, cover = train_step.make_method(tiny("fixmatch")).unsupervised(
        [base.Pair(student, teacher)]
    )
    np.testing.assert_allclose(terms["unsup/ce"], -np.log(0.5) / 2, rtol=1e-5)
    dice = (1 + (1 - 2 * 0.5 / (0.25 + 1))) / 2
    np.testing.assert_allclose(terms["unsup/dice"], dice, rtol=1e-5)
    assert cover["cover/sure"] == 0.5


def test_cps_by_hand():
    first, second = logits_of([[[[0.2, 0.8], [0.9, 0.1]]]]), logits_of([[[[0.3, 0.7], [0.4, 0.6]]]])
    method = train_step.make_method(tiny("cps"))
    terms, _ = method.unsupervised([base.Pair(first, second), base.Pair(second, first)])
    expected = -np.log([0.8, 0.1, 0.7, 0.4]).sum() / 2
    np.testing.assert_allclose(terms["unsup/ce"], expected, rtol=1e-5)


def test_unimatch_by_hand():
    """Half of the weight on the perturbed stream; unsure pixels do not count."""
    method = train_step.make_method(tiny("unimatch"))
    student = logits_of([[[[0.5, 0.5], [0.9, 0.1]]]])
    sure, unsure = logits_of([[[[0.01, 0.99], [0.4, 0.6]]]]), logits_of([[[[0.5, 0.5]] * 2]])
    dice = (1 + (1 - 2 * 0.5 / (0.25 + 1))) / 2
    for teachers, expected in (
        ((sure, unsure, unsure), dice / 4),
        ((unsure, unsure, sure), dice / 2),
    ):
        pairs = [base.Pair(student, teacher) for teacher in teachers]
        terms, _ = method.unsupervised(pairs)
        np.testing.assert_allclose(sum(terms.values()), expected, rtol=1e-5)


def test_urpc_by_hand():
    """Two scales of one pixel and another where they agree: the mean is between, and both differ
    from it by as much."""
    fine, coarse = [[[[0.8, 0.2], [0.5, 0.5]]]], [[[[0.4, 0.6], [0.5, 0.5]]]]
    log = lambda x: jnp.log(jnp.asarray(x))  # noqa: E731
    student = Outputs(log(fine), None, log(coarse)[..., None, :])
    terms, _ = train_step.make_method(tiny("urpc")).unsupervised([base.Pair(student, None)])
    mean = np.array([0.6, 0.4])
    variance = [np.sum(mean * np.log(mean / p)) for p in ([0.8, 0.2], [0.4, 0.6])]
    rectified = [0.04 * np.exp(-v) / (np.exp(-v) + 1) for v in variance]
    np.testing.assert_allclose(terms["unsup/mse"], np.mean(rectified), rtol=1e-4)
    np.testing.assert_allclose(terms["unsup/variance"], np.mean(variance) / 2, rtol=1e-4)
    label = jnp.array([[[0, 1]]])
    terms = base.supervised_loss(base.Labelled(student, label))
    expected = -np.mean(np.log([0.8, 0.5, 0.4, 0.5]))
    np.testing.assert_allclose(terms["sup/generalist_ce"], expected, rtol=1e-5)


def test_pyramid_perturbs_its_maps_in_training_only():
    config = tiny("urpc", **{"model.channels": (4, 4, 4, 8, 8), "model.dropout": (0.0,) * 5})
    method = train_step.make_method(config)
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    variables = jax.jit(method.network.init)(jax.random.key(1), image)
    shape = (2, 16, 16, 3, 3)
    assert jax.eval_shape(method.network.apply, variables, image).pyramid.shape == shape
    stats = {"batch_stats": variables["batch_stats"]}
    forward = jax.jit(method.forward)
    one, other = (forward(variables["params"], stats, image, jax.random.key(k))[0] for k in (2, 3))
    np.testing.assert_array_equal(one.generalist, other.generalist)
    for i in range(3):
        assert jnp.abs(one.pyramid[..., i, :] - other.pyramid[..., i, :]).max() > 0, i
    coarse = np.asarray(one.pyramid[..., 2, :]).reshape(2, 2, 8, 2, 8, 3)
    assert (coarse == coarse[:, :, :1, :, :1]).all()  # a pixel of 1/8 is 8 x 8


def test_perturbations_of_the_pyramid():
    """Noise of 30 %; the most active pixels of each slice left out; half of the values dropped."""
    perturb = jax.jit(Pyramid(3)._perturb, static_argnums=1)
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=1.0, maxval=2.0)
    noisy = perturb(x, 1, jax.random.key(1)) / x
    assert 0.7 <= noisy.min() < 0.75
    assert 1.25 < noisy.max() <= 1.3
    np.testing.assert_allclose(noisy[0], noisy[3], rtol=1e-5)  # one for the batch
    active = np.asarray(x).mean(-1)
    kept = np.asarray(perturb(x, 2, jax.random.key(2))).any(-1)
    for activity, keep in zip(active, kept, strict=True):
        assert 0 < keep.sum() < keep.size
        assert activity[keep].max() < activity[~keep].min()
        assert 0.7 * activity.max() <= activity[~keep].min() <= activity.max()
    dropped = np.asarray(perturb(x, 3, jax.random.key(3)) / x)
    assert set(dropped.round(5).ravel()) == {0, 2}


def test_ict_blends_images_and_what_the_teacher_says():
    config = tiny("ict", **{"model.dropout": (0.0,) * 2})
    method, seen = train_step.make_method(config), []
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    views = {"labelled": {"image": image, "label": jnp.zeros((2, 16, 16), jnp.uint8)}}
    views["unlabelled"] = {"weak": jnp.stack([jnp.zeros((16, 16, 1)), jnp.ones((16, 16, 1))])}
    method.student = lambda params, stats, labelled, unlabelled, key: (
        seen.append(unlabelled) or (Outputs(labelled, None), Outputs(unlabelled, None), {})
    )
    probs = jnp.array([[0.9, 0.1], [0.2, 0.8]])[:, None, None] * jnp.ones((2, 16, 16, 2))
    method.teacher = lambda state, image, key: (Outputs(jnp.log(probs), None), {})
    (pair,) = method.passes({}, TrainState(0, {}, {}, None, {}), views, jax.random.key(1)).pairs
    (blended,) = seen
    share = 1 - blended[0, 0, 0, 0], blended[1, 0, 0, 0]  # of each image itself
    assert 0 < share[0] != share[1] < 1
    for i in (0, 1):
        expected = share[i] * probs[i] + (1 - share[i]) * probs[1 - i]
        np.testing.assert_allclose(jnp.exp(pair.teacher.generalist[i]), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("mean_teacher", 1), ("ua_mt", 1), ("ict", 1), ("fixmatch", 1), ("cps", 2), ("urpc", 1),
        ("unimatch", 3), ("bcp", 1), ("ad_mt", 1), ("cgs:bcp", 1), ("cgs:urpc", 1), ("cgs:cps", 2),
        ("cmems", 4), ("cgs:cmems", 4),
    ],
)  # fmt: skip
def test_every_term_has_a_gradient_where_it_counts(name, pairs):
    """At the student's outputs; where a mask leaves pixels out, not there."""
    method = train_step.make_method(tiny(name))
    for section in (method.config.method, method.config.get("cgs", {})):
        if "tau" in section:
            section.tau = 0.4
    keys = jax.random.split(jax.random.key(0), 6 * pairs)
    where = jnp.arange(8)[None, :, None] < jnp.full((2, 1, 8), 5)

    def outputs(keys):
        shapes = (2, 8, 8, 3), (2, 8, 8, 2, 3), (2, 8, 8, 2, 3)
        generalist, heads, pyramid = map(jax.random.normal, keys, shapes)
        return Outputs(generalist, (heads,), pyramid)

    students = [outputs(keys[6 * i : 6 * i + 3]) for i in range(pairs)]
    teachers = [outputs(keys[6 * i + 3 : 6 * i + 6]) for i in range(pairs)]
    masked = "bcp" in name or name == "ua_mt"

    def terms(students):
        made = map(base.Pair, students, teachers, [where if masked else None] * pairs)
        state = TrainState(jnp.asarray(30), {}, {}, None, {})
        method.passes = lambda *_: base.Passes([], list(made), {}, {})
        metrics = method.loss({}, state, {}, None)[1][2]
        return {n: v for n, v in metrics.items() if n.endswith(("ce", "dice", "mse", "variance"))}

    gradients = jax.jit(jax.jacrev(terms))(students)
    assert gradients
    for which, of_students in gradients.items():
        gradient = jax.tree.leaves(of_students)
        assert any(jnp.abs(g).max() > 0 for g in gradient), which
        assert all(jnp.isfinite(g).all() for g in gradient), which
        if masked:
            assert all((g[:, 5:] == 0).all() for g in gradient), which


def test_perturbed_stream_loses_half_of_the_channels():
    x = jnp.ones((64, 2, 2, 2 * 32))  # two pixels packed
    y = np.asarray(unet.drop_channels(x, 2, jax.random.key(0))).reshape(64, 2, 2, 2, 32)
    assert set(np.unique(y)) == {0, 2}
    assert (y == y[:, :1, :1, :1]).all()  # whole channels
    assert 0.9 < y.mean() < 1.1
    config = tiny("unimatch")
    network = build(config, specialists=False)
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    variables = jax.jit(network.init)(jax.random.key(1), image)
    rngs = {"dropout": jax.random.key(2)}
    clean = jax.jit(network.apply)(variables, image)
    apply = jax.jit(lambda v, rngs: network.apply(v, image, perturb=True, rngs=rngs))
    both = apply(variables, rngs).generalist
    np.testing.assert_allclose(both[:2], clean.generalist, atol=1e-5)
    assert np.abs(both[2:] - clean.generalist).max() > 1e-3


def test_turns_of_ad_mt():
    second = ad_mt.second_is_active(seed=0, total_steps=5000)
    assert len(second) == 5001
    assert not second[0]
    turns = np.diff(np.flatnonzero(np.diff(second)))
    assert turns.min() >= 1
    assert turns.max() <= 50
    assert 20 < turns.mean() < 31


def test_ad_mt_teachers_by_hand():
    """The surer teacher weighs more; where they differ, a surer student decides."""
    first = logits_of([[[[0.5, 0.5], [0.9, 0.1], [0.6, 0.4]]]])
    second = logits_of([[[[1.0, 1e-9], [0.8, 0.2], [0.3, 0.7]]]])
    student = logits_of([[[[0.1, 0.9], [0.1, 0.9], [0.95, 0.05]]]])
    probs = np.exp(ad_mt.together(first, second, student).generalist)[0, 0]
    share = np.exp(-1) / (1 + np.exp(-1))  # entropies of 1 bit and none
    np.testing.assert_allclose(probs[0], [1 - share / 2, share / 2], rtol=1e-4)
    assert 0.8 < probs[1, 0] < 0.9  # both teachers agree: the student has no say
    np.testing.assert_allclose(probs[2], [0.95, 0.05], rtol=1e-4)  # they differ


def test_ad_mt_moves_one_teacher_at_a_time():
    method = train_step.make_method(tiny("ad_mt", total_steps=300))
    init, after_update = jax.jit(method.init), jax.jit(method.after_update)
    params, model_state, extra = init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    moved = jax.tree.map(lambda x: x + 1, params)
    turn = 100 + int(np.argmax(method.second[100:]))
    for step in (turn, turn + int(np.argmin(method.second[turn:]))):
        state = TrainState(jnp.asarray(step + 1), moved, model_state, None, extra)
        teachers = after_update(state).extra["teachers"]
        active = int(method.second[step])
        gaps = [
            max(
                float(jnp.abs(a - b).max())
                for a, b in zip(*map(jax.tree.leaves, pair), strict=True)
            )
            for pair in ((t["params"], params) for t in teachers)
        ]
        assert gaps[1 - active] == 0
        np.testing.assert_allclose(gaps[active], 1 / (step // 2 - 49), rtol=1e-4)
    state = TrainState(jnp.asarray(4), moved, model_state, None, extra)
    for teacher in after_update(state).extra["teachers"]:  # both copy the student at first
        jax.tree.map(np.testing.assert_array_equal, teacher["params"], moved)


def test_largest_components():
    rng = np.random.default_rng(0)
    labels = np.uint8((rng.random((6, 24, 24)) < 0.5) * rng.integers(1, 4, (6, 24, 24)))
    labels[0] = 0
    ours = np.asarray(jax.jit(lambda x: pseudo_labels.largest_components(x, 3))(labels))
    for label, kept in zip(labels, ours, strict=True):
        for k in (1, 2, 3):
            parts, count = ndimage.label(label == k, np.ones((3, 3)))
            sizes = np.bincount(parts.ravel())[1:]
            assert (kept == k).sum() == max(sizes, default=0)
            if count:
                (part,) = set(parts[kept == k])
                assert sizes[part - 1] == sizes.max()


def test_bcp_pastes_and_says_what_is_labelled():
    config = tiny("bcp", **{"method.pretrain": 1 / 12, "total_steps": 60})
    method = train_step.make_method(config)
    batch = jax.tree.map(jnp.asarray, tiny_batch(config))
    image = jnp.stack([jnp.zeros((16, 16, 1)), jnp.ones((16, 16, 1))])
    views = {"labelled": {"image": image, "label": batch["labelled"]["label"]}}
    views["unlabelled"] = {"weak": image + 5}
    views["keep"] = augment.box_keep(jnp.array([2, 3, 10, 10]), (16, 16))
    seen = []
    method.forward = lambda params, stats, image, key: (
        seen.append(image) or Outputs(image, None),
        {},
    )
    for step, outside, inside in ((0, [0, 1], [1, 0]), (5, [0, 6], [5, 1])):
        state = TrainState(jnp.asarray(step), {}, {}, None, {"params": {}, "model_state": {}})
        passes = method.passes({}, state, views, jax.random.key(0))
        mixed = seen[-1][..., 0]
        assert mixed[:, 0, 0].tolist() == outside
        assert mixed[:, 5, 5].tolist() == inside
        (labelled,), (pair,) = passes.labelled, passes.pairs
        where = np.asarray(jnp.broadcast_to(labelled.where, mixed.shape))
        assert where.all() == (step == 0)
        np.testing.assert_array_equal(where, ~np.asarray(pair.where))
        np.testing.assert_array_equal(where, np.asarray(mixed) < 2)


def test_cps_each_network_has_its_own_terms():
    config = tiny("cps")
    method = train_step.make_method(config)
    init = jax.jit(method.init)
    params, model_state, extra = init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    state = TrainState(jnp.asarray(1), params, model_state, None, extra)
    batch = jax.tree.map(jnp.asarray, tiny_batch(config))
    for stream in batch.values():
        stream["image"] = augment.to_image(stream["image"])
    views = jax.jit(method.views)(batch, jax.random.key(1))

    def second_term(params):
        passes = method.passes(params, state, views, jax.random.key(2))
        return method.unsupervised(passes.pairs[1:])[0]["unsup/ce"]

    first, second = jax.jit(jax.grad(second_term))(params).values()
    assert max(jax.tree.leaves(jax.tree.map(lambda g: float(jnp.abs(g).max()), first))) == 0
    assert max(jax.tree.leaves(jax.tree.map(lambda g: float(jnp.abs(g).max()), second))) > 0


def test_shares_of_pixels_stay_shares():
    """Two pairs, as of CPS: the mean over both."""
    options = tiny("cgs:cps").cgs
    shapes = (2, 8, 8, 3), (2, 8, 8, 2, 3)
    generalist, heads = (5 * jax.random.normal(jax.random.key(0), shape) for shape in shapes)
    outputs = Outputs(generalist, (heads,))
    _, one = cgs.consistency([base.Pair(outputs, outputs)], options)
    _, two = cgs.consistency([base.Pair(outputs, outputs)] * 2, options)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-6)


def test_pairs_count_by_their_share():
    """Terms of a pair with a quarter are a quarter of its own, and sums go over pairs."""
    options = tiny("cgs:cmems").cgs
    shapes = (2, 8, 8, 3), (2, 8, 8, 2, 3)

    def outputs(seed):
        key = jax.random.key(seed)
        generalist, heads = (5 * jax.random.normal(key, shape) for shape in shapes)
        return Outputs(generalist, (heads,))

    pairs = [base.Pair(outputs(i), outputs(i + 1)) for i in (0, 2)]
    (one, _), (other, _) = (cgs.consistency([pair], options) for pair in pairs)
    shared = [pairs[0]._replace(share=0.25), pairs[1]._replace(share=0.5)]
    both, _ = cgs.consistency(shared, options)
    for name in one:
        np.testing.assert_allclose(both[name], one[name] / 4 + other[name] / 2, rtol=1e-5)


def test_recipes_weigh_only_what_cgs_adds():
    own_data = nnunet.get_config("method=cgs,base=unimatch")
    assert (own_data.cgs.lambda_max, own_data.method.lambda_max) == (0.5, 2.0)
    assert nnunet.get_config("method=cgs").method.lambda_max == 0.5
    assert nnunet.get_config("method=supervised").method.get("lambda_max") is None
    for name in ("versemi", "cmems"):
        assert nnunet.get_config(f"method={name}").method.lambda_max == 1.0
    weights = [acdc.get_config(f"recipe={name}").method.lambda_max for name in ("paper", "patches")]
    assert weights == [2.0, 1.0]


def test_cgs_adds_its_terms_to_those_of_the_method_below():
    """Either has a threshold, a weight and a ramp of its own."""
    fields = {"method.begin": 0.0, "method.lambda_max": 3.0, "cgs.lambda_max": 0.5, "cgs.tau": 0.7}
    method = train_step.make_method(tiny("cgs:mean_teacher", **fields))
    alone = train_step.make_method(tiny("mean_teacher", **{"method.begin": 0.0}))
    assert (method.specialists, alone.specialists) == (True, False)
    key = jax.random.key(0)
    shapes = (2, 8, 8, 3), (2, 8, 8, 2, 3)
    generalist, heads = (jax.random.normal(key, shape) for shape in shapes)
    student = Outputs(generalist, (heads,))
    generalist, heads = (3 * jax.random.normal(jax.random.key(1), shape) for shape in shapes)
    teacher = Outputs(generalist, (heads,))
    where = jax.random.bernoulli(key, 0.5, (2, 8, 8))
    pairs = [base.Pair(student, teacher, where)]
    below, _ = alone.unsupervised(pairs)
    own, _ = cgs.consistency_losses(student, pseudo_labels.from_teacher(teacher, 0.7), where)
    method.passes = lambda *_: base.Passes([], pairs, "statistics", "extra")
    state = TrainState(jnp.asarray(60), {}, {}, None, {})  # the end of the ramps
    loss, (model_state, extra, metrics) = method.loss({}, state, {}, None)
    np.testing.assert_allclose(loss, 3 * below["unsup/mse"] + 0.5 * sum(own.values()), rtol=1e-5)
    assert (model_state, extra) == ("statistics", "extra")
    halfway = method.loss({}, state.replace(step=jnp.asarray(30)), {}, None)[1][2]
    np.testing.assert_allclose(halfway["cgs/lambda"], 0.5 * np.exp(-1.25), rtol=1e-5)
    np.testing.assert_allclose(metrics["unsup/mse"], below["unsup/mse"], rtol=1e-6)
    for name, value in own.items():
        np.testing.assert_allclose(metrics[f"cgs/{name[6:]}"], value, rtol=1e-6)
    elsewhere = student._replace(generalist=jnp.where(where[..., None], student.generalist, 9.0))
    again, _ = cgs.consistency_losses(elsewhere, pseudo_labels.from_teacher(teacher, 0.7), where)
    np.testing.assert_allclose(again["unsup/G_from_s_ce"], own["unsup/G_from_s_ce"], rtol=1e-6)
