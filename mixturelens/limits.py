"""A limit to the time and the memory of work that somebody else's file decides about: a template, a pattern."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MEMORY = 256 << 20
"""Bytes beyond what the process holds."""


@contextlib.contextmanager
def limited(seconds: float, memory: int = MEMORY) -> Iterator[None]:
    """Raise TimeoutError in work that computes for longer, and MemoryError in work that takes more.

    Time is what the process computes, however busy the machine is; and it is limited in the main thread alone, where a
    command runs. Memory is limited where the
    system lets a process limit itself (Linux).
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            stack.enter_context(_timed(seconds))
        if Path("/proc/self/statm").exists():
            stack.enter_context(_bounded(memory))
        yield


@contextlib.contextmanager
def _timed(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"takes more than {seconds:g} s of computing")

    handler = signal.signal(signal.SIGVTALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, left, every)  # whoever set one before goes on waiting
        signal.signal(signal.SIGVTALRM, handler)


@contextlib.contextmanager
def _bounded(memory: int) -> Iterator[None]:
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = [limit for limit in (held + memory, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
