"""Figures and the section of the forecast draw the numbers of its record, before RL and after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mixturelens.cli.lab_tables import show_forecasts
from mixturelens.figures import cue_colour
from mixturelens.lab.figures.forecast import drifts, forecast
from mixturelens.lab.forecast.record import ANSWERS, Curves, ForecastRecord, ForecastScore, Happened, Point, Start
from mixturelens.lab.pages.forecast import forecasts
from mixturelens.pages import Grown, write_report
from mixturelens.pages.parts import Pictures
from mixturelens.types import Interval

ON = (0.5, 0.75, 1.0)


def around(value: float, by: float = 0.02) -> Interval:
    return Interval(value=value, low=value - by, high=value + by)


def make_record(*, done: bool = True, **changes: Any) -> ForecastRecord:
    """RL on A; B was forecast to fall to 0.05, <C> to stay."""
    off = {
        "B": Curves(
            forecast=tuple(around(v) for v in (0.5, 0.3, 0.05)),
            softmax=(0.5, 0.26, 0.02),
            replicator=(0.5, 0.33, 0.18),
            constant=(0.5,) * 3,
            renormalised=(0.5, 0.34, 0.18),
        ),
        "<C>": Curves(forecast=(around(0.6),) * 3, **dict.fromkeys(ANSWERS[1:], (0.6,) * 3)),
    }
    cues = ("A", "B", "<C>")
    score = ForecastScore(errors=dict(zip(ANSWERS, (0.011, 0.031, 0.021, 0.201, 0.0221), strict=True)), covered=0.875)
    happened = Happened(
        points=tuple(
            Point(step=step, accuracy={"A": around(a), "B": around(b), "<C>": around(0.6)}, forced={})
            for step, a, b in ((0, 0.5, 0.5), (3, 0.75, 0.31))
        ),
        compared=(3,),
        scores={"B": score, "<C>": score},
        clock=ForecastScore(errors={"forecast": 0.0123, "constant": 0.25}, covered=0.5),
        specialists=0.004,
    )
    fields = {
        "trained_cue": "A",
        "cues": cues,
        "policies": ("a", "b"),
        "questions": 8,
        "start": {cue: Start(weights={"a": around(0.5)}, right={"a": around(1, 0)}) for cue in cues},
        "kernel": dict.fromkeys(cues, ((0.1, 0.0), (0.0, 0.1))),
        "reach": {"A": 1.0, "B": 0.987, "<C>": 0.4},
        "rescaled": 0.91,
        "on": ON,
        "off": off,
        "steps": dict.fromkeys(cues, tuple(around(v) for v in (0.5, 0.6, 0.7, 0.8))),
        "happened": happened if done else None,
    }
    return ForecastRecord(**{**fields, **changes})


def traces(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if (trace.name or "").startswith(name)]


def test_each_other_cue_has_a_panel_with_every_answer_and_what_was_measured():
    figure = forecast(make_record())
    assert [a.text for a in figure.layout.annotations] == [
        "cue B, without a clock",
        "cue &lt;C&gt;, without a clock",
        "step by step",
    ]
    for name, values in (
        ("softmax", (0.5, 0.26, 0.02)),
        ("replicator", (0.5, 0.33, 0.18)),
        ("forecast: ", (0.5, 0.3, 0.05)),
    ):
        drawn, other = traces(figure, name)
        assert tuple(drawn.x) == ON
        assert tuple(drawn.y) == values
        assert other.showlegend is False
    measured = traces(figure, "measured, cue B")[0]
    assert tuple(measured.x) == (0.5, 0.75)
    assert tuple(measured.y) == (0.5, 0.31)
    assert measured.marker.color == cue_colour("B", ("A", "B", "<C>"))
    assert measured.error_y.array == pytest.approx((0.02, 0.02))
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert tuple(band.y) == pytest.approx((0.52, 0.32, 0.07, 0.03, 0.28, 0.48))
    assert "step 3" in measured.hovertext[1]


def test_before_rl_there_is_nothing_measured():
    figure = forecast(make_record(done=False))
    assert all(not trace.x for trace in traces(figure, "measured"))
    assert tuple(traces(figure, "forecast, cue A")[0].y) == (0.5, 0.6, 0.7, 0.8)


def test_runs_of_several_seeds_are_drawn_less_the_plain_drift():
    record = make_record()
    figure = drifts({"5%": [record, record], "10%": [record]}, "B")
    assert [a.text for a in figure.layout.annotations] == ["5%", "10%"]
    plain = traces(figure, "softmax")
    above, below = [(0.5, 0.26, 0.02)] * 2, [(0.0, 0.0, 0.0)] * 2
    assert [tuple(trace.y) for trace in plain] == [*above, *below, above[0], below[0]]
    lines = traces(figure, "replicator")[-1]
    np.testing.assert_allclose(lines.y, (0, 0.07, 0.16))
    points = traces(figure, "measured")[-1]
    np.testing.assert_allclose(points.y, (0, 0.05))
    assert len({trace.marker.symbol for trace in traces(figure, "measured")[:2]}) == 2
    assert sum(bool(trace.showlegend) for trace in figure.data) == 4


def test_the_section_says_what_was_wrong_and_what_was_taken_for_granted():
    (section,) = forecasts([make_record()], Pictures())
    assert section.columns == ["B", "<C>"]
    assert section.errors[0] == ("forecast", ["0.011", "0.011"])
    assert section.errors[-1] == ("steps in the forecast's interval", ["0.88", "0.88"])
    adam, kernel, specialists, clock = section.assumptions
    assert (adam.holds, kernel.holds, specialists.holds, clock.holds) == (False, False, True, False)
    assert "cue <C>: 0.400 times" in kernel.measured
    (before,) = forecasts([make_record(done=False, rescaled=0.0)], Pictures())
    assert before.errors == []
    assert [row.holds for row in before.assumptions] == [True, False, None, None]


def test_the_page_has_the_section_only_where_there_is_a_forecast(tmp_path):
    grown = Grown("t", forecasts=lambda pictures: forecasts([make_record()], pictures))
    page = write_report(tmp_path / "with.html", [], grown).read_text()
    assert '<section id="forecast">' in page
    assert "cue &lt;C&gt;" in page
    assert '<section id="forecast">' not in write_report(tmp_path / "without.html", [], Grown("t")).read_text()


def test_the_terminal_says_the_same(capsys: pytest.CaptureFixture[str]):
    show_forecasts([make_record()])
    out = capsys.readouterr().out
    assert "0.300 [0.280, 0.320]" in out
    assert "mean error 0.012, covered 0.500" in out
    show_forecasts([make_record(done=False)])
    assert "is not done yet" in capsys.readouterr().out
