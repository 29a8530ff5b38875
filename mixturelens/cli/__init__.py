"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from mixturelens.cli import core, doctor, lab, suite  # they add their commands
from mixturelens.cli.shared import app
from mixturelens.types import InputError, RunError, shown

_LAB = ("trl", "datasets", "joblib", "dask", "distributed")
"""What `pip install '.[lab]'` brings."""


_NO_MEMORY = "memory ran out; give --memory, fewer prompts, or a machine with more"
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc", "Cannot allocate memory")
"""As torch on a GPU and on a CPU, libraries in C++, and the system say it."""
_INTERRUPTED, _TERMINATED = (128 + number for number in (signal.SIGINT, signal.SIGTERM))


class _Terminated(BaseException):
    """SIGTERM: the command ends as it does by Ctrl-C, which takes back what is half-written."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A block that SIGTERM ends by an exception, and Ctrl-C by one that typer, too, leaves to us."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as ended:
        if ended.code != _INTERRUPTED:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry point: bad input is one line on standard error and status 2, a failed run status 1."""
    try:
        with _terminable():
            app(prog_name="mixturelens")
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, _Terminated) as stop:
        status = _TERMINATED if isinstance(stop, _Terminated) else _INTERRUPTED
        _fail("stopped; the same command goes on where it was", status)
    except OSError as error:
        _fail(*_explain(error))
    except ModuleNotFoundError as error:
        if error.name not in _LAB:
            raise
        _fail(f"{error.name} is not installed, which only the laboratory needs: in a clone, pip install '.[lab]'", 2)
    except MemoryError:
        _fail(_NO_MEMORY, 1)
    except (RuntimeError, _of_safetensors()) as error:  # as libraries report a full disk, and memory that ran out
        said = str(error)
        if "No space left on device" in said:
            _fail(*_explain(OSError(errno.ENOSPC, "No space left on device")))
        if any(words in said for words in _OUT_OF_MEMORY):
            _fail(_NO_MEMORY, 1)
        raise


def _of_safetensors() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _explain(error: OSError) -> tuple[str, int]:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no permission to write; give another --out", 2
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the device; nothing half-written was kept: free some and run again", 1
    if error.errno == errno.ENOMEM:
        return _NO_MEMORY, 1
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}a file is in the way of a folder; give another --out", 2
    return f"{where}{error.strerror or error}", 1


def _fail(message: str, status: int) -> None:
    print(shown(f"mixturelens: {' '.join(message.split())}"), file=sys.stderr)
    raise SystemExit(status)
