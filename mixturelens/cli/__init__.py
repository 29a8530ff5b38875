"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import sys

from mixturelens.cli import core, doctor, lab, suite  # they add their commands
from mixturelens.cli.shared import app
from mixturelens.types import InputError, RunError, shown

_LAB = ("trl", "datasets", "joblib", "dask", "distributed")
"""What `pip install 'mixturelens[lab]'` brings."""


def main() -> None:
    """Entry point: bad input is one line on standard error and status 2, a failed run status 1."""
    try:
        app(prog_name="mixturelens")
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped", 130)
    except OSError as error:
        _fail(*_explain(error))
    except ModuleNotFoundError as error:
        if error.name not in _LAB:
            raise
        _fail(f"{error.name} is not installed, which only the laboratory needs: pip install 'mixturelens[lab]'", 2)
    except MemoryError:
        _fail("memory ran out; give --memory, fewer prompts, or a machine with more", 1)
    except _of_safetensors() as error:  # which reports a full disk as an error of its own
        if "No space left on device" not in str(error):
            raise
        _fail(*_explain(OSError(errno.ENOSPC, "No space left on device")))


def _of_safetensors() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _explain(error: OSError) -> tuple[str, int]:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no permission to write; give another --out", 2
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the device; nothing half-written was kept: free some and run again", 1
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}a file is in the way of a folder; give another --out", 2
    return f"{where}{error.strerror or error}", 1


def _fail(message: str, status: int) -> None:
    print(shown(f"mixturelens: {' '.join(message.split())}"), file=sys.stderr)
    raise SystemExit(status)
