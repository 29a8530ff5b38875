"""Figures of schedules draw the numbers of the record."""

from __future__ import annotations

import pytest

from mixturelens import figures
from mixturelens.lab.figures.structures import phase_diagram, schedule
from mixturelens.lab.regimes import Shares
from mixturelens.lab.structure import Checkpoint, Regimes, StructureRecord
from mixturelens.types import NOT_MEASURED, Interval


def value(x: float) -> Interval:
    return Interval(value=x, low=x - 0.05, high=x + 0.05)


def record(general: float, conditional: float, churn: float, name: str = "mixed") -> StructureRecord:
    fixed = 1 - general - conditional - churn
    shares = Shares(
        generality=value(general),
        conditionality=value(conditional),
        oscillation=value(churn),
        fixed=value(fixed),
        lead={},
    )
    earned = {cue: {"A": value(0.8), "B": value(0.2), "<C>": value(0.8)} for cue in ("A", "B", "<C>")}
    points = [Checkpoint(name="sft", train=None, earned=earned)]
    points += [Checkpoint(name=f"{c}-1", train="rl", trained=(c,), steps=10, earned=earned) for c in "AB"]
    return StructureRecord(
        questions=40,
        looked=False,
        cues=("A", "B", "<C>"),
        structure=name,
        pairs=(Regimes(first="A", second="B", shares=shares, structure=name),),
        retention={},
        fragility=NOT_MEASURED,
        checkpoints=tuple(points),
    )


def test_a_cell_is_shared_out_seed_by_seed() -> None:
    cells = {(t, s, seed): record(s / 2, t / 3, 0.1) for t in (0.0, 1.0) for s in (0.0, 1.0) for seed in (0, 1)}
    cells[1.0, 1.0, 1] = record(0.9, 0.0, 0.0, "generalist")
    figure = phase_diagram(cells)
    assert [bar.name.split()[-1] for bar in figure.data] == ["generalist", "policy", "churn", "differ"]
    for bar in figure.data:
        assert len(bar.x) == 8
    total = [sum(bar.x[i] for bar in figure.data) for i in range(8)]
    assert total == pytest.approx([0.9] * 8)
    texts = [annotation.text for annotation in figure.layout.annotations]
    assert sorted(texts) == ["mixed", "mixed", "mixed", "mixed 1, generalist 1"]


def test_a_negative_share_draws_nothing() -> None:
    figure = phase_diagram({(0.0, 0.0, 0): record(0.0, -0.2, 0.0)})
    assert figure.data[1].x == (0.0,)


def test_a_schedule_has_a_panel_a_cue_and_a_band_a_phase() -> None:
    figure = schedule({"one": record(0, 1, 0), "two": record(0, 0, 1)})
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles[:3] == ["cue A", "cue B", "cue &lt;C&gt; (no phase trains on it)"]
    assert len(figure.data) == 2 * 3 * 2  # runs, cues, objectives of regimes
    assert len(figure.layout.shapes) == 2 * 3 * 2  # runs, cues, phases
    assert figure.data[0].x == (0, 10, 20)
    assert figure.data[0].y == (0.8, 0.8, 0.8)
    assert figure.data[0].line.color == figures.cue_colour("A", ("A", "B", "<C>"))
