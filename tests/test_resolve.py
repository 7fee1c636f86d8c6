"""The configuration is completed and checked once, and stays as it is from there on."""

import pytest
from layouts import nnunet_folder
from runs import TINY

from cgs_jax import sweep
from cgs_jax.evaluate import scans
from cgs_jax.training.resolve import resolve


def test_a_completed_copy_that_nobody_changes(tmp_path):
    config, root = nnunet_folder(tmp_path)
    resolved = resolve(config)
    assert resolved.data.classes == ("head", "tail")
    assert config.data.classes == ()
    with pytest.raises(AttributeError):
        resolved.data.size = 32
    prepared = scans(resolved, None, str(root), str(tmp_path / "elsewhere"))
    assert prepared.splits.labelled
    assert (resolved.data.cache, config.data.cache) == ("", "")


def test_runs_of_a_sweep_are_resolved(tmp_path):
    """So a run whose classes come with its data is known again."""
    _, root = nnunet_folder(tmp_path)
    rows = tmp_path / "rows.py"
    rows.write_text("def get_sweep(config):\n    return {'a': ('', {})}")
    fields = TINY | {"data.root": str(root)}
    _, (run,) = sweep.plan("configs/nnunet.py", fields, str(rows), tmp_path / "runs", 1)
    assert run.config.data.classes == ("head", "tail")
    assert not [word for word in run.command if word.startswith("--config.data.classes")]
