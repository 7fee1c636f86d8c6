"""Several data sets that train one network, and partly annotated cases."""

import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import linen as nn

import runs
from cgs_jax.data import cache, streams, tasks
from cgs_jax.inference import predictor
from cgs_jax.inference.predictor import Predictor
from cgs_jax.methods import pseudo_labels
from cgs_jax.methods.base import Method
from cgs_jax.models.network import Outputs
from cgs_jax.models.prompted import merge
from cgs_jax.runtime import devices
from cgs_jax.runtime.errors import UserError
from cgs_jax.scoring import summaries
from cgs_jax.training import train_step
from cgs_jax.training.resolve import resolve
from configs import collection, nnunet
from layouts import nnunet_folder

NET = {
    "model.channels": (4, 8),
    "model.dropout": (0.0,) * 2,
    "batch.labelled": 4,
    "batch.unlabelled": 4,
    "eval_batch": 4,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Members 'brain' (head, tail) and 'neck' (tail, cord), of which some cases are annotated for
    one organ only."""
    root = tmp_path_factory.mktemp("members")
    for name, organs in (("brain", ("head", "tail")), ("neck", ("tail", "cord"))):
        labels = {"background": 0} | {organ: i for i, organ in enumerate(organs, 1)}
        nnunet_folder(root / name, labels)
        (root / name / "Dataset001_Mine").rename(root / f"{name}_")
        (root / name).rmdir()
        (root / f"{name}_").rename(root / name)
    partial = {"mine_000": ["cord"], "mine_001": ["cord"], "mine_002": ["tail", "cord"]}
    (root / "neck" / "partial_labels.json").write_text(json.dumps(partial))
    return root


def config_of(folders, method="cgs", **fields):
    config = collection.get_config(f"method={method},members=brain@nnunet+neck@nnunet")
    config.update_from_flattened_dict(NET | {"data.size": 16, "total_steps": 20} | fields)
    config.data.root = str(folders)
    return config


@pytest.fixture(scope="module")
def prepared(folders):
    config = resolve(config_of(folders))
    return config, cache.prepare(config)


def test_classes_are_the_union(prepared):
    config, data = prepared
    assert config.data.classes == ("head", "tail", "cord")
    assert config.data.partial
    assert config.data.channels == 1
    assert tasks.organs(config.data) == ["brain/head", "brain/tail", "neck/tail", "neck/cord"]
    assert {case.split("/")[0] for case in data.splits.train} == {"brain", "neck"}


def test_labels_are_numbered_as_the_union_and_say_what_they_mark(prepared):
    config, data = prepared
    for case in data.splits.labelled:
        rows = data.rows([case])
        own = np.stack(list(data.examples("label", rows)))
        number = {"brain": [0, 1, 2], "neck": [0, 2, 3]}[case.split("/")[0]]
        marks = {"brain": [1, 1, 0], "neck": [0, 1, 1]}[case.split("/")[0]]
        if case in ("neck/mine_000", "neck/mine_001"):
            number, marks = [0, 0, 3], [0, 0, 1]
        np.testing.assert_array_equal(data.labels(rows), np.array(number)[own], case)
        assert (data.annotated(rows) == np.array(marks)).all(), case
        truth = data.volume(case).label  # in the member's own numbering
        assert set(np.unique(truth)) == {0, 1, 2}


def test_batches_hold_both_members_and_marks(prepared):
    config, data = prepared
    batches = streams.batches(data, config, Method(config).streams())
    seen = [batches[i]["labelled"] for i in range(8)]
    for batch in seen:
        assert batch["annotated"].shape == (4, 1, 1, 3)
        for label, marks in zip(batch["label"], batch["annotated"][:, 0, 0], strict=True):
            assert marks[np.unique(label[label > 0]) - 1].all()
    marks = np.concatenate([batch["annotated"][:, 0, 0] for batch in seen])
    assert 0 < marks[:, 0].sum() < len(marks)
    assert "annotated" not in batches[0]["unlabelled"]
    again = streams.batches(data, config, Method(config).streams())[5]
    np.testing.assert_array_equal(again["labelled"]["image"], batches[5]["labelled"]["image"])


def test_members_are_drawn_by_the_root_of_their_size():
    assert streams.shares([400, 100]).tolist() == [42, 22]  # 1 + 62 (2/3, 1/3)
    assert streams.shares([10**6, 1, 1]).tolist() == [62, 1, 1]
    assert streams.shares([5] * 64).tolist() == [1] * 64
    rows = [np.arange(8), 100 + np.arange(3)]
    places = np.arange(4 * streams.BLOCK)
    found = streams.drawn(places, rows, (0, 1))
    counts = streams.shares([8, 3])
    assert (found < 100).sum() == 4 * counts[0]
    epochs = found[found < 100].reshape(-1)[: 8 * (4 * counts[0] // 8)].reshape(-1, 8)
    assert (np.sort(epochs) == np.arange(8)).all()  # each slice once an epoch
    np.testing.assert_array_equal(streams.drawn(places[77:99], rows, (0, 1)), found[77:99])
    assert (streams.drawn(places, rows, (1, 1)) != found).any()


def test_scores_of_one_member(prepared):
    """What is an organ of others alone is background; organs keep the member's numbers."""
    config, _ = prepared
    scores = jnp.array([0.1, 0.2, 0.3, 0.4])
    for name, members, expected in (
        ("neck", [False, True, True], [0.3, 0.3, 0.4]),
        ("brain", [True, True, False], [0.5, 0.2, 0.3]),
    ):
        own = pseudo_labels.within(scores, np.array(members))
        union = tasks.find(config.data, name).union
        np.testing.assert_allclose(own[np.array(union)], expected, rtol=1e-6)

        def predict(images, asked, members=members, own=own):
            assert asked.tolist() == members
            return np.broadcast_to(own, (*images.shape[:3], 4))

        found = Predictor(predict, config, name).scores(np.zeros((2, 16, 16)))
        np.testing.assert_allclose(found[1, 5, 6], expected, rtol=1e-6)


def test_the_mean_of_a_collection_is_that_of_its_members(prepared):
    config, _ = prepared
    dice = lambda value: {"dice": value}  # noqa: E731
    results = {
        "brain/a": {"brain/head": dice(0.8), "brain/tail": dice(0.6)},
        "brain/b": {"brain/head": dice(0.6), "brain/tail": dice(0.4)},
        "neck/a": {"neck/cord": dice(0.2)},
    }
    summary = summaries.summarise(results, config.data)
    assert summary["members"]["brain"]["dice"] == pytest.approx(0.6)
    assert summary["members"]["neck"]["dice"] == pytest.approx(0.2)
    assert summary["mean"]["dice"] == pytest.approx(0.4)
    assert "mean of neck" in summaries.table(summary)


def test_annotated_organs_alone_are_scored(prepared):
    config, data = prepared
    found = Predictor(lambda x, _: np.ones((*x.shape[:3], 4), np.float32), config)
    cases = ["brain/mine_003", "neck/mine_000"]
    (results,) = summaries.evaluate(found, data, cases, False, found.scoring)
    assert set(results["brain/mine_003"]) == {"brain/head", "brain/tail"}
    assert set(results["neck/mine_000"]) == {"neck/cord"}
    organs = tasks.scored(config.data)
    assert summaries.unannotated(data, cases[:1], organs) == ["neck/tail", "neck/cord"]
    assert summaries.unannotated(data, cases, organs) == ["neck/tail"]


def test_a_collection_is_trained_scored_and_predicts(folders, tmp_path):
    """As a user does it; label maps of a member have its own numbers."""
    line = runs.command(folders, tmp_path / "run", program="main")[:5]
    line += ["--config", "configs/collection.py:method=cgs,members=brain@nnunet+neck@nnunet"]
    line += [f"--config.{name}={value}" for name, value in NET.items()]
    line += [f"--config.data.root={folders}", "--config.data.size=16", "--config.total_steps=4"]
    line += ["--config.data.members.neck.size=24", "--config.data.patch=16"]
    done = runs.start(line)
    assert done.returncode == 0, done.stderr
    assert "mean of brain" in done.stdout
    assert "neck/cord" in done.stdout
    summary = summaries.read_summary(tmp_path / "run")
    means = [summary["test"]["members"][name]["dice"] for name in ("brain", "neck")]
    assert summary["test"]["mean"]["dice"] == pytest.approx(np.mean(means))
    scans = folders / "neck" / "imagesTr"
    predict = ["--input", str(scans / "mine_009_0000.nii.gz"), "--output", str(tmp_path / "out")]
    line = runs.command(folders, tmp_path / "run", *predict, program="predict")
    done = runs.start(line)
    assert done.returncode == 1
    assert "give one by --task" in done.stderr
    assert "brain, neck" in done.stderr
    assert "no task 'knee'" in runs.start([*line, "--task", "knee"]).stderr
    done = runs.start([*line, "--task", "neck"])
    assert done.returncode == 0, done.stderr
    label = np.asarray(nib.load(tmp_path / "out" / "mine_009.nii.gz").dataobj)
    scan = np.asarray(nib.load(scans / "mine_009_0000.nii.gz").dataobj)
    found = Predictor.restore(tmp_path / "run", task="neck")
    expected = found.segment(scan.transpose(2, 1, 0)).transpose(2, 1, 0)
    np.testing.assert_array_equal(label, expected)
    assert label.max() <= 2
    with pytest.raises(UserError, match="which task"):
        Predictor.restore(tmp_path / "run").segment(scan)


def test_members_that_do_not_fit(folders, tmp_path):
    with pytest.raises(ValueError, match="brain is there twice"):
        collection.get_config("members=brain@nnunet+brain@acdc")
    with pytest.raises(ValueError, match="no configs/liver.py"):
        collection.get_config("members=liver")
    with pytest.raises(ValueError, match="no configs/methods.py"):  # a folder
        collection.get_config("members=methods")
    config = config_of(folders)
    config.data.members.neck.root = str(tmp_path)
    with pytest.raises(UserError, match=r"neck: no .*--config.data.members.neck.root must hold"):
        resolve(config)
    config = config_of(folders, **{"data.members.neck.size": 24})
    with pytest.raises(UserError, match=r"\[16, 24\] pixels a side: give data.patch"):
        resolve(config)
    three_levels = {"model.channels": (4, 4, 8), "model.dropout": (0.0,) * 3}
    config = config_of(folders, **three_levels, **{"data.members.neck.size": 18})
    with pytest.raises(UserError, match="members.neck.size=18 does not divide by 4"):
        resolve(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"mine_000": []}', "mine_000 is annotated for no organ"),
        ('{"mine_000": ["liver"]}', "mine_000 names 'liver'; the organs are: head, tail"),
        ('{"mine_0": ["head"]}', "there is no case mine_0 with a label"),
        ('{"mine_011": ["head"]}', "there is no case mine_011 with a label"),
        ('{"mine_000": "head"}', "must map cases to lists of organs"),
        ('{"mine_000": [["head"]]}', "must map cases to lists of organs"),
        ('{"mine_000": [1, "head"]}', "must map cases to lists of organs"),
        ("[1]", "must map cases to lists of organs"),
        ("{", "must map cases to lists of organs"),
    ],
)
def test_bad_partial_labels(tmp_path, text, message):
    config, root = nnunet_folder(tmp_path)
    (root / "partial_labels.json").write_text(text)
    with pytest.raises(UserError, match=message):
        cache.prepare(resolve(config))


