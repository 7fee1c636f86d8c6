"""Which case belongs where."""

import json
import shutil

import numpy as np
import pytest

from cgs_jax.data import cache, case_lists
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from configs import acdc, nnunet, segthor, synapse
from layouts import lists, nnunet_folder, save


def test_published_splits():
    for config, sizes, labelled in (
        (acdc.get_config("labelled=3"), (140, 20, 40), 6),
        (acdc.get_config("labelled=7"), (140, 20, 40), 14),
        (segthor.get_config("labelled=3"), (28, 4, 8), 3),
        (segthor.get_config("labelled=6"), (28, 4, 8), 6),
        (synapse.get_config("labelled=4"), (16, 2, 12), 4),
    ):
        folder = case_lists.pathlib.Path(case_lists.__file__).parent / "published"
        names = [
            name
            for path in (folder / config.data.name).glob("*.txt")
            for name in case_lists.read_list(path)
        ]
        cases = {name: case_lists.Case(name, (), ("label",)) for name in names}
        splits = case_lists.split(cases, config.data, seed=0)
        case_lists.check(splits, cases, config.data)
        assert tuple(map(len, splits[:3])) == sizes
        assert len(splits.labelled) == labelled
    patients = {case[:10] for case in case_lists.read_list(folder / "acdc" / "labelled_7.txt")}
    assert patients == {f"patient{p}" for p in ("099", "038", "050", "021", "049", "058", "100")}


def test_random_split_keeps_patients_together():
    data = nnunet.get_config("labelled=3").data
    cases = {
        f"p{i}_frame{f:02d}": case_lists.Case(
            f"p{i}_frame{f:02d}", (), ("label",) if i < 20 else None
        )
        for i in range(30)
        for f in (1, 2)
    }
    splits = case_lists.split(cases, data, seed=0)
    assert [len(part) for part in splits] == [28 + 20, 4, 8, 6]
    assert splits == case_lists.split(cases, data, seed=0)
    assert splits != case_lists.split(cases, data, seed=1)
    patients = [{case.split("_")[0] for case in part} for part in splits[:3]]
    assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]


