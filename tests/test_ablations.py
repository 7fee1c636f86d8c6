"""Options of CGS that its ablations turn, and ensembles, against cases made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgs_jax.inference import predictor
from cgs_jax.methods import augment, base, cgs, pseudo_labels
from cgs_jax.models import packed
from cgs_jax.models.network import Outputs, build
from cgs_jax.runtime.errors import UserError
from cgs_jax.training import resolve, train_step
from cgs_jax.training.train_state import TrainState
from steps import tiny, tiny_batch


def test_binary_specialists_by_hand():
    labels = jnp.array([[[0, 1, 2, 3]]], jnp.uint8)
    expected = [[[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]]]
    np.testing.assert_array_equal(pseudo_labels.relabel(labels, 3, num_classes=2), expected)
    target = jnp.array([[0.1, 0.2, 0.9, 0.6], [0.1, 0.7, 0.8, 0.3], [0.2, 0.1, 0.2, 0.3]])
    target = target.T[None, None]  # [B, H, W, K]
    probs = jnp.stack([1 - target, target], -1)
    merged = pseudo_labels.merge(probs)
    np.testing.assert_array_equal(jnp.argmax(merged, -1), [[[0, 2, 1, 1]]])
    np.testing.assert_allclose(merged[0, 0, 1], [0.3, 0.2, 0.7, 0.1], rtol=1e-5)
    votes = jnp.argmax(probs, -1)
    np.testing.assert_array_equal(pseudo_labels.ihed_mask(votes, 2), [[[True, True, False, True]]])


def plain_heads(params, stats, x, depth, train):
    """The specialists one after the other, as anyone would write them; and what batch norm saw."""
    logits, seen = [], {}
    for k in range(len(params["conv2_bias"])):
        h = x
        for i in range(1, depth + 1):
            name, bn = ("conv1", "bn") if i == 1 else (f"hidden{i}", f"bn{i}")
            h = h @ params[f"{name}_kernel"][k, 0, 0] + params[f"{name}_bias"][k]
            mean, var = h.mean((0, 1, 2)), h.var((0, 1, 2))
            means, variances = seen.setdefault(bn, ([], []))
            means.append(mean)
            variances.append(var)
            if not train:
                mean, var = stats[bn]["mean"][k], stats[bn]["var"][k]
            h = (h - mean) / jnp.sqrt(var + 1e-5)
            h = h * params[bn]["scale"][k] + params[bn]["bias"][k]
            h = jnp.where(h > 0, h, 0.01 * h)
        kernel, bias = params["conv2_kernel"][k], params["conv2_bias"][k]
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        logits.append(y + bias)
    return jnp.stack(logits, -2), {bn: tuple(map(jnp.stack, pair)) for bn, pair in seen.items()}


@pytest.mark.parametrize(
    ("depth", "classes", "lanes", "train"),
    [(0, 3, 1, True), (2, 2, 1, True), (3, 3, 16, True), (2, 3, 1, False)],
)
def test_depth_and_classes_of_the_heads(depth, classes, lanes, train):
    """Packed or not, in groups of four or one by one: the same logits, and running statistics."""
    fields = {"model.head_depth": depth, "model.head_classes": classes, "model.lanes": lanes}
    config = tiny(**fields)
    config.data.classes = tuple("abcde")  # a group of four, and one
    network = build(config, specialists=True)
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    variables = jax.device_get(jax.jit(network.init)(jax.random.key(1), image))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), variables["params"]
    )
    stats = jax.tree.map(
        lambda x: np.float32(x + 0.2 * rng.random(x.shape)), variables["batch_stats"]
    )
    apply = jax.jit(
        lambda v: network.apply(
            v,
            image,
            train=train,
            rngs={"dropout": jax.random.key(3)},
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda m, _: m.name == "backbone",
        )
    )
    out, state = apply({"params": params, "batch_stats": stats})
    x, pack = state["intermediates"]["backbone"]["__call__"][0][-1]
    x = packed.unpack_pixels(x, int(pack))
    known = stats.get("specialists", {})
    plain = jax.jit(lambda params, stats, x: plain_heads(params, stats, x, depth, train))
    expected, seen = plain(params["specialists"], known, x)
    assert [x.shape for x in out.specialists] == [(2, 16, 16, n, classes) for n in (4, 1)]
    np.testing.assert_allclose(np.concatenate(out.specialists, -2), expected, atol=2e-4)
    for name, (mean, var) in seen.items() if train else ():
        after, before = state["batch_stats"]["specialists"][name], known[name]
        for field, value in (("mean", mean), ("var", var)):
            moved = before[field] + 0.1 * (value - before[field])
            np.testing.assert_allclose(after[field], moved, atol=1e-4)


def teacher_and_student():
    shapes = (2, 8, 8, 3), (2, 8, 8, 2, 3)
    keys = jax.random.split(jax.random.key(0), 4)
    own = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    theirs = [3 * jax.random.normal(k, s) for k, s in zip(keys[2:], shapes, strict=True)]
    return [Outputs(generalist, (heads,)) for generalist, heads in (own, theirs)]


def test_terms_and_ihed_can_be_left_out():
    student, teacher = teacher_and_student()
    pairs = [base.Pair(student, teacher)]
    whole, cover = train_step.make_method(tiny()).unsupervised(pairs)
    chosen = ("G_from_s", "S_from_g")
    part, _ = train_step.make_method(tiny(**{"method.terms": chosen})).unsupervised(pairs)
    assert set(part) == {f"unsup/{t}_{kind}" for t in chosen for kind in ("ce", "dice")}
    assert len(whole) == 12
    assert all(part[name] == whole[name] for name in part)
    everything, all_covered = train_step.make_method(tiny(**{"method.ihed": False})).unsupervised(
        pairs
    )
    assert 0 < cover["cover/s"] < 1 == all_covered["cover/s"]
    changed = {name for name in whole if whole[name] != everything[name]}
    assert changed == {name for name in whole if "from_s" in name}
    with pytest.raises(UserError, match="unknown --config.method.terms G_from_x; there are"):
        train_step.make_method(tiny(**{"method.terms": ("G_from_x",)}))


def test_teacher_in_evaluation_mode():
    """It draws no dropout, and its statistics are a moving average of the student's."""
    method = train_step.make_method(tiny(**{"method.teacher": "eval"}))
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    params, model_state, extra = jax.jit(method.init)(jax.random.key(1), image[:1])
    state = TrainState(jnp.asarray(1000), params, model_state, None, extra)
    teacher = jax.jit(method.teacher)
    (first, kept), (second, _) = (teacher(state, image, jax.random.key(k)) for k in (0, 1))
    np.testing.assert_array_equal(first.generalist, second.generalist)
    moved = state.replace(model_state=jax.tree.map(lambda x: x + 1, model_state), extra=kept)
    after = jax.jit(method.after_update)(moved).extra["model_state"]
    gap = jax.tree.map(lambda a, b: np.abs(a - b - 0.01).max(), after, model_state)
    assert max(jax.tree.leaves(gap)) < 1e-6