@pytest.mark.parametrize("labelled", [0, 3])
def test_partly_annotated_cases_as_unlabelled_ones(tmp_path, labelled):
    """The control: all else, and the other labelled cases, stay the same."""
    config, root = nnunet_folder(tmp_path)
    listed = {"mine_001": ["head"], "mine_002": ["tail"], "mine_004": ["head", "tail"]}
    (root / "partial_labels.json").write_text(json.dumps(listed))
    config.data.labelled = labelled
    data = cache.prepare(resolve(config))
    with_them = data.splits
    (rows,), (unlabelled,) = data.sources().values()
    assert rows.tolist() == data.rows(with_them.labelled).tolist()
    whole = {case for case in with_them.labelled if data.organs(case) == ("head", "tail")}
    assert whole
    assert unlabelled.tolist() == data.rows(set(with_them.train) - whole).tolist()
    config.data.partly_labelled = False
    data = cache.prepare(resolve(config))
    without = data.splits
    assert data.sources()["unlabelled"][0].tolist() == unlabelled.tolist()
    assert without[:3] == with_them[:3]
    partly = {"mine_001", "mine_002"}
    assert without.labelled == [case for case in with_them.labelled if case not in partly]
    assert set(with_them.labelled) & partly


def test_where_all_cases_are_labelled_all_are_unlabelled_too(tmp_path):
    """Not only the one that is annotated for some organs."""
    config, root = nnunet_folder(tmp_path)
    for image in (root / "imagesTr").iterdir():
        if not (root / "labelsTr" / image.name.replace("_0000", "")).exists():
            image.unlink()
    (root / "partial_labels.json").write_text(json.dumps({"mine_001": ["head"]}))
    data = cache.prepare(resolve(config))
    assert "mine_001" in data.splits.labelled
    assert data.sources()["unlabelled"][0].tolist() == data.sources()["labelled"][0].tolist()


