"""Tables, pseudo-label quality and participation against numbers made by hand."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from cgs_jax.analysis import organ_shares, pseudo_label_quality, tables
from cgs_jax.methods import augment, base
from cgs_jax.models.network import Outputs
from cgs_jax.training import train_step
from cgs_jax.training.train_state import TrainState
from runs import REPOSITORY
from steps import tiny, tiny_batch


def cases(values):
    """{(row, seed): {case: [dice of a, dice of b]}} -> a frame as `tables.load` makes it."""
    lines = []
    for (row, seed), by_case in values.items():
        for case, dice in by_case.items():
            for organ, value in zip("ab", dice, strict=True):
                who = {"row": row, "seed": seed, "split": "test", "case": case}
                who |= {"patient": case[:2], "organ": organ}
                lines.append(who | {"dice": value})
    return pd.DataFrame(lines)


def test_table_by_hand():
    nan = float("nan")
    frame = cases(
        {
            ("base", 0): {"p1_1": [50, 70], "p1_2": [60, nan], "p2_1": [10, 20]},
            ("base", 1): {"p1_1": [52, 72], "p1_2": [62, nan], "p2_1": [12, 22]},
            ("other", 0): {"p1_1": [60, 80], "p1_2": [60, nan], "p2_1": [15, 25]},
            ("other", 1): {"p1_1": [60, 80], "p1_2": [60, nan], "p2_1": [15, 25]},
            ("third", 0): {"p1_1": [50, 70], "p1_2": [60, nan], "p2_1": [10, 20]},
        }
    )
    table = tables.table(frame, "base")
    assert list(table.index) == ["base", "other", "third"]
    assert list(table.seeds) == [2, 2, 1]
    np.testing.assert_allclose(table.loc["base", ["a", "b", "mean"]].astype(float), [41, 46, 43.5])
    np.testing.assert_allclose(table.loc["base", "a sd"], np.sqrt(2))
    np.testing.assert_allclose(table.loc["other", ["a", "a sd"]].astype(float), [45, 0])
    # by patient: a and b of one case and a of the other, over both seeds; and those of one case
    gains = np.mean([9, 9, -1]), np.mean([4, 4])
    np.testing.assert_allclose(table.loc["other", "difference"], np.mean(gains))
    # its one seed against the mean of both of the first: as the means in the table
    assert table.loc["third", "difference"] == -1
    assert np.isnan(table.loc["base", "difference"])
    text = tables.as_text(table, "base")
    assert text.loc["base", "a"] == "41.00 ± 1.41"
    assert text.loc["third", "a"] == "40.00"
    assert text.loc["other", "against base"] == "+4.83 [+3.00, +6.67] (2 and 2 seeds)"
    missing = tables.as_text(tables.table(frame, "not trained yet"), "not trained yet")
    assert set(missing["against not trained yet"]) == {""}
    assert "| other | 2 | 45.00 ± 0.00 |" in tables.markdown(text)
    assert r"other & 2 & 45.00 $\pm$ 0.00" in tables.latex(text)
    odd = pd.DataFrame([["1 %"]], ["a_1 & #2"], ["left|right"])
    assert tables.markdown(odd).startswith(r"|  | left\|right |")
    assert r"a\_1 \& \#2 & 1 \% \\" in tables.latex(odd)
    assert r"left|right" in tables.latex(odd)
    assert r"\textbackslash{}x\^{}2\{\}" in tables.latex(odd.rename(columns=lambda _: r"\x^2{}"))


def test_bootstrap_interval_is_over_patients_and_seeds():
    """Against the variances of the means; the second scan of a patient adds no information."""
    rng = np.random.default_rng(0)
    gains, noise = rng.normal(2, 3, 20), {"base": rng.normal(0, 2, 8), "other": rng.normal(0, 1, 8)}
    values = {
        (row, seed): {f"{i:02d}_{frame}": [50, 50] for i in range(20) for frame in (1, 2)}
        for row in noise
        for seed in range(8)
    }
    for (row, seed), by_case in values.items():
        for case in by_case:
            gain = gains[int(case[:2])] if row == "other" else 0
            by_case[case] = [50 + gain + noise[row][seed]] * 2
    found = tables.differences(cases(values), "base").loc["other"]
    mean = gains.mean() + noise["other"].mean() - noise["base"].mean()
    variance = gains.var() / 20 + noise["other"].var() / 8 + noise["base"].var() / 8
    half = 1.96 * np.sqrt(variance)
    np.testing.assert_allclose(found.difference, mean)
    np.testing.assert_allclose([found.low, found.high], mean + [-half, half], atol=0.1)
    assert found["seeds of first"] == 8


def test_what_one_leaves_undefined_is_no_loss():
    """Where an organ is absent, one row says nothing (nan) and the other a few voxels (0)."""
    nan = float("nan")
    frame = cases(
        {
            ("base", 0): {"p1_1": [90, nan], "p2_1": [80, 70]},
            ("other", 0): {"p1_1": [90, 0], "p2_1": [80, 70]},
        }
    )
    assert tables.differences(frame, "base").loc["other"].tolist() == [0, 0, 0, 1]
    nothing = frame.assign(dice=frame.dice.where(frame.organ == "a"))
    assert np.isnan(tables.table(nothing, "base").loc["base", "b"])


def test_pseudo_label_quality_by_hand():
    label = jnp.array([[[1, 1, 2, 0]]])
    mask = jnp.array([[[True, True, False, True]]])
    truth = jnp.array([[[1, 2, 2, 1]]])
    counts = np.asarray(pseudo_label_quality.counts(label, mask, truth, 2))
    np.testing.assert_array_equal(counts, [[2, 0], [1, 0], [2, 2], [2, 1]])
    shares = pseudo_label_quality.shares({"ihed": counts}, ("a", "b"))
    assert shares["pseudo/ihed/precision/a"] == 50
    assert np.isnan(shares["pseudo/ihed/precision/b"])
    assert shares["pseudo/ihed/precision"] == 50
    assert shares["pseudo/ihed/coverage/a"] == 100
    assert shares["pseudo/ihed/coverage/b"] == 50
    assert shares["pseudo/ihed/coverage"] == 75


def logits(probs):
    return jnp.log(jnp.asarray(probs, jnp.float32) + 1e-6)


def test_sources_of_pseudo_labels():
    generalist = logits([[[[0.1, 0.85, 0.05], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]]]])
    one = [[0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1]]
    two = [[0.1, 0.1, 0.8], [0.1, 0.7, 0.2], [0.8, 0.1, 0.1]]
    found = pseudo_label_quality.sources(
        Outputs(generalist, (jnp.stack([logits([[one]]), logits([[two]])], -2),)), 0.82
    )
    expected = {
        "generalist": ([1, 2, 0], [True, False, True]),
        "specialists": ([1, 1, 0], [True, True, True]),
        "ihed": ([1, 1, 0], [True, False, True]),  # two targets on the second
        "consensus": ([1, 1, 0], [True, False, True]),
    }
    for name, (label, mask) in expected.items():
        assert found[name][0].ravel().tolist() == label, name
        assert found[name][1].ravel().tolist() == mask, name


class Withheld:
    """Five training slices: labelled, two withheld, one without label, and again withheld."""

    class splits:  # noqa: N801
        train, labelled = list("abcd"), ["a"]

    def labels(self, rows):
        return np.stack([np.full((16, 16), (1, 1, 2, 255, 0)[row], np.uint8) for row in rows])

    def images(self, rows):
        return np.uint16(rows)[:, None, None, None] * np.ones((1, 16, 16, 1), np.uint16)

    def has_label(self, case):
        return case != "c"

    def organs(self, case):
        return tiny().data.classes

    def rows(self, names):
        of = {"a": [0], "b": [1, 2], "c": [3], "d": [4]}
        return np.array([row for name in sorted(names) for row in of[name]])


def test_quality_is_measured_on_withheld_labels_only():
    config = tiny(eval_batch=2)
    method, seen = train_step.make_method(config), []

    class Network:
        def apply(self, variables, image):
            jax.debug.callback(lambda x: seen.append(np.asarray(x[:, 0, 0, 0])), image)
            generalist = jnp.broadcast_to(logits([0.01, 0.98, 0.01]), (*image.shape[:3], 3))
            heads = jnp.broadcast_to(logits([0.01, 0.98, 0.01]), (*image.shape[:3], 2, 3))
            return Outputs(generalist, (heads,))

    method.network = Network()
    empty = TrainState(jnp.asarray(0), {}, {}, None, {"params": {}, "model_state": {}})
    scores = pseudo_label_quality.make_measure(method, Withheld())(empty)
    jax.effects_barrier()
    assert (65535 * np.concatenate(seen)).round().tolist() == [1, 2, 4, 0]  # and padding
    assert scores["pseudo/generalist/precision/big"] == pytest.approx(100 / 3)
    assert scores["pseudo/generalist/coverage/small"] == 100
    assert scores["pseudo/ihed/coverage/big"] == 0  # both heads say target
    method = train_step.make_method(tiny(pseudo_slices=0))
    assert pseudo_label_quality.make_measure(method, Withheld())(empty) == {}


def test_participation_by_hand():
    """The gradient at the features, against that of a pixel moved by a little."""
    method = train_step.make_method(tiny(**{"model.dropout": (0.0,) * 2}))
    batch = tiny_batch(method.config)["labelled"]
    image, label = augment.to_image(jnp.asarray(batch["image"])), jnp.asarray(batch["label"])
    params, model_state, _ = jax.jit(method.init)(jax.random.key(0), image[:1])
    found = organ_shares.gradients(method, (params, model_state), image, label)
    outputs, _ = method.forward(params, model_state, image, jax.random.key(0))
    terms = base.supervised_loss(base.Labelled(outputs, label))
    assert all(np.isfinite(v) for v in terms.values())
    for gradient in found:
        assert gradient.shape == label.shape
        assert gradient.min() >= 0 < gradient.max()
    kernel = params["generalist"]["conv"]["kernel"]

    def loss(features):
        """The generalist by itself, on given features."""
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", None, None, numbers)
        y = y + params["generalist"]["conv"]["bias"]
        return sum(base.supervised_loss(base.Labelled(Outputs(y, None), label)).values())

    _, seen = method.network.apply(
        {"params": params, **model_state},
        image,
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "backbone",
    )
    features, _ = seen["intermediates"]["backbone"]["__call__"][0][-1]
    expected = jnp.abs(jax.grad(loss)(features)).sum(-1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-7)
    assert np.abs(found[1] - found[0]).max() > 1e-4

    shares = np.array([[[1.0, 2.0], [3.0, 4.0]]]), np.array([[[5.0, 1.0], [1.0, 3.0]]])
    of_organs = jnp.array([[[0, 1], [1, 2]]])
    organs = [organ_shares.by_organ(g, of_organs, ("a", "b")).tolist() for g in shares]
    assert organs == [[5 / 9, 4 / 9], [2 / 5, 3 / 5]]
    frame = pd.DataFrame({"organ": ["a", "b"], "without": [0.9, 0.1], "with": [0.95, 0.3]})
    assert organ_shares.keeps_bound(frame).tolist() == [False, True]


def test_copies_of_runs_are_no_runs(tmp_path):
    """A folder beside those of the seeds, such as a backup, is not in the table."""
    folder = shutil.copytree(REPOSITORY / "results" / "acdc" / "3_labelled", tmp_path / "sweep")
    before = tables.load(folder)
    shutil.copytree(folder / "cgs" / "seed0", folder / "cgs" / "seed0_old")
    assert list(tables.load(folder).runs.workdir) == list(before.runs.workdir)


def test_published_scores_are_read():
    """Tables of docs/results.md come from them."""
    sweep = tables.load(REPOSITORY / "results" / "acdc" / "3_labelled")
    found = tables.table(sweep.cases, "cgs", split="val_literature").loc["copy_paste"]
    assert found["mean"] == pytest.approx(69.90, abs=0.01)
    assert list(found[["low", "high"]]) == pytest.approx([-0.5, 3.1], abs=0.1)
