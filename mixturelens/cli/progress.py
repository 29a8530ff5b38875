"""Progress of a command on standard error: what it does, for how long, and how long that will still take."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mixturelens.types import shown

LONG = 60.0
"""Seconds from which on a log says how long training will take."""
TICK = 1.0
"""Seconds after which a terminal shows again how long work has taken."""
BEAT = 30.0
"""Seconds after which a log says again what is going on."""
LOADING = "loading libraries and checkpoints"
"""What a command does at first: importing torch and transformers alone takes seconds."""
Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as progress(stage, step, steps, numbers)."""
Say = Callable[[str], None]


@contextlib.contextmanager
def working(quiet: bool) -> Iterator[tuple[Progress, Say]]:
    """Progress on standard error, and nothing that a library prints on standard output.

    Stages that count their steps call the first; whatever else takes time says what it does by the second, and is seen
    to go on, with the time left where an estimate was announced.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from mixturelens.models import quiet_libraries

    quiet_libraries()
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    live = console.is_terminal and not quiet
    with contextlib.redirect_stdout(sys.stderr), Bars(*columns, console=console, disable=not live) as bars:
        screen = _Screen(console, bars if live else None)
        with screen.beating() if not quiet else contextlib.nullcontext():
            yield screen.progress, screen.say


class _Screen:
    """What is shown of a command: bars on a terminal; in a log, a line now and then."""

    def __init__(self, console: Any, bars: Any) -> None:
        self.console, self.bars = console, bars
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.what = LOADING
        """The work that was announced last, and what it does now (empty: work that counts its steps, or none)."""
        self.step, self.told = "", False
        self.start = self.last = time.monotonic()
        self.seconds: float | None = None
        """What the announced work takes in all."""
        self.lock = threading.Lock()

    def progress(self, stage: str, step: int, steps: int, numbers: dict[str, float]) -> None:
        now = time.monotonic()
        said = "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        with self.lock:
            self._end()
            start, first = self.began.setdefault(stage, (now, step))
            left = (now - start) / max(1, step - first) * (steps - step)
            if self.bars is not None:
                fields = {"done": f"{step}/{steps}", "left": _left(left) if step > first else "", "numbers": said}
                self._bar(stage, steps, completed=step, **fields)
            # a log gets a line now and then instead of a bar, and an early one where it will take long
            elif step % max(1, steps // 8) == 0 or (step == first + 1 and left > LONG):
                also = f"  {_left(left)}" if left > LONG else ""
                self._print(f"{stage} {step}/{steps}  {said}{also}")

    def say(self, text: str) -> None:
        with self.lock:
            if text.startswith("note: "):
                self._print(text, "dim")
                return
            seconds = getattr(text, "seconds", None)
            self.last = time.monotonic()
            what, _, step = text.partition(": ")
            if seconds is not None or self.what in ("", LOADING):
                self._end()
                self.what, self.start, self.seconds = what, self.last, seconds
            self.step = "" if seconds is not None else step if what == self.what else text
            self._print(f"measuring: {text}", "dim")

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Show that work goes on, every second on a terminal and every BEAT in a log, for the length of a block."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(TICK):
                with self.lock:
                    self._still()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with self.lock:
                self._end()

    def _still(self) -> None:
        """That what was said last still goes on."""
        now = time.monotonic()
        if not self.what:
            return
        gone = now - self.start
        left = "" if self.seconds is None else _left(self.seconds - gone)
        if self.bars is not None:
            total = None if self.seconds is None else max(self.seconds, gone)
            self._bar(self.what, total, completed=gone, done="", left=left, numbers=self.step)
        elif self.what == LOADING and not self.told:
            self.told = True
            self._print(LOADING, "dim")
        elif now - self.last >= BEAT:
            self.last = now
            also = f", {left}" if left else ""
            said = f"still {self.what}{f' ({self.step})' if self.step else ''}: {gone:.0f} s so far{also}"
            self._print(said, "dim")

    def _print(self, text: str, style: str = "") -> None:
        """A line, in which names and texts of other people move no cursor."""
        self.console.print(shown(text), style=style, markup=False, highlight=False, soft_wrap=True)

    def _bar(self, name: str, total: float | None, **state: Any) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, done="", left="", numbers="")
        self.bars.update(self.tasks[name], total=total, **state)

    def _end(self) -> None:
        """The work that was announced is done: its bar goes."""
        if self.what in self.tasks and self.what not in self.began:
            self.bars.remove_task(self.tasks.pop(self.what))
        self.what = ""


def _left(seconds: float) -> str:
    from mixturelens.models.cost import said_time

    return f"{said_time(seconds)} left" if seconds > 0 else "longer than was thought"
