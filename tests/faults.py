"""Commands in processes of their own, to which something happens: a signal, or a write that fails.

The processes are forked from one that has imported everything, so that a start costs nothing, and what happens at a
random moment happens to the command and not to its imports. A write is what Python tells its audit hooks of files that
are opened for writing, moved, made and removed under a folder: the moments between two of them are all that a kill can
part, but for what a library in C or Rust writes in one go.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
EVENTS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}
"""Event of a write -> how many paths it names first."""
PRELOAD = (
    *("mixturelens.cli", "mixturelens.pipeline", "mixturelens.pages", "mixturelens.lab.runs", "mixturelens.hooks.lens"),
    *("torch", "transformers", "transformer_lens", "sae_lens", "trl", "datasets", "peft", "pandas", "pyarrow"),
    *("sklearn.linear_model", "plotly.graph_objects", "scipy.stats", "vl_convert", "faults"),
)


class Fault(NamedTuple):
    """What happens to a command; nothing, if neither number is given."""

    after: float | None = None
    """Seconds after which the signal is sent."""
    at: int | None = None
    """Number of the write, from 0, at which it happens, before it is done."""
    signal: int = signal.SIGKILL
    errno: int | None = None
    """Then the write fails with this, and so do all that follow."""
    memory: int | None = None
    """Bytes that the process may take beyond what it holds when the command begins."""
    largest: int | None = None
    """Bytes of a file, at most: what is more cannot be written."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    """Exit status; minus a signal's number where that ended it."""
    out: str
    err: str
    seconds: float
    writes: int


class Started(NamedTuple):
    """A command at work."""

    process: Any
    said: Path
    fault: Fault
    began: float

    def ended(self) -> Ended:
        """Wait until it ends, and do to it what is to be done on the way."""
        wait = 600.0 if self.fault.after is None else max(0.0, self.began + self.fault.after - time.monotonic())
        self.process.join(wait)
        if self.process.exitcode is None and self.fault.after is not None:
            os.kill(self.process.pid, self.fault.signal)
            self.process.join(600)
        assert self.process.exitcode is not None, "hangs"
        seconds = time.monotonic() - self.began
        out, err = ((self.said / name).read_text(errors="replace") for name in ("out", "err"))
        writes = (self.said / "writes").read_text().count("\n")
        shutil.rmtree(self.said)
        return Ended(self.process.exitcode, out, err, seconds, writes)


def start(arguments: Sequence[object], home: Path, fault: Fault = Fault()) -> Started:  # noqa: B008
    """Begin a command in the folder `home`, whose writes there are counted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    said = home.parent / f".said-{home.name}-{time.monotonic_ns()}"
    said.mkdir()
    (said / "temporary").mkdir()
    process = context.Process(target=_work, args=([str(each) for each in arguments], str(home), str(said), fault))
    process.start()
    began = time.monotonic()
    while not (said / "writes").exists() and process.exitcode is None and time.monotonic() < began + 120:
        time.sleep(0.002)  # the first start of all waits for the imports
    return Started(process, said, fault, time.monotonic())


def done(arguments: Sequence[object], home: Path, fault: Fault = Fault()) -> Ended:  # noqa: B008
    """A command from its beginning to its end."""
    return start(arguments, home, fault).ended()


def _work(arguments: list[str], home: str, said: str, fault: Fault) -> None:
    import tempfile

    import torch

    from mixturelens import cli

    sys.path.insert(0, str(HERE))
    import pytest
    from stored import few_nulls

    few_nulls(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    os.chdir(home)
    tempfile.tempdir = os.path.join(said, "temporary")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(said, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), number)
    count = os.open(os.path.join(said, "writes"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    seen = [0]

    def watch(event: str, given: tuple[Any, ...]) -> None:
        path = _written(event, given, home)
        if path is None:
            return
        os.write(count, f"{event} {path}\n".encode("utf-8", "replace"))
        number, seen[0] = seen[0], seen[0] + 1
        if fault.at is None or number < fault.at:
            return
        if fault.errno is not None:
            if fault.errno == errno.ENOSPC and event in ("os.remove", "os.rmdir"):
                return  # which takes no room
            raise OSError(fault.errno, os.strerror(fault.errno), path)
        if number == fault.at:
            os.kill(os.getpid(), fault.signal)

    if fault.memory is not None:
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + fault.memory, resource.RLIM_INFINITY))
    if fault.largest is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest, resource.RLIM_INFINITY))
    sys.addaudithook(watch)
    sys.argv = ["mixturelens", *arguments]
    cli.main()


def _written(event: str, given: tuple[Any, ...], home: str) -> str | None:
    """The path under `home` that an event writes to; None for any other event."""
    if event == "open":
        path, _, flags = given
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        paths = [path]
    elif event in EVENTS:
        paths = list(given[: EVENTS[event]])
        if event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(given[-1], int) and given[-1] >= 0:
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{given[-1]}"), os.fsdecode(given[0]))]
    else:
        return None
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = os.path.abspath(os.fsdecode(path))
            if whole.startswith(home + os.sep):
                return whole
    return None


# --- what may lie in a folder -----------------------------------------------------------------------------------------


def not_whole(folder: Path) -> list[str]:
    """A line for every file under a folder that is not whole, but for those whose names say that they are not: hidden
    ones, and what a trainer is at work on."""
    return [
        f"{file.relative_to(folder)}: {problem}"
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") or part == "training" for part in file.relative_to(folder).parts)
        and (problem := _problem(file))
    ]


def _problem(file: Path) -> str | None:
    import pyarrow.parquet
    import yaml
    from safetensors import safe_open

    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".jsonl":
            text = file.read_text(encoding="utf-8")
            assert text.endswith("\n"), "cut off"
            for line in text.splitlines():
                json.loads(line)
        elif file.suffix in (".yaml", ".yml"):
            yaml.safe_load(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    opened.get_tensor(name)
        elif file.suffix == ".html":
            assert file.read_text(encoding="utf-8").rstrip().endswith("</html>"), "cut off"
        elif file.suffix == ".parquet":
            pyarrow.parquet.read_table(file)
        elif file.stat().st_size == 0:
            return "empty"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def listed(folder: Path) -> list[str]:
    """Every file and folder under a folder."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))
