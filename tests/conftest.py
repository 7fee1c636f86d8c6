"""Fixtures. Tests that need real data take its folder from CGS_TEST_DATA and skip without it."""

import fcntl
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

import runs
from cgs_jax.data.phantom import write as write_phantoms
from configs import segthor
from layouts import lists

CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # for the programs that tests start
# Compiles in a quarter of the time that level 1 takes; the few steps that a test runs may be slow.
# `XLA_FLAGS= bash launch/test.sh` compiles as the programs do for users.
QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later ones may not know these options, and end
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # the other core has tests of its own
os.environ.setdefault("XLA_FLAGS", QUICK)
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


@pytest.fixture(scope="session", params=["compact", "full"])
def oracle(request):
    """oracle(name) -> arrays of an .npz made by the authors' PyTorch code.

    The compact set is `tests/oracle`, a part of the full one; the full one needs `test_data`.
    """
    compact = request.param == "compact"
    parent = pathlib.Path(__file__).parent if compact else request.getfixturevalue("test_data")

    def load(name):
        path = parent / "oracle" / f"{name}.npz"
        if compact and not path.exists():
            pytest.skip(f"only the full set has {name}")
        return dict(np.load(path))

    return load


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder of that name, filled by the first of pytest's processes that needs
    it; the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        with open(base / f"{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.fstat(lock.fileno()).st_size:
                (base / name).mkdir()
                make(base / name)
                lock.write("made")
        return base / name

    return folder_of


@pytest.fixture(scope="session")
def scans(once):
    """Phantoms and lists: two labelled, one image-only, one whose label is withheld, one for
    validation, two for testing."""

    def write(folder):
        patients = {f"Patient_{i:02d}": i != 3 for i in range(1, 8)}
        write_phantoms(folder / "scans", patients, size=20, depth=5, seed=0)
        names = list(patients)
        lists(folder / "lists", train=names[:4], val=names[4:5], test=names[5:])

    return once("scans", write)


@pytest.fixture
def thorax(tmp_path):
    """Five phantom patients in SegTHOR's layout, one image-only, with lists of their own."""
    root = tmp_path / "scans"
    patients = {f"Patient_{i:02d}": i != 3 for i in range(1, 6)}
    write_phantoms(root, patients, size=24, depth=6, seed=0)
    config = segthor.get_config("labelled=2")
    config.data.root, config.data.size = str(root), 16
    config.data.splits = lists(
        tmp_path / "lists",
        train=["Patient_01", "Patient_02", "Patient_03"],
        val=["Patient_04"],
        test=["Patient_05"],
    )
    config.total_steps = 40
    return config, root


@pytest.fixture(scope="session")
def trained(scans, once, tmp_path_factory):
    """A finished run of the command line, and what it printed."""

    def train(folder):
        done = runs.start(runs.command(scans, folder / "trained"))
        assert done.returncode == 0, done.stderr
        (folder / "printed").write_text(done.stdout)

    folder = once("trained", train)
    run, printed = folder / "trained", (folder / "printed").read_text()
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    shutil.copytree(run, workdir)  # for tests write in it
    report = workdir / "report.html"
    report.write_text(report.read_text().replace(str(run), str(workdir)))
    return workdir, printed.replace(str(run), str(workdir))