def test_combining_predictions_by_hand():
    probs = jnp.array([[0.5, 0.4, 0.1], [0.1, 0.4, 0.5], [0.0, 0.55, 0.45], [0.97, 0.02, 0.01]])

    def combine(rows, how):
        return int(jnp.argmax(predictor.combine(probs[rows, None, None, None], how)[0, 0, 0]))

    members = jnp.array([0, 1, 2])
    assert combine(members, "average") == 1
    assert combine(members, "confidence") == 1
    assert combine(jnp.array([1, 2, 3]), "confidence") == 0
    assert combine(jnp.array([1, 1, 3]), "vote") == 2
    assert combine(jnp.array([1, 1, 3]), "average") == 0
    assert combine(jnp.array([0, 1]), "vote") == 0  # named once each, equally likely: the first


def test_several_methods_predict_together():
    class Says:
        config = tiny(combine="average")

        def predict(self, state, image, members):
            return jnp.broadcast_to(state.params, (1, *image.shape[:3], 3))

    said = jnp.array([0.6, 0.4, 0.0]), jnp.array([0.0, 0.5, 0.5])
    states = [TrainState(jnp.asarray(0), probs, {}, None, {}) for probs in said]
    predict = predictor.make_predictor(Says(), Says())(*states).predict
    slices = np.zeros((3, 16, 16, 1), np.uint16)
    assert predict(slices).shape == (3, 16, 16, 3)
    np.testing.assert_allclose(predict(slices)[2, 3, 4], [0.3, 0.45, 0.25], rtol=1e-6)


def test_both_kinds_of_heads_predict():
    method = train_step.make_method(tiny(inference="both"))
    image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    params, model_state, extra = jax.jit(method.init)(jax.random.key(1), image[:1])
    state = TrainState(jnp.asarray(0), params, model_state, None, extra)
    probs = jax.jit(method.predict)(state, image)
    assert probs.shape == (2, 2, 16, 16, 3)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    variables = {"params": extra["params"], **extra["model_state"]}
    outputs = jax.jit(method.network.apply)(variables, image)
    np.testing.assert_allclose(probs[0], jax.nn.softmax(outputs.generalist), rtol=1e-5)
    merged = pseudo_labels.merge(pseudo_labels.specialist_probs(outputs))
    np.testing.assert_array_equal(jnp.argmax(probs[1], -1), jnp.argmax(merged, -1))
    with pytest.raises(UserError, match="inference=both: fixmatch trains no specialists"):
        resolve.check(tiny("fixmatch", inference="both"))
    with pytest.raises(UserError, match="predict_with=teacher: fixmatch has no teacher"):
        resolve.check(tiny("fixmatch", predict_with="teacher"))


