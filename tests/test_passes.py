"""Which views networks see, and what teaches what: networks that give back what they are shown."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from cgs_jax.methods import augment, base, batches
from cgs_jax.models.network import Outputs
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny, tiny_batch

SHAPE = (2, 16, 16, 1)


def shown(images):
    return Outputs(images, None)


def views():
    """Of all images other values: labelled 1 and 2, weak 10 and 20, strong 30 and 40."""
    of = lambda *values: jnp.array(values, jnp.float32).reshape(-1, 1, 1, 1) * jnp.ones(SHAPE)  # noqa: E731
    label = jnp.zeros(SHAPE[:-1], jnp.uint8)
    return {
        "labelled": {"image": of(1, 2), "label": label},
        "unlabelled": {"weak": of(10, 20), "strong": of(30, 40)},
    }


def box(at, side):
    keep = augment.box_keep(jnp.array([at, at, side, side]), SHAPE[1:3])
    return jnp.broadcast_to(keep, SHAPE[:-1])


def by_value(name, **fields):
    """A method whose networks give back their input; the student its own of either stream."""
    method = train_step.make_method(tiny(name, **fields))
    method.forward = lambda params, stats, image, key, **_: (shown(image), stats)
    method.student = lambda params, stats, labelled, unlabelled, key: (
        shown(labelled),
        shown(unlabelled),
        stats,
    )
    return method


def passes(method, views, step=0, params=None, extra=None):
    state = TrainState(jnp.asarray(step), params, {}, None, extra)
    return method.passes(params or {}, state, views, jax.random.key(0))


def test_strong_view_is_the_weak_one_jittered():
    """With labels of the weak view, the strong one must lie where that does."""
    plain = {"augment.jitter": 0.0, "augment.flip": 1.0}
    image = jax.random.uniform(jax.random.key(0), (8, 16, 16, 1), minval=0.4, maxval=0.6)
    batch = {"labelled": {"image": image, "label": jnp.zeros((8, 16, 16), jnp.uint8)}}
    batch["unlabelled"] = {"image": image}
    made = train_step.make_method(tiny("fixmatch", **plain)).views(batch, jax.random.key(1))
    weak = np.asarray(made["unlabelled"]["weak"])
    np.testing.assert_array_equal(made["unlabelled"]["strong"], weak)
    assert (weak != np.asarray(image)).any((1, 2, 3)).all()  # moved
    assert (weak != np.asarray(made["labelled"]["image"])).any()  # by draws of its own
    fields = {"augment.jitter": 1.0, "augment.strength": 0.2, "augment.flip": 1.0}
    made = train_step.make_method(tiny("fixmatch", **fields)).views(batch, jax.random.key(1))
    for one, other in zip(*(np.asarray(made["unlabelled"][k]) for k in ("weak", "strong"))):  # noqa: B905
        assert np.abs(one - other).max() > 1e-3
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.999


def test_slices_turn_by_their_own_proportions():
    """Both streams hand on how much higher than wide slices were."""
    image = jax.random.uniform(jax.random.key(0), (8, 16, 16, 1))
    fields = {"augment.flip": 0.0, "augment.rotate": 1.0}
    method = train_step.make_method(tiny("fixmatch", **fields))

    def made(aspect):
        batch = {"labelled": {"image": image, "label": jnp.zeros((8, 16, 16), jnp.uint8)}}
        batch["unlabelled"] = {"image": image}
        for stream in batch.values():
            stream["aspect"] = jnp.full(8, aspect)
        return jax.jit(method.views)(batch, jax.random.key(1))

    square, high = made(1.0), made(1.5)
    for stream, name in (("labelled", "image"), ("unlabelled", "weak")):
        assert (np.asarray(square[stream][name]) != np.asarray(high[stream][name])).any(), stream


def test_fixmatch_labels_the_weak_view_for_the_strong_one():
    own = views()
    (pair,) = passes(by_value("fixmatch"), own).pairs
    np.testing.assert_array_equal(pair.student.generalist, own["unlabelled"]["strong"])
    np.testing.assert_array_equal(pair.teacher.generalist, own["unlabelled"]["weak"])


def test_cgs_labels_the_weak_view_for_the_mixed_strong_one():
    own, seen = views() | {"keep": box(3, 6)}, []
    method = by_value("cgs", **{"method.specialists": False, "method.terms": ("G_from_g",)})
    method.teacher = lambda state, image, key: (seen.append(image) or shown(image), {})
    (pair,) = passes(method, own).pairs
    np.testing.assert_array_equal(seen[0], own["unlabelled"]["weak"])
    mixed = np.where(np.asarray(own["keep"])[..., None], [[[[30]]], [[[40]]]], [[[[40]]], [[[30]]]])
    np.testing.assert_array_equal(pair.student.generalist, mixed)


def test_partners_of_the_full_plan_are_other_images():
    batch = jax.tree.map(jnp.asarray, tiny_batch(tiny(), draws=2))
    whole = {"augment.flip": 0.0, "augment.rotate": 0.0}
    method = train_step.make_method(tiny("cgs", **{"method.plan": "full"} | whole))
    for stream in batch.values():
        stream["image"] = augment.to_image(stream["image"])
    made = jax.jit(method.views)(batch, jax.random.key(0))
    images = batch["unlabelled"]["image"]
    np.testing.assert_array_equal(made["unlabelled"]["weak"], images[:2])
    np.testing.assert_array_equal(made["partner"]["unlabelled"]["weak"], images[2:])


def test_networks_of_cps_teach_each_other():
    method, own = by_value("cps"), views()
    method.student = lambda params, stats, labelled, unlabelled, key: (
        shown(labelled),
        shown(jnp.full(SHAPE, params)),
        stats,
    )
    params = {"first": 1.0, "second": 2.0}
    state = TrainState(0, params, {"first": {}, "second": {}}, None, {})
    pairs = method.passes(params, state, own, jax.random.key(0)).pairs
    assert [p.student.generalist[0, 0, 0, 0] for p in pairs] == [1, 2]
    assert [p.teacher.generalist[0, 0, 0, 0] for p in pairs] == [2, 1]


def test_networks_of_cps_label_whole_images_for_mixed_ones():
    """Each the weak views for the other, which learns from them, mixed as its strong views are."""
    fields = {"method.cutmix": 1.0, "method.jitter": True}
    own, keep = views() | {"keep": box(3, 6)}, np.asarray(box(3, 6))[..., None]
    method, stats = by_value("cps", **fields), {"first": {"of": 1}, "second": {"of": 2}}
    method.forward = lambda params, stats, image, key: (shown(image + params), stats)
    params = {"first": 100.0, "second": 200.0}
    found = method.passes(params, TrainState(0, params, stats, None, {}), own, jax.random.key(0))
    mixed = np.where(keep, [[[[30]]], [[[40]]]], [[[[40]]], [[[30]]]])
    labels = np.where(keep, [[[[10]]], [[[20]]]], [[[[20]]], [[[10]]]])
    for pair, other in zip(found.pairs, (200, 100), strict=True):
        np.testing.assert_array_equal(pair.student.generalist, mixed)
        np.testing.assert_array_equal(pair.teacher.generalist, labels + other)
    assert found.model_state == stats
    method = by_value("cps", **{"method.jitter": True})
    state = TrainState(0, params, stats, None, {})
    for pair in method.passes(params, state, own, jax.random.key(0)).pairs:
        np.testing.assert_array_equal(pair.student.generalist, own["unlabelled"]["strong"])
        np.testing.assert_array_equal(pair.teacher.generalist, own["unlabelled"]["weak"])


def test_cps_draws_boxes_beside_the_views_that_it_has_without():
    batch = jax.tree.map(jnp.asarray, tiny_batch(tiny("cps")))
    for stream in batch.values():
        stream["image"] = augment.to_image(stream["image"])
    plain, mixed = (
        jax.jit(train_step.make_method(tiny("cps", **{"method.cutmix": p})).views)(
            batch, jax.random.key(0)
        )
        for p in (0.0, 1.0)
    )
    keep = np.asarray(mixed.pop("keep"))
    assert keep.shape == plain["unlabelled"]["weak"].shape[:-1]
    assert (~keep).any((1, 2)).all()
    assert keep.any((1, 2)).all()
    jax.tree.map(np.testing.assert_array_equal, plain, mixed)


def test_unimatch_mixes_labels_as_images():
    """Two strong views with boxes of their own, and the perturbed weak view as it is."""
    own = views()
    weak, keep = own["unlabelled"]["weak"], [box(2, 5), box(8, 6)]
    own["unlabelled"]["strong"], own["keep"] = [weak + 100, weak + 200], keep
    method = by_value("unimatch")
    method.forward = lambda params, stats, image, key, perturb: (
        shown(jnp.concatenate([image, image + 1000])),
        stats,
    )
    found = passes(method, own).pairs
    for pair, more, inside in zip(found, (100, 200, 1000), (*keep, None), strict=True):
        taught, teacher = (np.asarray(x.generalist)[..., 0] for x in (pair.student, pair.teacher))
        np.testing.assert_array_equal(taught, teacher + more)
        other = np.zeros(SHAPE[:-1], bool) if inside is None else ~np.asarray(inside)
        expected = np.array([10, 20]).reshape(2, 1, 1)
        np.testing.assert_array_equal(teacher, np.where(other, 30 - expected, expected))


def test_ad_mt_mixes_in_the_turn_of_its_second_teacher():
    own = views() | {"keep": box(3, 6)}
    method = by_value("ad_mt", total_steps=300)
    one = {"params": {}, "model_state": {}}
    keep = np.asarray(own["keep"])[..., None]
    weak, strong = (np.asarray(own["unlabelled"][name]) for name in ("weak", "strong"))
    two = lambda x: jnp.concatenate([x, -x], -1)  # noqa: E731  # logits of two classes
    method.forward = lambda params, stats, image, key: (shown(two(image)), stats)
    method.network = SimpleNamespace(apply=lambda variables, image: shown(two(image)))
    method.student = lambda params, stats, labelled, unlabelled, key: (
        shown(labelled),
        shown(two(unlabelled)),
        stats,
    )
    first, second = int(np.argmin(method.second)), int(np.argmax(method.second))
    own["unlabelled"]["weak"] = jnp.asarray(np.where(weak == 10, 1.0, -1.0))  # class 0, class 1
    for step, mixes in ((first, False), (second, True)):
        (pair,) = passes(method, own, step, extra={"teachers": [one, one]}).pairs
        label = np.argmax(pair.teacher.generalist, -1)
        image = np.asarray(pair.student.generalist)[..., 0]
        plain = np.array([0, 1]).reshape(2, 1, 1)
        expected = np.where(keep[..., 0] | (not mixes), plain, 1 - plain)
        np.testing.assert_array_equal(label, expected)
        of_weak = np.where(expected == 0, 1, -1)
        np.testing.assert_array_equal(image, of_weak if mixes else strong[..., 0])


def test_ua_mt_teaches_where_the_teacher_is_sure():
    """At the start below three quarters of the largest entropy, and a little: .826 of three
    classes. A sure pixel has .063, an even one 1.099."""
    method, own = by_value("ua_mt"), views()
    probs = jnp.array([[0.99, 0.005, 0.005], [1 / 3, 1 / 3, 1 / 3]])
    of_teacher = jnp.broadcast_to(jnp.log(probs)[:, None, None], (2, 16, 16, 3))
    method.teacher = lambda state, image, key: (shown(of_teacher), {})
    (pair,) = passes(method, own).pairs
    np.testing.assert_array_equal(pair.where[:, 0, 0], [True, False])


def test_bcp_pastes_labels_with_their_images():
    config = tiny("bcp", **{"method.pretrain": 1 / 12})
    method, own = by_value("bcp", **{"method.pretrain": 1 / 12}), views()
    own["keep"] = box(2, 10)
    own["labelled"]["label"] = own["labelled"]["image"][..., 0].astype(jnp.uint8)
    seen, extra = [], {"params": {}, "model_state": {}}
    method.forward = lambda params, stats, image, key: (seen.append(image) or shown(image), {})
    for step in (0, config.total_steps // 2):
        (labelled,) = passes(method, own, step, extra=extra).labelled
        mixed, where = np.asarray(seen[-1])[..., 0], np.asarray(labelled.where)
        where = np.broadcast_to(where, mixed.shape)
        assert 0.2 < where.mean() <= 1
        np.testing.assert_array_equal(np.asarray(labelled.label)[where], mixed[where])
    batch = {"labelled": {"image": jnp.zeros((2, 30, 30, 1)), "label": jnp.zeros((2, 30, 30))}}
    batch["unlabelled"] = {"image": jnp.zeros((2, 30, 30, 1))}
    inside = ~np.asarray(train_step.make_method(config).views(batch, jax.random.key(0))["keep"][0])
    assert (inside.any(1).sum(), inside.any(0).sum()) == (20, 20)  # two thirds of a side


def test_bcp_learns_the_largest_piece():
    """Of an organ in two pieces the smaller one counts as background."""
    label = np.zeros((1, 8, 8), int)
    label[0, :4, :4], label[0, 6:, 6:] = 1, 1
    teacher = shown(jnp.asarray(9.0 * np.eye(3)[label]))
    student = lambda truth: shown(jnp.asarray(30.0 * np.eye(3)[truth]))  # noqa: E731
    method = train_step.make_method(tiny("bcp"))
    cleaned = label.copy()
    cleaned[0, 6:, 6:] = 0
    for truth, wrong in ((cleaned, False), (label, True)):
        pair = base.Pair(student(truth), teacher, jnp.ones((1, 8, 8), bool))
        terms, _ = method.unsupervised([pair])
        assert (terms["unsup/ce"] > 0.1) == wrong


def test_joined_batches_are_told_apart():
    own = views()
    image, weak = own["labelled"]["image"], own["unlabelled"]["weak"]
    for one, other in zip(batches.split(batches.join(image, weak), 2), (image, weak), strict=True):
        np.testing.assert_array_equal(one, other)
