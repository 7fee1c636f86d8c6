"""Several processes, one program: start, agreement, and stopping together.

Every process runs the same code on its own devices; process 0 alone writes logs and pictures.
"""

import os
import pickle
import signal
import socket
import sys
import traceback
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cgs_jax.runtime.errors import UserError

HEARTBEAT_SECONDS = 60  # a process that is silent for so long ends the job
HERE = "CGS_JAX_PROCESSES_HERE"  # variable: how many of us share this machine's memory
# What ends a process from outside: a closed terminal, too, unless nohup keeps that from it.
ENDINGS = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]


def initialize(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes; what is None is asked from TPU pod, SLURM, Open MPI or Kubernetes.

    Raises:
      UserError: the environment does not say, or the others can not be reached.
    """
    if coordinator and ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT")
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--multihost: {reason}; where the cluster is not detected give "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    host = socket.gethostname()
    os.environ[HERE] = str(gather(host).count(host))


def is_first() -> bool:
    """Whether this is process 0, which writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes; `name` must be the same in all."""
    multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.pad(data, (0, max(sizes) - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def check_same(what: str, value: Any) -> None:
    """Raises UserError in every process unless `value` is the same in all."""
    values = gather(value)
    for i, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"process {i} has other {what} than process 0; give all the same")


def is_lost(error: BaseException) -> bool:
    """Whether `error` tells that another process can not be reached."""
    signs = (
        "Gloo",
        "coordination service",
        "CoordinationService",
        "heartbeat",
        "DEADLINE_EXCEEDED",
    )
    return jax.process_count() > 1 and any(sign in str(error) for sign in signs)


def leave(line: str) -> None:
    """Ends this one of several processes after an error, with `line`, or the traceback if ''.

    At once: an orderly exit would wait for processes that are gone. They see that this one is gone.
    """
    if not jax.distributed.is_initialized():
        return
    if line:
        print(line, file=sys.stderr)
    else:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class Stop:
    """Whether to stop, asked once a step: after SIGTERM, SIGHUP (a closed terminal; not with nohup)
    or Ctrl-C, to any of the processes.

    All processes stop at the same step. A second Ctrl-C interrupts at once.

    Attributes:
      now: what `at` answered last.
      asked: whether it answered, or would answer, True.
    """

    def __init__(self):
        self.asked = self.now = False

    def __enter__(self):
        names = {signal.SIGINT, *ENDINGS}
        if jax.process_count() > 1:  # jax itself listens to SIGTERM and tells the others
            names.discard(signal.SIGTERM)
        self._before = {name: signal.signal(name, self._ask) for name in names}
        return self

    def __exit__(self, *_):
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, *_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            self.asked = True
        else:  # `at` answers when all processes know
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Whether to save and stop after `step`."""
        alone = jax.process_count() == 1
        self.now = self.asked if alone else multihost_utils.reached_preemption_sync_point(step)
        self.asked |= self.now
        return self.now
