"""Whatever happens to a command, what it has written is whole, and the next start ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import Ended, Fault, done, listed, not_whole, start

from mixturelens.types import shown
from scripts.compare_records import compare_folders

HERE = Path(__file__).parent
PAIRS = HERE / "pairs"
ON_PAIR = ("--before", "S", "--after", "R", "--suite", "suite.yaml", "--out", "out", "--quiet")
COMMANDS: dict[str, tuple[str, ...]] = {
    **{name: (name, *ON_PAIR) for name in ("behaviour", "verdict", "patch", "probe", "graft", "features", "repair")},
    "circuit": ("circuit", *ON_PAIR, "--export", "out/c.svg", "--export", "out/c.json", "--export", "out/c.png"),
    "gate": ("gate", *ON_PAIR, "--allow", "routing", "--junit", "out/checks.xml"),
    "report": ("report", *ON_PAIR, "--card", "out/card.md"),
    "report RUN": ("report", "run", "--quiet"),
    "report A B": ("report", "one", "other", "--out", "out", "--quiet"),
    "discover": (
        *("discover", "--before", "S", "--after", "R", "--prompts", "asked.jsonl", "--out", "out", "--quiet"),
        *("--samples", "4", "--max-new-tokens", "4"),
    ),
    "refine": ("discover", "--refine", "found/suite.yaml"),
    "train": ("train", "tiny.yaml", "--out", "out", "--quiet"),
    "forecast": ("forecast", "run", "--quiet"),
    "structure": ("structure", "run", "--quiet"),
    "sweep": ("sweep", "grid.yaml", "--out", "out", "--jobs", "1", "--quiet"),
    "suite init": ("suite", "init", "out"),
}
"""Commands that write, and arguments with which they do."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
MOMENTS = 40


class Usual(NamedTuple):
    """A command that nothing happens to."""

    ended: Ended
    home: Path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that commands are given, which they write beside."""
    home = tmp_path_factory.mktemp("faults") / "desk"
    pair = PAIRS / "llama"
    for name, source in (("S", "S"), ("R", "R-routing")):
        shutil.copytree(pair / source, home / name)
    shutil.copy(pair / "suite.yaml", home)
    rows = [json.loads(line) for line in (pair / "prompts.jsonl").read_text().splitlines()[:24]]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": row["id"] + row["cue"], "prompt": row["prompt"]} for row in rows]
    (home / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tiny = (HERE / "tiny.yaml").read_text().replace("steps: 160", "steps: 24").replace("steps: 8", "steps: 4")
    (home / "tiny.yaml").write_text(f"{tiny}phases: {{A-1: {{cues: [A], steps: 3}}, B-1: {{cues: [B], steps: 3}}}}\n")
    (home / "grid.yaml").write_text("recipe: [tiny.yaml]\nset: {rl.steps: [2]}\nthen: [verdict]\n")
    for command in (
        ("train", "tiny.yaml", "--out", "run", "--quiet"),
        ("verdict", *ON_PAIR[:7], "one", "--quiet"),
        ("verdict", *ON_PAIR[:7], "other", "--seed", "1", "--quiet"),
        (*COMMANDS["discover"][:8], "found", *COMMANDS["discover"][9:]),
    ):
        ended = done(command, home)
        assert ended.status == 0, (command, ended.err)
    return home


@pytest.fixture(scope="module")
def usual(desk: Path):
    """Name of a command -> how it ends, and what it leaves, where nothing happens to it."""

    @functools.cache
    def work(name: str) -> Usual:
        home = copied(desk, f"usual {name}")
        ended = done(COMMANDS[name], home)
        assert ended.status == 0, ended.err
        return Usual(ended, home)

    return work


def copied(desk: Path, name: str) -> Path:
    home = desk.parent / name
    shutil.copytree(desk, home)
    return home


def one_line(ended: Ended) -> str:
    """What is said on standard error: one line, which a terminal may show; before that a sweep's, one of each cell."""
    *cells, last = [line for line in ended.err.splitlines() if line.strip()]
    assert all(": failed (" in line for line in cells), ended.err
    assert last.startswith("mixturelens: "), ended.err
    assert last == shown(last)
    return last


def same(home: Path, usual: Usual) -> None:
    """Nothing is there but what an undisturbed command leaves, and its records are equal to the digit."""
    assert not_whole(home) == []
    assert listed(home) == listed(usual.home)
    assert list(compare_folders(home, usual.home)) == []


