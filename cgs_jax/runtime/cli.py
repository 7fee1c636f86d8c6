"""What the command lines share: flags, the compilation cache, and errors as one line."""

import errno
import inspect
import logging
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging

from cgs_jax.runtime import processes
from cgs_jax.runtime.errors import UserError

# What a user can do something about: the disk is full or read-only, permissions, a missing file.
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}
MENDABLE |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def cli(main: Callable[[list[str]], None], takes_arguments: bool = False) -> None:
    """Runs `main` on the arguments that are no flags, of which there are none unless it
    `takes_arguments`; what the user can mend is one line and exit code 1."""
    # Compilation takes most of a minute; later starts take it from here.
    cache = pathlib.Path.home() / ".cache" / "cgs_jax" / "xla"
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    for name in processes.ENDINGS:  # where nothing is there to be saved
        signal.signal(name, signal.default_int_handler)
    _quieten_libraries()
    app.define_help_flags()
    if "traceback" not in flags.FLAGS:
        flags.DEFINE_boolean("traceback", False, "show where in the code an error arose")
    try:
        _, *arguments = flags.FLAGS([*map(_with_home, sys.argv)])
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # An error inside the config file arrives as its traceback: the last line says what it is.
        sys.exit("error: " + (lines[-1] if "Traceback" in str(error) else " ".join(lines)))
    except (AttributeError, KeyError) as error:  # how ml_collections answers an unknown field
        sys.exit(f"error: unknown config field: {_unknown_field(error)}")
    except (OSError, TypeError, ValueError) as error:
        sys.exit(_explain(error) or f"error: {' '.join(str(error).split())}")
    if arguments and not takes_arguments:
        sys.exit(f"error: unexpected argument {arguments[0]!r}; options begin with --")
    try:
        main(arguments)
    except (Exception, KeyboardInterrupt) as error:
        line = "" if flags.FLAGS.traceback else _explain(error)
        processes.leave(line)
        if not line:
            raise
        sys.exit(line)


def _unknown_field(error):
    """What `error` tells of a field, which it names by its last part, with the whole name."""
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    told = " ".join(str(error.args[0]).split())
    if part := re.match(r"'(\w+)'", told):
        for argument in sys.argv:
            name = argument.partition("=")[0].removeprefix("--config.")
            if part[1] in name.split("."):
                return told.replace(part[0], f"'{name}'", 1)
    return told


def output_file(name: str | None) -> pathlib.Path | None:
    """The path of --output, known to have a folder before the work begins."""
    if not name:
        return None
    path = pathlib.Path(name)
    if not path.absolute().parent.is_dir():
        raise UserError(f"no folder for --output {name}")
    if path.is_dir():
        raise UserError(f"--output {name} is a folder; name a file")
    return path


class _OfPythonThreads:
    """stderr without lines of threads that Python did not start: tracebacks of tensorstore's reads
    and writes that outlive their event loop."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        foreign = threading.current_thread().name.startswith("Dummy-")
        return len(text) if foreign else self._stream.write(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _with_home(argument: str) -> str:
    """--root=~/scans as a shell expands --root ~/scans."""
    name, equals, value = argument.partition("=")
    return name + equals + (os.path.expanduser(value) if name.startswith("--") else value)


def _quieten_libraries() -> None:
    """When orbax fails, each of the thousand reads or writes under way tells so; the error that is
    raised tells it once."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.stderr = _OfPythonThreads(sys.stderr)
    show = sys.unraisablehook
    sys.unraisablehook = lambda what: inspect.iscoroutine(what.object) or show(what)


def _explain(error: BaseException) -> str:
    """What the user can mend, as one line; '' is for programming errors."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training run goes on from its last checkpoint"
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, MemoryError):
        reason = str(error) or "it is used up"
        return f"error: this machine, or the job, has too little memory: {reason}"
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        line = f"error: the device has too little memory: {' '.join(str(error).split())[:200]}"
        advice = "smaller config.batch, config.eval_batch or config.data.patch, in a new --workdir"
        return f"{line}; it needs less with {advice}" if "config" in flags.FLAGS else line
    if processes.is_lost(error):
        reason = " ".join(str(error).split())[:200]
        return (
            f"error: another process is lost ({reason}); the same command in all processes goes on "
            "from the last checkpoint"
        )
    if isinstance(error, OSError) and "Failed loading config file" in str(error):
        return f"error: --config: {str(error).splitlines()[-1].strip()}"
    if isinstance(error, OSError) and error.errno in MENDABLE:
        where = f": {error.filename}" if error.filename else ""
        return "error: " + " ".join(f"{error.strerror or error}{where}".split())
    return ""