def test_copy_paste_fills_the_boxes_with_labelled_images():
    config = tiny(**{"method.copy_paste": 1.0, "batch.labelled": 2, "batch.unlabelled": 2})
    method, plain = train_step.make_method(config), train_step.make_method(tiny())
    batch = tiny_batch(config)
    for stream in batch.values():
        stream["image"] = augment.to_image(jnp.asarray(stream["image"].copy()))
    image = jnp.zeros((1, 16, 16, 1))
    params, model_state, extra = jax.jit(method.init)(jax.random.key(1), image)
    state = TrainState(jnp.asarray(0), params, model_state, None, extra)
    views = jax.jit(method.views)(batch, jax.random.key(2))
    keep, label = views["keep"], views["labelled"]["label"]

    def taught(method):
        """The images that the student sees, and the pseudo-labels for them."""
        seen, student = [], method.student
        method.student = lambda *args: seen.append(args[3]) or student(*args)
        passes = lambda key: method.passes(params, state, views, key)  # noqa: E731
        return jax.jit(lambda key: (passes(key).pairs[0].teacher, *seen))(jax.random.key(3))

    (mine, image), (others, plain_image) = taught(method), taught(plain)
    boxes = views["labelled"]["strong"], views["unlabelled"]["strong"][::-1]
    for seen, box in zip((image, plain_image), boxes, strict=True):
        expected = jnp.where(keep[..., None], views["unlabelled"]["strong"], box)
        np.testing.assert_array_equal(seen, expected)
    truth = pseudo_labels.PseudoLabels(label, True, label, pseudo_labels.relabel(label, 2), True)
    for got, outside, inside in zip(mine, others, truth, strict=True):
        outside_box = keep[..., None] if got.ndim > 3 else keep
        np.testing.assert_array_equal(got, jnp.where(outside_box, outside, inside))
    assert 0 < np.mean(keep) < 1
    wrong = ({"batch.labelled": 4}, {"method.plan": "full"})
    for fields in wrong:
        with pytest.raises(UserError, match="copy_paste"):
            train_step.make_method(tiny(**{"method.copy_paste": 0.5} | fields))


def test_cutmix_with_a_probability():
    method = train_step.make_method(tiny(**{"method.cutmix": 0.0}))
    views = {"labelled": {"image": jnp.zeros((2, 16, 16, 1)), "label": jnp.zeros((2, 16, 16))}}
    views["unlabelled"] = {"image": jnp.zeros((2, 16, 16, 1))}
    assert bool(jax.jit(method.views)(views, jax.random.key(0))["keep"].all())
    keep = jax.jit(lambda key: augment.cutmix_keep(key, (200, 16, 16), 0.3))(jax.random.key(0))
    assert 0.2 < np.mean(~keep.all((1, 2))) < 0.4
    assert set(cgs.TERMS) == set(tiny().method.terms)


def test_labelled_slices_mix_with_their_labels():
    """Of the baseline with CutMix: every pixel of image and label is of the slice or its
    neighbour."""
    still = {"augment.flip": 0.0, "augment.rotate": 0.0, "method.cutmix": 1.0}
    config = tiny("supervised", **still)
    batch = {"labelled": dict(tiny_batch(config, draws=2)["labelled"])}
    batch["labelled"]["label"][::2] = 0  # so that neighbours differ
    batch["labelled"]["image"] = augment.to_image(
        batch["labelled"]["label"][..., None] * np.uint16(20000)
    )
    views = jax.jit(train_step.make_method(config).views)(batch, jax.random.key(0))["labelled"]
    image, label = views["image"][..., 0], np.asarray(views["label"])
    np.testing.assert_allclose(image, label.astype(float) * 20000 / 65535, rtol=1e-5)
    before = batch["labelled"]["label"]
    own, other = label == before, label == np.roll(before, 1, 0)
    assert (own | other).all()
    assert not own.all((1, 2)).all()
    jittered = train_step.make_method(tiny("supervised", **still | {"method.jitter": True}))
    strong = jax.jit(jittered.views)(batch, jax.random.key(0))["labelled"]
    np.testing.assert_array_equal(strong["label"], label)
    assert (strong["image"] != views["image"]).any()


def test_without_specialists_the_generalist_teaches_alone():
    """Its loss is the term G_from_g of what CGS has; the masks and labels are the same."""
    fields = {"method.specialists": False, "method.terms": ("G_from_g",)}
    config, whole = tiny(**fields), tiny(**{"method.terms": ("G_from_g",)})
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(scale=4, size=(2, 2, 8, 8, 3)), jnp.float32)
    heads = jnp.asarray(rng.normal(size=(2, 8, 8, 2, 3)), jnp.float32)
    alone = base.Pair(*(Outputs(x, None) for x in logits))
    among = base.Pair(*(Outputs(x, (heads,)) for x in logits))
    method = train_step.make_method(config)
    terms, cover = jax.jit(method.unsupervised)([alone])
    expected, more = jax.jit(train_step.make_method(whole).unsupervised)([among])
    assert terms == expected
    assert cover == {"cover/g": more["cover/g"]}
    assert 0 < cover["cover/g"] < 1
    assert "specialists" not in method.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))[0]
