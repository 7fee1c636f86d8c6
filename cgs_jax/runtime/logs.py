"""What a run keeps of its training: metrics.jsonl, TensorBoard files, and how long it took."""

import contextlib
import math
import pathlib
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Mapping

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from cgs_jax.runtime import processes, threads
from cgs_jax.runtime.files import is_remote, read_lines, to_json, write_text, writing


def time_spent(workdir: pathlib.Path) -> tuple[float, str]:
    """Minutes of training, validation included, over all starts of a run; the last one's hardware
    and jax. What a kill lost since the validation before is not counted."""
    total, here, hardware = 0.0, 0.0, ""
    for line in read_lines(workdir / "times.jsonl"):
        if "hardware" in line:
            total, here = total + here, 0.0
            hardware = f"{line['hardware']}, jax {line['jax']}"
        else:
            here = line["seconds"]
    return (total + here) / 60, hardware


def hardware() -> str:
    """Such as '8 x NVIDIA H200', or '1 x cpu (AMD EPYC, 2 cores)'."""
    device, about = jax.devices()[0], ""
    if device.platform == "cpu":
        info = pathlib.Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
        about = f" ({found[1] if found else platform.machine()}, {len(threads.cores())} cores)"
    return f"{jax.device_count()} x {device.device_kind}{about}"


def _put(file, line):
    with writing(file.name):
        file.write(to_json(line) + "\n")


class Writer:
    """Appends scalars by step; what an interrupted run wrote past `start` is taken back.

    times.jsonl tells when, on what and how long: a line a start, a line a validation. Process 0
    writes for all.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        self._first = processes.is_first()
        if not self._first:
            return
        self._workdir = self._folder = workdir
        if is_remote(workdir):  # written here, and copied by `publish`
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix="cgs_jax_logs_"))
        metrics, times = (read_lines(workdir / f"{name}.jsonl") for name in ("metrics", "times"))
        kept = [line for line in metrics if line["step"] <= start]
        self._metrics = self._append_to("metrics.jsonl", kept)
        self._times = self._append_to("times.jsonl", times)
        self._began = time.monotonic()
        line = {"step": start, "hardware": hardware(), "jax": jax.__version__}
        _put(self._times, line | {"started": time.strftime("%Y-%m-%d %H:%M:%S%z")})
        # Not by SummaryWriter: its thread dies when it can not write, and the next scalar then
        # waits for ever.
        (self._folder / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(self._folder / "tensorboard" / "events"))
        # TensorBoard leaves out what was there from this step on.
        self._tell_board(start + 1, {"session_log": SessionLog(status=SessionLog.START)})

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line and its TensorBoard scalars."""
        if not self._first:
            return
        _put(self._metrics, {"step": step, **scalars})
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        self._tell_board(step, *({"summary": scalar(*item)} for item in finite.items()))

    def _append_to(self, name, lines):
        path = self._folder / name
        write_text(path, "".join(f"{to_json(line)}\n" for line in lines))
        return open(path, "a", buffering=1)

    def _tell_board(self, step, *contents):
        with writing(self._folder / "tensorboard"):
            for content in contents:
                self._board.write_event(Event(wall_time=time.time(), step=step, **content))
            self._board.flush()

    def publish(self, step: int) -> None:
        """Notes how long it took to `step`, and copies all into a `workdir` in a bucket."""
        if not self._first:
            return
        _put(self._times, {"step": step, "seconds": round(time.monotonic() - self._began, 1)})
        self._copy()

    def _copy(self):
        if self._folder == self._workdir:
            return
        for path in filter(pathlib.Path.is_file, self._folder.rglob("*")):
            target = self._workdir / path.relative_to(self._folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())

    def close(self) -> None:
        """Closes the files; what did not fit on the disk has been told."""
        if not self._first:
            return
        try:
            self._copy()
        finally:
            for file in (self._metrics, self._times, self._board):
                with contextlib.suppress(OSError):
                    file.close()
            if self._folder != self._workdir:
                shutil.rmtree(self._folder)
