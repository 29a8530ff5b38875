"""What a command says on standard error while it works."""

from __future__ import annotations

import time

import pytest

from mixturelens.cli import progress
from mixturelens.cli.progress import working
from mixturelens.models.cost import Estimate, TimedLine, announced


def test_a_log_says_now_and_then_that_announced_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BEAT", 0.2)
    monkeypatch.setattr(progress, "TICK", 0.1)
    with working(quiet=False) as (_, say):
        say("note: templates differ")
        say(announced("repair", Estimate(seconds=200.0, memory=1e9)))
        say("repair: interchange")
        time.sleep(0.5)
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "note: templates differ",
        "measuring: repair: about 3 min, at most 1.0 GB",
        "measuring: repair: interchange",
    ]
    assert said[3].startswith("still repair (interchange): ")
    assert said[3].endswith(" s so far, about 3 min left")


def test_work_that_nobody_estimated_says_how_long_it_has_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BEAT", 0.2)
    monkeypatch.setattr(progress, "TICK", 0.1)
    with working(quiet=False) as (count, say):
        say("loading")
        time.sleep(0.35)
        count("SFT", 1, 8, {"loss": 0.5})  # what counts its steps speaks for itself
        time.sleep(0.35)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "measuring: loading"
    assert said[1].startswith("still loading: ")
    assert said[2:] == ["SFT 1/8  loss 0.500"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with working(quiet=True) as (count, say):
        say("loading")
        count("SFT", 1, 8, {})
    assert capsys.readouterr().err == ""


def test_what_is_announced_says_how_long_it_takes() -> None:
    line = announced("repair", Estimate(seconds=200.0, memory=1e9), ", if so")
    assert isinstance(line, TimedLine)
    assert (line, line.seconds) == ("repair: about 3 min, at most 1.0 GB, if so", 200.0)
    assert announced("repair", Estimate(seconds=3.0, memory=1e9)).seconds is None


def test_a_command_that_has_said_nothing_yet_says_that_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.05)
    with working(quiet=False) as (_, say):
        time.sleep(0.2)
        say("behaviour")
    assert capsys.readouterr().err.splitlines() == ["loading libraries and checkpoints", "measuring: behaviour"]
