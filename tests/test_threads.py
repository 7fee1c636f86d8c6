"""How many scans are worked on at once, and how that ends."""

import os
import threading
import time

import pytest

from cgs_jax.runtime import processes, threads
from cgs_jax.runtime.errors import UserError


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "GROUPS", tmp_path)
    whole = threads.memory()
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    (tmp_path / "memory.max").write_text("max\n")
    assert threads.memory() == whole
    (tmp_path / "memory.max").write_text("13000000000\n")
    monkeypatch.setattr(threads, "cores", lambda: range(8))
    assert threads.count() == max(1, min(2, whole // 6_000_000_000))
    (tmp_path / "memory.max").write_text("9000\n")
    assert threads.count() == 1
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "own")
    for own, file in (
        ("0::/job/step\n", "job/memory.max"),
        ("3:cpu,cpuacct:/\n4:memory:/slurm/job\n", "memory/slurm/job/memory.limit_in_bytes"),
    ):
        (tmp_path / "own").write_text(own)
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("8000")
        assert threads.memory() == 8000
        (tmp_path / file).unlink()
        assert threads.memory() == 9000


def test_processes_share_the_memory(monkeypatch):
    monkeypatch.setattr(threads, "memory", lambda: 25e9)
    monkeypatch.setattr(threads, "cores", lambda: list(range(16)))
    assert threads.count() == 4
    monkeypatch.setenv(processes.HERE, "2")
    assert threads.count() == 2
    monkeypatch.setenv(processes.HERE, "8")
    assert threads.count() == 1


def test_threads_keep_the_order_and_end_with_the_first_error():
    begun = []

    def half(number):
        begun.append(number)
        time.sleep(0.01 * (number % 3))
        if number == 5:
            raise UserError("five is odd")
        return number / 2

    assert threads.each(half, range(5), "halving") == [0, 0.5, 1, 1.5, 2]
    begun.clear()
    with pytest.raises(UserError, match="five is odd"):
        threads.each(half, range(1000), "halving")
    assert len(begun) < 100


def test_the_next_is_made_while_one_is_in_use():
    made, seen = [], threading.Semaphore(0)

    def items():
        for number in range(3):
            made.append(number)
            seen.release()
            yield number
        raise UserError("no more")

    found = threads.ahead(items())
    assert not made
    assert next(found) == 0
    assert seen.acquire(timeout=10)
    assert seen.acquire(timeout=10)  # the second one is made, and the third is not
    assert made == [0, 1]
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(UserError, match="no more"):
        next(found)
    assert list(threads.ahead([])) == []
