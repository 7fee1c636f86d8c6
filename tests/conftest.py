"""Fixtures. Tests that need real data take its folder from CGS_TEST_DATA and skip without it."""

import os
import pathlib

import jax
import numpy as np
import pytest
import runs

from cgs_jax.data.phantom import write as write_phantoms
from cgs_jax.sharding import COMPILER_OPTIONS

CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # for the programs that tests start
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, where installed, looks for TPUs otherwise
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def test_data():
    """Folder with `oracle/` and `data/`."""
    folder = os.environ.get("CGS_TEST_DATA", "")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("set CGS_TEST_DATA to the folder with oracle/ and data/")
    return pathlib.Path(folder).resolve()


@pytest.fixture(scope="session")
def oracle(test_data):
    """oracle(name) -> arrays of an .npz made by the authors' PyTorch code."""
    return lambda name: dict(np.load(test_data / "oracle" / f"{name}.npz"))


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Phantoms and lists: two labelled, one image-only, one whose label is withheld, one for
    validation, two for testing."""
    folder = tmp_path_factory.mktemp("scans")
    patients = {f"Patient_{i:02d}": i != 3 for i in range(1, 8)}
    write_phantoms(folder / "scans", patients, size=20, depth=5, seed=0)
    (folder / "lists").mkdir()
    names = list(patients)
    for name, part in (("train", names[:4]), ("val", names[4:5]), ("test", names[5:])):
        (folder / "lists" / f"{name}.txt").write_text("\n".join(part))
    return folder


@pytest.fixture(scope="session")
def trained(scans, tmp_path_factory):
    """A finished run of the command line, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    done = runs.start(runs.command(scans, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Steps that run for milliseconds need no optimising."""
    monkeypatch.setitem(COMPILER_OPTIONS["cpu"], "xla_backend_optimization_level", 0)
