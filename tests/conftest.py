"""Fixtures. Tests that need real data take its folder from CGS_TEST_DATA and skip without it."""

import os
import pathlib

import jax
import numpy as np
import pytest

CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # for the programs that tests start
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


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
