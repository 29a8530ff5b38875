"""The page of a sweep: what came of each setting in words, heat maps and a table; and what failed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures import DASH, show
from mixturelens.lab.figures.sweep import Axis, NumberMap, Spread, WordMap, heat_maps
from mixturelens.pages.parts import Picture, Pictures, number, render
from mixturelens.records import write_text
from mixturelens.types import Interval

if TYPE_CHECKING:
    import pandas as pd

Axes = Mapping[str, Sequence[Any]]
MAPPED: dict[str, tuple[str, float | None, float | None]]
MAPPED = {"routing_share": ("routing share", 0.0, 1.0), "verdict": ("verdict", None, None)}
"""Column -> title, and the ends of its colours (words have none); besides accuracy under each cue, after."""


class Swept(NamedTuple):
    """What a grid came to."""

    table: pd.DataFrame
    """One row for each cell that is done and each of its checkpoints."""
    axes: Axes
    """Every key of the grid with its values, in the order of the grid."""
    seeds: Sequence[int]
    cells: int
    failed: Mapping[str, str]
    """Cell -> why."""


def write_sweep(path: Path, title: str, swept: Swept, grid: str) -> Path:
    """Write the page, whole or not at all. `grid` is the text of the file that asked for the sweep."""
    pictures, (table, axes, seeds, _, failed) = Pictures(), swept
    context = {
        "title": title,
        "answer": answer(swept),
        "failed": list(failed.items()),
        "checkpoints": [
            (f"{name}, {_trained(of)}", [_figure(of, at, axes, seeds, pictures) for at in _further(axes)])
            for name, of in table.groupby("after", sort=False)
        ],
        "rows_head": ("cell", "after", *(name for name, _, _ in columns(table).values())),
        "rows": [_row(row, table) for row in table.to_dict("records")],
        "grid": grid,
    }
    write_text(path, render("sweep.html.j2", context, pictures))
    return path


def answer(swept: Swept) -> list[str]:
    """What the sweep is, and what came of it for each checkpoint, over all settings and seeds."""
    table, axes, seeds, cells, failed = swept
    varied = [f"{len(values)} x {key}" for key, values in axes.items() if len(values) > 1]
    varied.append(f"{len(seeds)} seed{'s' * (len(seeds) > 1)}")
    lines = [f"{cells - len(failed)} of {cells} cells are done: {', '.join(varied)}."]
    for name, of in table.groupby("after", sort=False):
        said = []
        for column, (what, low, _) in columns(table).items():
            if low is None:
                words = ", ".join(f"{word} {count}" for word, count in _counts(of, column).items())
                said.append(f"{what}: {words or DASH}")
            else:
                found = _spread(of, column, len(of))
                said.append(f"{what} {show(found.median)} ({show(found.low)} to {show(found.high)})")
        lines.append(f"{name}, {_trained(of)}, {len(of)} cells, median (least to most): {'; '.join(said)}.")
    return lines


def columns(table: pd.DataFrame) -> dict[str, tuple[str, float | None, float | None]]:
    """The columns of the table that are drawn: title, and the ends of the colours."""
    cues = [
        name.split(".", 1)[1].removesuffix(".after")
        for name in table.columns
        if name.startswith("accuracy.") and name.endswith(".after")
    ]
    accuracies: dict[str, tuple[str, float | None, float | None]]
    accuracies = {f"accuracy.{cue}.after": (f"accuracy under {cue}", 0.0, 1.0) for cue in cues}
    return accuracies | {column: look for column, look in MAPPED.items() if column in table.columns}


def _trained(of: pd.DataFrame) -> str:
    cues = of["trained_cue"].dropna().unique()
    return f"trained on {', '.join(cues)}" if len(cues) else "trained on several cues"


def _spread(table: pd.DataFrame, column: str, seeds: int) -> Spread:
    known: Any = table[column].dropna()
    if known.empty:
        return Spread(None, None, None, 0, seeds)
    return Spread(float(known.median()), float(known.min()), float(known.max()), len(known), seeds)


def _counts(table: pd.DataFrame, column: str) -> dict[str, int]:
    """Word -> how often, the most frequent first; words that are as frequent by the alphabet."""
    counts: Any = table[column].dropna().value_counts()
    return dict(sorted(((str(word), int(n)) for word, n in counts.items()), key=lambda each: (-each[1], each[0])))


# --- over the grid ----------------------------------------------------------------------------------------------------


def _drawn(axes: Axes) -> list[str]:
    """The keys across and up: the first two of several values."""
    return [key for key, values in axes.items() if len(values) > 1][:2] or list(axes)[:1]


def _further(axes: Axes) -> list[dict[str, Any]]:
    """Settings of the keys that are not drawn: a figure each."""
    keys = [key for key, values in axes.items() if len(values) > 1 and key not in _drawn(axes)]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axes[key] for key in keys))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _at(table: pd.DataFrame, setting: Mapping[str, Any]) -> pd.DataFrame:
    found: Any = table
    for key, value in setting.items():
        found = found[found[key] == (_text(value) if found[key].dtype == "string" else value)]
    return found


def _figure(
    table: pd.DataFrame, at: Mapping[str, Any], axes: Axes, seeds: Sequence[int], pictures: Pictures
) -> Picture:
    across, *rest = _drawn(axes)
    up = rest[0] if rest else None
    grid = [
        [_at(table, {**at, across: x, **({up: y} if up else {})}) for x in axes[across]]
        for y in (axes[up] if up else [None])
    ]
    maps: list[NumberMap | WordMap] = []
    for column, (what, low, high) in columns(table).items():
        if low is None or high is None:
            maps.append(WordMap(what, [[_counts(of, column) for of in line] for line in grid]))
        else:
            maps.append(NumberMap(what, [[_spread(of, column, len(seeds)) for of in line] for line in grid], low, high))
    where = "".join(f"{key} {_text(value)}. " for key, value in at.items())
    caption = (
        f"{where}Median over seeds, with the least and the most of them; white is 0, green 1. Verdicts: how many seeds "
        "say so; tinted where more than half agree."
    )
    figure = heat_maps(
        maps,
        Axis(across, [_text(value) for value in axes[across]]),
        Axis(up, [_text(value) for value in axes[up]]) if up else Axis("", [""]),
    )
    return pictures.add(figure, caption, read="a cell is one setting: the greener, the nearer to 1.", whiskers=False)


def _row(row: Mapping[Any, Any], table: pd.DataFrame) -> tuple[str | tuple[str, str], ...]:
    cells: list[str | tuple[str, str]] = [row["cell"], row["after"]]
    for column, (_, low, _) in columns(table).items():
        if low is None:
            cells.append(_known(row[column]) or DASH)
        else:
            value, least, most = (_known(row[name]) for name in (column, f"{column}.low", f"{column}.high"))
            cells.append(number(Interval(value=value, low=least, high=most)))
    return tuple(cells)


def _known(value: Any) -> Any:
    import pandas as pd

    return None if pd.isna(value) else value
