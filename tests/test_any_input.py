"""Whatever lies in a file or stands in an argument: it is read and sensible, or refused in one line that names it.

Never another exception, a hang, all memory, or a file that is left behind. Kinds of trouble that this found have tests
of their own, beside those of what reads the file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hostile import INSPECT, KINDS, PAIRS, RECORDS, Kind, make_completions, make_log, spoil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mixturelens as ml
from mixturelens import cli
from mixturelens.cli.shared import app
from mixturelens.lab import runs
from mixturelens.limits import limited
from mixturelens.types import InputError, RunError, shown

MANY = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
"""What fails is one file; to shrink a draw of it would take minutes, and make it no clearer."""
SECONDS = 30.0
MEMORY = 3 << 30


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid files for each kind, by its number."""
    home = tmp_path_factory.mktemp("valid")
    for number, kind in enumerate(KINDS):
        (home / str(number)).mkdir()
        kind.make(home / str(number))
    return home


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Work that must end: what does not listen ends the tests, with the place where it was."""
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
    try:
        with limited(SECONDS, MEMORY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about what they were given
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def outcome(kind: Kind, folder: Path) -> str | None:
    """What is said of the files of a folder; None where they are read."""
    before = sorted(folder.parent.rglob("*"))
    try:
        with watched():
            assert kind.read(folder), "not sensible"
        said = None
    except (InputError, RunError) as error:
        said = str(error)
        assert said == shown(said), "not one line, or not safe to print"
        assert len(said) < 3000
        assert str(folder) in said or said.startswith(("prompt ", "/dev/")), said  # as `prompts: /dev/zero` says
    assert sorted(folder.parent.rglob("*")) == before, "something was left behind"
    return said


def test_what_is_valid_is_read(valid: Path):
    for number, kind in enumerate(KINDS):
        assert outcome(kind, valid / str(number)) is None, kind.file


def one(valid: Path, number: int, pick: Callable[[int], int]) -> None:
    folder = valid / f"spoiled-{number}"
    shutil.copytree(valid / str(number), folder)
    try:
        spoil(folder / KINDS[number].file, pick)
        outcome(KINDS[number], folder)
    finally:
        shutil.rmtree(folder)


@settings(MANY, max_examples=240, derandomize=True)
@given(st.integers(0, len(KINDS) - 1), st.randoms(use_true_random=False))
def test_what_is_spoiled_is_read_or_refused(valid: Path, number: int, draw: random.Random):
    one(valid, number, draw.randrange)


# --- arguments --------------------------------------------------------------------------------------------------------

PAIR = ("--before", "pair/S", "--after", "pair/S", "--suite", "pair/suite.yaml", "--trained-cue", "A")
ON_CHAT = ("--before", "chat/S", "--after", "chat/S", "--suite", "chat/suite.yaml")
ON_PAIRS = ("behaviour", "verdict", "patch", "probe", "graft", "features", "repair", "gate", "report")
COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    *(((name,), PAIR) for name in ON_PAIRS),
    (("verdict",), ("run",)),
    (("verdict",), (*ON_CHAT, "--completions", "log.json", "--completions", "c.jsonl")),
    (("behaviour",), (*ON_CHAT, "--completions", "c.jsonl")),
    (("discover",), (*PAIR[:4], "--prompts", "pair/prompts.jsonl", "--max-new-tokens", "8")),
    (("circuit",), ("one", "--export", "new/c.svg", "--edges", "9")),
    (("report",), ("one", "other", "--out", "new")),
    (("train",), ("default", "--out", "new", "--set", "rl.steps=3")),
    (("structure",), ("run",)),
    (("forecast",), ("run",)),
    (("sweep",), ("grid.yaml", "--out", "new")),
    (("suite", "check"), ("pair/suite.yaml", *PAIR[:4])),
    (("suite", "init"), ("new",)),
    (("suite", "export"), ("pair/suite.yaml", "--inspect", "new")),
)
"""Commands, and arguments with which they do what they should."""


@functools.cache
def options(command: tuple[str, ...]) -> list[str]:
    """Every option of a command."""
    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    return [name for parameter in found.params for name in parameter.opts if name.startswith("--")] or ["--nothing"]


WORDS = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1",
        "7",
        "1e9",
        "inf",
        "-inf",
        "nan",
        "9" * 30,
        "9" * 5000,
        "x",
        "\x1b[31m",
        "\u202e",
    ),
    *(
        "a" * 300,
        "a" * 5000,
        "a/b",
        "org/none@x:y",
        "..",
        "../..",
        "/dev/zero",
        "/dev/null/x",
        "pipe",
        "file",
        "folder",
    ),
    *("cpu", "cuda", "meta", "float16", "auto", "A", "neither", "http://127.0.0.1:1/v1", "http://example.org/v1", "--"),
    *("file:x", "rl.steps=0", "=", "a.b=c", "rl=[", "seed=.nan", "model.sizes.hidden_size=1", "name=..", "pair", "run"),
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to call commands in: a pair, a run, and odd files. What would take long says that it was reached."""
    home = tmp_path_factory.mktemp("desk")
    shutil.copytree(PAIRS / "llama", home / "pair", ignore=shutil.ignore_patterns("R-*"))
    shutil.copytree(RECORDS, home / "run", ignore=shutil.ignore_patterns("seeds", "records", "*.html", "trajectory"))
    os.mkfifo(home / "pipe")
    (home / "file").write_text("{")
    (home / "grid.yaml").write_text("set: {rl.steps: [2, 4]}")
    (home / "folder").mkdir()
    shutil.copytree(PAIRS / "chat", home / "chat", ignore=shutil.ignore_patterns("R"))
    make_completions(home)
    make_log(home)
    for name in ("one", "other"):
        shutil.copytree(RECORDS / "records" / "sft--rl-A", home / name / "records" / "sft--rl-A")
    return home


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise RunError("reached")

    for name in ("measure", "verdict", "patch", "circuit", "probe", "graft", "decompose", "repair", "report", "card"):
        monkeypatch.setattr(ml, name, stop)
    for name in ("discover", "refine_discovery"):
        monkeypatch.setattr(ml, name, stop)
    for name in ("train_stage", "forecast_records", "structure_record"):
        monkeypatch.setattr(runs, name, stop)
    monkeypatch.setattr("mixturelens.discovery.draws.draw", stop)
    monkeypatch.setattr("mixturelens.lab.sweep.run._here", stop)
    monkeypatch.setattr("mixturelens.cli.suite._written", stop)
    monkeypatch.setitem(sys.modules, "inspect_ai", INSPECT)