def test_options_of_members_are_theirs_alone(folders):
    config = collection.get_config("members=brain@nnunet")
    for field in ("exemplar", "partly_labelled", "split_seed", "spacing", "normalise"):
        assert field not in config.data
        assert field in config.data.members.brain
    for field in ("patch", "grow_at"):  # windows are cut alike
        assert field in config.data
        assert field not in config.data.members.brain
    with pytest.raises(ValueError, match="configs/common.py is no data set"):
        collection.get_config("members=common")


def test_own_prompts_alone_predict(prepared):
    """Foreign prompts neither take from the background nor add to it."""
    p = jnp.array([0.6, 0.2, 0.95, 0.5])  # head, tail, cord, and the synthetic task
    prompts = jnp.stack([jnp.log(1 - p), jnp.log(p)], -1)[None, None, None]
    config, brain = config_of_method(prepared[0], "versemi"), np.array([True, True, False])
    method = train_step.make_method(config)
    outputs = Outputs(merge(prompts), None, prompts=prompts)
    own = method.generalist_probs(outputs, brain)[0, 0, 0]
    np.testing.assert_allclose(own, np.array([0.4, 0.6, 0.2, 0]) / 1.2, rtol=1e-5)
    all_asked = method.generalist_probs(outputs, None)[0, 0, 0]
    np.testing.assert_allclose(all_asked, np.array([0.05, 0.6, 0.2, 0.95]) / 1.8, rtol=1e-5)
    assert np.argmax(pseudo_labels.within(all_asked, brain)) == 0