def test_lists_of_any_editor(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a  # first\n\nb\na\n", encoding="utf-8-sig")
    assert case_lists.read_list(path) == ["a", "b"]
    path.write_text("a\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"train.txt is no text in UTF-8; save it as such"):
        case_lists.read_list(path)


def test_a_case_whose_patient_is_not_told_is_its_own():
    assert case_lists.patient("x1", r"(p\d+)?") == "x1"
    assert case_lists.patient("p12_a", r"(p\d+)?") == "p12"


def test_no_test_cases_if_one_wants_none():
    data = nnunet.get_config().data
    cases = {f"c{i}": case_lists.Case(f"c{i}", (), ("x",) if i < 3 else None) for i in range(9)}
    assert [len(part) for part in case_lists.split(cases, data, 0)] == [1 + 6, 1, 1, 1]
    data.test_fraction = 0.0
    splits = case_lists.split(cases, data, 0)
    assert [len(part) for part in splits] == [2 + 6, 1, 0, 2]
    paths = {name: case._replace(image=()) for name, case in cases.items()}
    case_lists.check(splits, paths, data)
    data.test_fraction = 0.2
    with pytest.raises(UserError, match="no test cases .*; to do without, --config.data.test_frac"):
        case_lists.check(splits, paths, data)


def test_lists_without_validation_hold_out_patients_with_labels(tmp_path):
    """The published Synapse lists are such: selection must not use the test cases."""
    data = nnunet.get_config("labelled=2").data
    cases = {f"c{i}": case_lists.Case(f"c{i}", (), ("x",) if i < 5 else None) for i in range(9)}
    data.splits = lists(tmp_path, train=[f"c{i}" for i in range(1, 9)], test=["c0"])
    for seed in range(10):
        if seed == 5:
            lists(tmp_path, labelled_2=["c1", "c3"])
        splits = case_lists.split(cases, data, seed)
        case_lists.check(splits, cases, data)
        assert (len(splits.train), len(splits.val), splits.test) == (7, 1, ["c0"])
        assert seed < 5 or splits.labelled == ["c1", "c3"]


def test_scans_of_labelled_patients_do_not_validate(tmp_path):
    """Only one of two scans of each labelled patient is in the list of labelled cases."""
    data = nnunet.get_config("labelled=2").data
    names = [f"p{i}_{phase}" for i in range(6) for phase in ("ED", "ES")]
    cases = {name: case_lists.Case(name, (), ("x",)) for name in names}
    listed = {"train": names[2:], "test": names[:2], "labelled_2": ["p1_ED", "p2_ED"]}
    data.splits = lists(tmp_path, **listed)
    for seed in range(10):
        splits = case_lists.split(cases, data, seed)
        case_lists.check(splits, cases, data)
        assert splits.labelled == listed["labelled_2"]


def test_a_patient_is_on_one_side(tmp_path, capsys):
    """Two scans of a patient, in two lists; and patients whose names look like one."""
    data = nnunet.get_config("labelled=1").data
    names = ["p1_ED", "p2_ED", "p1_ES", "p3_ED"]
    cases = {name: case_lists.Case(name, (), ("x",)) for name in names}
    listed = {"train": names[:2], "val": names[2:3], "test": names[3:], "labelled_1": ["p2_ED"]}
    data.splits = lists(tmp_path, **listed)
    with pytest.raises(UserError, match="patient p1 is in train and in val"):
        case_lists.check(case_lists.split(cases, data, 0), cases, data)
    splits = case_lists.Splits(["p7_a", "p8_a"], ["p7_b"], ["p9_a"], ["p8_a"])
    case_lists.tell(splits, data)
    assert "WARNING: p7_a, p7_b are in train and val; if" in capsys.readouterr().out
    case_lists.tell(case_lists.Splits(["a_ED"], ["a_ES"], [], ["a_ED"]), data)
    assert "WARNING: all cases count as one patient" in capsys.readouterr().out


def test_unlabelled_scans_of_held_out_patients_do_not_train():
    data = nnunet.get_config().data
    names = [f"p{i}_visit{v}" for i in range(10) for v in (1, 2)]
    cases = {n: case_lists.Case(n, (), ("x",) if n.endswith("1") else None) for n in names}
    splits = case_lists.split(cases, data, 0)
    case_lists.check(splits, cases, data)
    held_out = {case.split("_")[0] for case in (*splits.val, *splits.test)}
    assert len(held_out) == 3
    assert len(splits.train) == 14
    assert not held_out & {case.split("_")[0] for case in splits.train}


def test_the_same_scan_on_both_sides_is_told(tmp_path, capsys):
    """Whatever it is called: also in two data sets, whose patients are told apart by name alone."""
    config, root = nnunet_folder(tmp_path)
    splits = cache.prepare(resolve(config)).splits
    one, other = splits.labelled[0], splits.test[0]
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(root / folder / f"{one}{ending}", root / folder / f"{other}{ending}")
    assert "same scan" not in capsys.readouterr().out
    cache.prepare(resolve(config))
    told = f"WARNING: {one} of train and {other} of test are the same scan; leave"
    assert told in capsys.readouterr().out


def test_labels_that_are_left_out_are_told_where_none_is_left():
    data = nnunet.get_config("labelled=1").data
    data.partly_labelled = False
    partly = {f"p{i}": case_lists.Case(f"p{i}", (), ("x",), annotated=("liver",)) for i in range(9)}
    with pytest.raises(UserError, match="no labelled cases .* --config.data.partly_labelled=True"):
        case_lists.check(case_lists.split(partly, data, 0), partly, data)


def test_folds_of_nnunet(tmp_path):
    config, root = nnunet_folder(tmp_path)
    names = [f"mine_{i:03d}" for i in range(9)]
    folds = [{"train": names[:7], "val": names[7:]}, {"train": names[2:], "val": names[:2]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    config.data.fold = 1
    splits = cache.prepare(resolve(config)).splits
    assert splits.test == names[:2]
    assert len(splits.val) == 1
    assert {*splits.val, *splits.labelled} == set(names[2:])
    assert set(splits.train) - set(splits.labelled) == {f"mine_{i:03d}" for i in (9, 10, 11)}
    for sort, folder in (("images", "imagesTs"), ("labels", "labelsTs")):
        ending = "_0000.nii.gz" if sort == "images" else ".nii.gz"
        save(root / folder / f"mine_100{ending}", np.zeros((9, 8, 4), np.float32))
    splits = cache.prepare(resolve(config)).splits
    assert (splits.test, splits.val) == (["mine_100"], names[:2])
    config.data.splits = str(tmp_path)
    with pytest.raises(UserError, match="data.fold and data.splits both say which cases train"):
        cache.prepare(resolve(config))
    config.data.fold, config.data.splits = 2, ""
    with pytest.raises(UserError, match=r"data.fold=2: .*splits_final.json has no such fold"):
        cache.prepare(resolve(config))
    (root / "splits_final.json").write_text('[{"train": [1, 2], "val": [3]}]')
    config.data.fold = 0
    with pytest.raises(UserError, match=r"cases are not in .*, such as [123];"):
        cache.prepare(resolve(config))
    (root / "splits_final.json").write_text("[")
    with pytest.raises(UserError, match="splits_final.json is no JSON"):
        cache.prepare(resolve(config))
    (root / "splits_final.json").unlink()
    with pytest.raises(UserError, match=r"data.fold=0: no .*splits_final.json; nnU-Net keeps it"):
        cache.prepare(resolve(config))
