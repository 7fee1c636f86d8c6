"""One annotated slice."""

import json

import nibabel as nib
import numpy as np
import pytest

from cgs_jax.data import cache, streams
from cgs_jax.methods.base import Method
from cgs_jax.runtime.errors import UserError
from cgs_jax.training.resolve import resolve
from layouts import nnunet_folder


@pytest.fixture(scope="module")
def one_slice(tmp_path_factory):
    config, _ = nnunet_folder(tmp_path_factory.mktemp("exemplar"))
    config.update_from_flattened_dict({"batch.labelled": 4, "batch.unlabelled": 4})
    config.data.labelled = 1
    return config


def test_the_exemplar_is_the_only_labelled_slice(one_slice, capsys):
    config = one_slice.copy_and_resolve_references()
    config.data.exemplar = "auto"
    config = resolve(config)
    plain = cache.prepare(resolve(one_slice))
    data = cache.prepare(config)
    areas = {
        (case, at): [np.count_nonzero(x == k) for k in (1, 2)]
        for case in plain.splits.labelled
        for at, x in enumerate(plain.examples("label", plain.rows([case])))
    }
    case, at = max(areas, key=lambda place: min(areas[place]))
    assert f"exemplar: slice {at} of {case}" in capsys.readouterr().out
    (labelled,), (unlabelled,) = data.sources().values()
    assert labelled.tolist() == [data.rows([case])[at]]
    every = data.rows(data.splits.train)
    assert sorted([*labelled, *unlabelled]) == every.tolist()
    assert data.splits.labelled == [case]
    batch = streams.batches(data, config, Method(config).streams())[3]["labelled"]
    assert (batch["image"] == batch["image"][:1]).all()
    again = cache.prepare(config, data.splits)  # as a resumed run
    assert again.sources()["labelled"][0].tolist() == labelled.tolist()


def test_the_exemplar_by_name(one_slice):
    config = one_slice.copy_and_resolve_references()
    train = cache.prepare(resolve(config)).splits.train
    with_label = [case for case in train if case < "mine_009"]
    config.data.exemplar = f"{with_label[-1]}:2"
    data = cache.prepare(resolve(config))
    assert data.sources()["labelled"][0].tolist() == [data.rows([with_label[-1]])[2]]
    for option, message in (
        ("mine_777:0", "no training case 'mine_777' with a label"),
        ("mine_009:0", "no training case 'mine_009' with a label"),
        (f"{train[0]}:4", "has slices 0 to 3"),
        (f"{train[0]}:x", "has slices 0 to 3"),
        (train[0], "no training case ''"),
    ):
        config.data.exemplar = option
        with pytest.raises(UserError, match=message):
            cache.prepare(resolve(config))


def test_an_exemplar_without_organs(tmp_path):
    config, root = nnunet_folder(tmp_path, cases=8)
    for path in (root / "labelsTr").iterdir():
        nifti = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(nifti.shape, np.uint8), nifti.affine), path)
    config.data.exemplar = "auto"
    with pytest.raises(UserError, match="no organ in slice"):
        cache.prepare(resolve(config))


def test_an_exemplar_shows_annotated_organs(tmp_path, capsys):
    config, root = nnunet_folder(tmp_path)
    (root / "partial_labels.json").write_text(json.dumps({"mine_001": ["head"]}))
    label = np.zeros((9, 8, 4), np.uint8)
    label[..., 2], label[:4, :, 1] = 2, 1
    path = root / "labelsTr" / "mine_001.nii.gz"
    nib.save(nib.Nifti1Image(label, nib.load(path).affine), path)
    config.data.exemplar = "mine_001:2"
    with pytest.raises(UserError, match="no organ in slice 2 of mine_001"):
        cache.prepare(resolve(config))
    config.data.exemplar = "mine_001:1"
    data = cache.prepare(resolve(config))
    assert "shows no tail" in capsys.readouterr().out
    (row,) = data.sources()["labelled"][0]
    assert set(np.unique(data.labels(np.array([row])))) == {0, 1}