@pytest.mark.slow
def test_what_is_right_is_done(desk: Path, reached: None, capsys: pytest.CaptureFixture[str]):
    for command, usual in COMMANDS:
        status, err = done(desk, [*command, *usual], capsys)
        assert status == 0 or err.strip().endswith("mixturelens: reached"), (command, err)


def call(desk: Path, pick: Callable[[int], int], capsys: pytest.CaptureFixture[str]) -> None:
    command, usual = COMMANDS[pick(len(COMMANDS))]
    arguments = list(usual)
    for _ in range(1 + pick(3)):
        word, how = WORDS[pick(len(WORDS))], pick(5)
        if how == 0 and arguments:
            del arguments[pick(len(arguments))]
        elif how <= 2 and arguments:
            arguments[pick(len(arguments))] = word
        else:
            option = options(command)[pick(len(options(command)))]
            arguments += [option, word] if pick(8) else [option]
    done(desk, [*command, *arguments], capsys)


def done(desk: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Call a command; its status, and what it says on standard error. What it leaves is taken away."""
    before = set(desk.rglob("*"))
    status = 0
    with watched(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setattr(sys, "argv", ["mixturelens", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    _, err = capsys.readouterr()
    left = set(desk.rglob("*")) - before
    for path in sorted(left, reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert status in (0, 1, 2), arguments
    if status:
        lines = err.strip().splitlines()
        assert lines[-1].startswith(("mixturelens: ", "Error: ", "Usage: ")) or "--help" in err, (arguments, err)
        assert all(line == shown(line) for line in lines if line.startswith("mixturelens: ")), arguments
    assert not (status == 2 and left), (arguments, left)
    return status, err


@settings(MANY, max_examples=60, derandomize=True)
@given(draw=st.randoms(use_true_random=False))
def test_whatever_is_given_as_arguments_is_done_or_refused(
    desk: Path, reached: None, capsys: pytest.CaptureFixture[str], draw: random.Random
):
    call(desk, draw.randrange, capsys)


# --- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(MANY, max_examples=10_000)
@given(st.integers(0, len(KINDS) - 1), st.randoms(use_true_random=False))
def test_ten_thousand_that_are_spoiled(valid: Path, number: int, draw: random.Random):
    one(valid, number, draw.randrange)


@pytest.mark.slow
@settings(MANY, max_examples=2_000)
@given(draw=st.randoms(use_true_random=False))
def test_two_thousand_calls(desk: Path, reached: None, capsys: pytest.CaptureFixture[str], draw: random.Random):
    call(desk, draw.randrange, capsys)