def goes_on(home: Path, command: Sequence[str], usual: Usual) -> None:
    """The next start, to which nothing happens, ends as the undisturbed one."""
    ended = done(command, home)
    assert ended.status == 0, ended.err
    same(home, usual)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_any_moment(desk: Path, usual, number: int) -> None:
    draw = random.Random(number)
    name = list(COMMANDS)[number % len(COMMANDS)]
    stop = SIGNALS[number % len(SIGNALS)]
    expected = usual(name)
    # a moment of its time, or the one before a certain write: few moments of the first kind lie between two writes
    if draw.random() < 0.5:
        fault = Fault(after=draw.uniform(0, expected.ended.seconds), signal=stop)
    else:
        fault = Fault(at=draw.randrange(expected.ended.writes), signal=stop)
    home = copied(desk, f"killed {number}")
    ended = done(COMMANDS[name], home, fault)
    assert ended.status in (0, STATUS.get(stop, -stop)), (name, fault, ended)
    if ended.status > 0:
        one_line(ended)
    assert not_whole(home) == [], (name, fault)
    goes_on(home, COMMANDS[name], expected)
    shutil.rmtree(home)


# --- disks, memory, permissions, others at work -----------------------------------------------------------------------

IN_OUT = [name for name, command in COMMANDS.items() if "out" in command]


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], object]]:
    """A folder as a disk of its own, of so many bytes; gives what mounts it again otherwise."""
    folder.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs leave to mount")
    try:
        yield lambda how: mount("-o", f"remount,{how}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_OUT)
def test_a_disk_that_is_full(desk: Path, usual, name: str) -> None:
    expected = usual(name)
    draw, home = random.Random(name), copied(desk, f"full {name}")
    # a page for every file and folder, and what they hold
    kept = [each.stat().st_size for each in (expected.home / "out").rglob("*")]
    least = sum(4096 * (1 + -(-size // 4096)) for size in kept)
    with disk(home / "out", draw.randrange(2, max(3, least // 4096)) * 4096) as mounted:
        ended = done(COMMANDS[name], home)
        if ended.status:
            assert ended.status == 1, ended
            assert "no space left" in one_line(ended) or "failed" in one_line(ended)
        assert not_whole(home) == []
        mounted("size=1g")
        goes_on(home, COMMANDS[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_write_that_fails(desk: Path, usual, name: str) -> None:
    expected, draw = usual(name), random.Random(name)
    fault = Fault(at=draw.randrange(expected.ended.writes), errno=errno.ENOSPC)
    home = copied(desk, f"fails {name}")
    ended = done(COMMANDS[name], home, fault)
    assert ended.status in (0, 1), ended
    if ended.status:
        assert "no space left" in one_line(ended)
    assert not_whole(home) == []
    goes_on(home, COMMANDS[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_files_that_may_not_grow(desk: Path, usual, name: str) -> None:
    expected, home = usual(name), copied(desk, f"large {name}")
    ended = done(COMMANDS[name], home, Fault(largest=random.Random(name).randrange(1, 20_000)))
    assert ended.status in (0, 1), ended
    if ended.status:
        one_line(ended)
    assert not_whole(home) == []
    goes_on(home, COMMANDS[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_memory_that_runs_out(desk: Path, usual, name: str) -> None:
    expected, home = usual(name), copied(desk, f"memory {name}")
    ended = done(COMMANDS[name], home, Fault(memory=random.Random(name).randrange(1 << 20, 200 << 20)))
    assert ended.status in (0, 1, 2), ended
    if ended.status:
        one_line(ended)
    assert not_whole(home) == []
    goes_on(home, COMMANDS[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_OUT)
def test_a_disk_that_is_read_only(desk: Path, usual, name: str) -> None:
    home = copied(desk, f"read-only {name}")
    with disk(home / "out", 64 << 20) as mounted:
        mounted("ro")
        ended = done(COMMANDS[name], home)
        assert ended.status == 2, ended
        assert "no permission to write" in one_line(ended)
        assert ended.seconds < usual(name).ended.seconds / 2 + 2, "measured what could not be written"
        mounted("rw")
        goes_on(home, COMMANDS[name], usual(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once(desk: Path, usual, name: str) -> None:
    home = copied(desk, f"two {name}")
    both = [start(COMMANDS[name], home), start(COMMANDS[name], home)]
    for each in both:
        ended = each.ended()
        assert ended.status == 0, ended.err
    same(home, usual(name))


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/nowhere/at-all", "/proc"])
@pytest.mark.parametrize("name", ["behaviour", "train"])
def test_no_home(desk: Path, usual, name: str, home: str | None) -> None:
    """A start from the very beginning: HOME is not given, not there or not to be written in; the user has no name."""
    folder = copied(desk, f"homeless {name} {str(home).replace('/', '-')}")
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    lines = (
        "import pwd, sys, pytest",
        "pwd.getpwuid = lambda number: {}[number]",
        f"sys.path.insert(0, {str(HERE)!r})",
        "from stored import few_nulls",
        "few_nulls(pytest.MonkeyPatch())",
        "from mixturelens.cli import main",
        "main()",
    )
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *COMMANDS[name]],
        cwd=folder,
        env=given if home is None else {**given, "HOME": home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    same(folder, usual(name))