def test_every_head_knows_the_members_before_heads_vote(prepared):
    """CGS over VerSemi: prompts that nobody asked take nothing from the background, and what
    specialists give to other data sets' organs is background."""
    fields = {"combine": "vote", "inference": "both"}
    config = config_of_method(prepared[0], "cgs", base="versemi", **fields)
    method, brain = train_step.make_method(config), np.array([True, True, False])
    mesh = devices.local_mesh()
    state = train_step.init_state(method, mesh)
    images = np.random.default_rng(0).integers(0, 65535, (2, 16, 16, 1)).astype(np.uint16)
    predict = predictor.make_predictor(method)(state).predict
    scores = predict(images, brain)
    image = jnp.asarray(images / np.float32(65535))
    params, stats = method.inference_variables(state)
    outputs = method.network.apply({"params": params, **stats}, image, train=False)
    odds = np.exp(nn.log_softmax(outputs.prompts))[..., :2, 1]  # of head and tail
    asked = np.concatenate([1 - odds.max(-1, keepdims=True), odds], -1)
    merged = np.array(pseudo_labels.merge(pseudo_labels.specialist_probs(outputs)))
    merged /= merged.sum(-1, keepdims=True)
    merged = np.concatenate([merged[..., :1] + merged[..., 3:], merged[..., 1:3]], -1)
    votes = sum(np.eye(3)[heads.argmax(-1)] for heads in (asked, merged))
    np.testing.assert_array_equal(np.floor(scores[..., :3] + 1e-4), votes)
    assert not scores[..., 3].any()


def config_of_method(config, method, base="", **fields):
    base = f",base={base}" if base else ""
    other = collection.get_config(f"method={method}{base},members=brain@nnunet")
    other.update_from_flattened_dict(NET | fields)
    other.data.classes, other.data.channels = config.data.classes, 1
    return other


def test_versemi_learns_from_several_data_sets(folders, prepared):
    """Each image is asked for a class that it is annotated for, and the loss falls."""
    config = resolve(config_of(folders, "versemi", **{"total_steps": 40, "optimizer.lr": 0.01}))
    data, method = prepared[1], train_step.make_method(config)
    batches = streams.batches(data, config, method.streams())
    mesh = devices.local_mesh()
    batch = batches[0]
    views = train_step.make_views(method, mesh, batch, jax.random.key(0))["labelled"]
    asked = np.take_along_axis(batch["labelled"]["annotated"][:, 0, 0], views["task"][:, None], 1)
    assert asked.all()
    state = train_step.init_state(method, mesh)
    step = train_step.make_train_step(method, mesh)
    losses = []
    for _ in range(12):
        state, metrics = step(state, devices.put_batch(mesh, batch), np.uint32(0))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_one_data_set_is_a_collection_of_one(folders):
    """Its only member trains on the same slices, as many as the data set by itself."""
    config = collection.get_config("members=brain@nnunet")
    config.data.root, config.data.size = str(folders), 16
    alone = nnunet.get_config()
    alone.data.root, alone.data.size = str(folders / "brain"), 16
    config, alone = resolve(config), resolve(alone)
    ours, theirs = cache.prepare(config), cache.prepare(alone)
    assert [case.split("/")[1] for case in ours.splits.train] == theirs.splits.train
    a, b = (
        streams.batches(data, of, Method(of).streams())[2]["labelled"]
        for data, of in ((ours, config), (theirs, alone))
    )
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])
    assert a["annotated"].all()
    assert "annotated" not in b
