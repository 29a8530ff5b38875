"""The page of a score: how often the instruments are right, in words, pictures and tables; and for the docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixturelens.figures import DASH, show, show_interval
from mixturelens.lab.figures import score as draw
from mixturelens.pages.parts import Picture, Pictures, number, render
from mixturelens.records import write_text
from mixturelens.types import Interval

if TYPE_CHECKING:
    from mixturelens.lab.proving.planted import Planted
    from mixturelens.lab.proving.proof import Proof
    from mixturelens.lab.proving.record import ScoreRecord, Verdicts

_SHARES = "a point on the diagonal was measured as it truly is."
_CONFUSION = "right verdicts lie on the outlined diagonal; everything off it is a mistake."
_NAMES = {"behavioural": "The behavioural verdict", "mechanism": "The mechanism's verdict"}
Cell = str | tuple[str, str]
"""Of a table: words, or a number and its interval."""


def write_score(path: Path, record: ScoreRecord) -> Path:
    """Write the page, whole or not at all; what was not scored yet is said. It asks no network for anything."""
    pictures = Pictures()
    context = {
        "title": "mixturelens: the score of its instruments",
        "answer": answer(record),
        "missed": missing(record),
        "verdicts": [_verdict(name, record, pictures) for name in _NAMES],
        "shares": [pictures.add(draw.shares(record), _shares_caption(record), read=_SHARES)] if record.pairs else [],
        "numbers_head": ("quantity", *(f"{half} half" for half in _halves(record))),
        "numbers": _numbers(record),
        "coverage": [_coverage(record, pictures)] if record.coverage else [],
        "coverage_lines": _coverage_lines(record),
        "methods": [_methods(record, pictures)] if record.methods else [],
        "methods_head": ("method", "looks for", *draw.METRICS.values(), "cut", "organisms"),
        "methods_rows": _method_rows(record),
        "proofs_head": (
            "organism",
            "planted",
            "inert: cue, hint",
            "carried: cue, hint",
            "accuracy",
            "each reader alone",
            "no reader",
            "change: it, the rest",
        ),
        "proofs": [_proof(*pair) for pair in zip(record.planted, record.proofs, strict=True)],
        "mistakes_head": ("pair", "verdict", "true → said", "share, true → measured", "bits moved, likewise", "reason"),
        "mistakes": _mistakes(record),
        "broken_head": ("instrument", "what was broken", "sound", "broken", "caught"),
        "broken_by": "; ".join(dict.fromkeys(each.by for each in record.broken)),
        "broken": [
            (b.name, b.what, show(b.sound, 2), show(b.broken, 2), "yes" if b.caught else "NO") for b in record.broken
        ],
        "thresholds": [(name, f"{value:g}") for name, value in record.thresholds.model_dump().items()],
        "seconds": [(name, show(value, 1)) for name, value in record.seconds.items()],
        "parts_head": ("what changed", "half", "pairs", "right", "wrong", "cannot tell"),
        "parts": _parts(record),
        "provenance": [("device", record.provenance.device), *record.provenance.versions.items()],
    }
    write_text(path, render("score.html.j2", context, pictures))
    return path


# --- the answer in words ----------------------------------------------------------------------------------------------


def answer(record: ScoreRecord) -> list[str]:
    """What the score says, in sentences: verdicts on the held-out half, intervals, addresses, broken instruments."""
    lines = [_sentence(each) for each in record.verdicts if each.half == "held-out"]
    lines += _coverage_lines(record)[:1]
    if record.methods:
        best = "; ".join(_best(record, kind) for kind in dict.fromkeys(each.contrast for each in record.methods))
        lines.append(f"Best at finding what was planted, by IoU over organisms that did not choose the cut: {best}.")
    if record.broken:
        lines.append(_broken_line(record))
    return lines


def missing(record: ScoreRecord) -> list[str]:
    """What of the ground has no score yet."""
    due = [each for each in record.pairs if each.announced != "none" and each.asked == "literal"]
    silent = sum(each.mechanism is None for each in due)
    found = [
        (record.done < record.cells, f"{record.cells - record.done} of {record.cells} pairs"),
        (bool(record.failed), f"what failed: {'; '.join(record.failed)}"),
        (not record.opened, "the held-out half, which has not been opened"),
        (silent > 0, f"the mechanism of {silent} of {len(due)} pairs"),
        (not record.coverage, "coverage over resampled suites"),
        (not record.planted, "planted addresses"),
        (bool(record.planted) and not record.methods, "methods on planted organisms, of which one half alone is grown"),
        (not record.broken, "broken instruments"),
    ]
    return [line for so, line in found if so]


def _sentence(sums: Verdicts) -> str:
    name = _NAMES[sums.instrument]
    if not sums.pairs:
        return f"{name} has not been scored on the {sums.half} half."
    right = sum(row.get(truth, 0) for truth, row in sums.confusion.items())
    careful = sum(row.get("inconclusive", 0) for truth, row in sums.confusion.items() if truth != "inconclusive")
    wrong = sums.pairs - right
    rest = f", and of the other {wrong} it called {careful} inconclusive" if wrong else ""
    alarms = (
        f"of {sums.nothing} in which nothing changed it called {sums.false_alarms} changed"
        if sums.nothing
        else "none of them is one in which nothing changed"
    )
    near = f" Near misses, apart: {sums.near_ok} of {sums.near} right or inconclusive." if sums.near else ""
    if sums.untold:
        near += f" Pairs that completions cannot tell, apart: {sums.untold_ok} of {sums.untold} right or inconclusive."
    return (
        f"On the {sums.half} half {name[0].lower()}{name[1:]} was right on {right} of {sums.pairs} pairs "
        f"({show_interval(sums.right, 2)}){rest}; {alarms}.{near}"
    )


def _coverage_lines(record: ScoreRecord) -> list[str]:
    """Off boundaries, in one sentence; then what is outside the band; then boundaries."""
    clear, edge = ([each for each in record.coverage if each.boundary == at] for at in (False, True))
    low, high = draw.BAND
    lines = []
    if clear:
        held = [each.held for each in clear]
        inside = sum(low <= value <= high for value in held)
        lines.append(
            f"95% intervals held the truth in {show(min(held))} to {show(max(held))} of resampled suites; {inside} of "
            f"{len(clear)} cases (a quantity of a pair) lie within {low:g} to {high:g}."
        )
    outside = [each for each in clear if not low <= each.held <= high]
    for what, cases in (("Outside that band", outside), ("At a boundary, where no bootstrap need hold", edge)):
        by_pair: dict[str, list[str]] = {}
        for each in cases:
            by_pair.setdefault(each.pair, []).append(f"{each.quantity.replace('_', ' ')} {show(each.held)}")
        if cases:
            lines.append(f"{what}: " + "; ".join(f"{pair} ({', '.join(held)})" for pair, held in by_pair.items()) + ".")
    return lines


def _best(record: ScoreRecord, kind: str) -> str:
    from mixturelens.lab.proving.localise import BROKEN, RANDOM

    of_kind = [each for each in record.methods if each.contrast == kind]
    real = [(x, each) for each in of_kind if each.method not in (*BROKEN, RANDOM) and (x := each.iou.value) is not None]
    if not real:
        return f"{kind}: nothing was measured"
    most, top = max(real, key=lambda row: row[0])
    equal = ", ".join(each.method for value, each in real if value == most)
    by_chance = "".join(f", chance {show(each.iou.value, 2)}" for each in of_kind if each.method == RANDOM)
    return f"{kind}: {equal} ({show_interval(top.iou, 2)}{by_chance})"


def _broken_line(record: ScoreRecord) -> str:
    caught = sum(each.caught for each in record.broken)
    each = ", ".join(f"{b.name} {show(b.sound, 2)} → {show(b.broken, 2)}" for b in record.broken)
    return f"Of {len(record.broken)} instruments broken on purpose {caught} were caught ({each})."


# --- pictures and tables ----------------------------------------------------------------------------------------------


def _verdict(instrument: str, record: ScoreRecord, pictures: Pictures) -> tuple[str, list[str], list[Picture]]:
    halves = [each for each in record.verdicts if each.instrument == instrument]
    caption = f"{_NAMES[instrument]}: counts of pairs; colours are shares of a row; dashes: no such pair."
    figure = pictures.add(draw.confusion(halves), caption, read=_CONFUSION, whiskers=False)
    return _NAMES[instrument], [_sentence(each) for each in halves], [figure]


def _shares_caption(record: ScoreRecord) -> str:
    untold = sum(map(draw.untold, record.pairs))
    return (
        "A point a pair. Filled: held-out half; open: open half; ringed: a wrong verdict. Dashed: thresholds; shaded: "
        f"near misses. Without the {untold} pairs whose policies announce nothing: no completion tells their terms. "
        "Left, without pairs in which nothing changed: there is no share of nothing. "
        f"Elsewhere, less than {draw.LEAST:g} stands there. Text is no part of the verdict."
    )


def _halves(record: ScoreRecord) -> list[str]:
    return list(dict.fromkeys(each.half for each in record.numbers))


def _numbers(record: ScoreRecord) -> list[tuple[Cell, ...]]:
    found = {(each.quantity, each.half): each for each in record.numbers}
    return [
        (
            quantity,
            *(
                f"{show_interval(each.held, 2)} of {each.pairs}" if (each := found.get((quantity, half))) else DASH
                for half in _halves(record)
            ),
        )
        for quantity in dict.fromkeys(quantity for quantity, _ in found)
    ]


def _parts(record: ScoreRecord) -> list[tuple[Cell, ...]]:
    return [
        (
            each.part.replace("_", " "),
            each.half,
            str(each.pairs),
            str(each.right),
            str(each.pairs - each.right - each.unsaid),
            str(each.unsaid),
        )
        for each in record.parts
        if each.pairs
    ]


def _coverage(record: ScoreRecord, pictures: Pictures) -> Picture:
    return pictures.add(
        draw.coverage(record.coverage),
        f"Share of resampled suites whose interval holds the truth. Shaded: {draw.BAND[0]:g} to {draw.BAND[1]:g}. "
        "Whiskers: 95% binomial, of so many suites (Wilson). Open diamonds: the truth lies at a boundary. Red: left of "
        "the axis; the number is bold where the truth is at no boundary.",
        read="intervals do what they promise where points lie in the shaded band.",
        whiskers=False,
    )


def _methods(record: ScoreRecord, pictures: Pictures) -> Picture:
    return pictures.add(
        draw.methods(record.methods),
        "Means over organisms that did not choose the cut; seconds are those of one organism, all nodes. Dashed: "
        "random scores. Open: broken on purpose. Whiskers: 95% bootstrap over organisms.",
        read="the farther right a method, the better it finds what was planted.",
        whiskers=False,
    )


def _method_rows(record: ScoreRecord) -> list[tuple[Cell, ...]]:
    return [
        (
            each.method,
            each.contrast,
            *(number(draw.metric(each, name), 2) for name in draw.METRICS),
            (show(each.cut), ""),
            (str(each.organisms), ""),
        )
        for each in record.methods
    ]


def _proof(planted: Planted, proof: Proof) -> tuple[Cell, ...]:
    def cell(values: Iterable[float], digits: int = 3) -> Cell:
        return ", ".join(show(value, digits) for value in values), ""

    places = f"cue {' + '.join(planted.reader)}; hint {' + '.join(planted.selector)}; change {planted.changed}"
    return (
        planted.name,
        places,
        (", ".join(f"{value:.0e}" if value else "0" for value in proof.inert.values()), ""),
        cell(proof.carried.values()),
        cell([proof.accuracy]),
        cell(proof.alone),
        cell([proof.blind], 6),
        cell(proof.grafted, 2),
    )


def _mistakes(record: ScoreRecord) -> list[tuple[Cell, ...]]:
    near = {each.pair for each in record.pairs if each.near}
    return [
        (
            m.pair,
            f"{m.instrument}, {m.half}" + (", near miss" if m.pair in near else ""),
            f"{m.truth} → {m.verdict}",
            _beside(m.true_share, m.share, 3),
            _beside(m.true_moved, m.moved, 4),
            m.reason,
        )
        for m in sorted(record.mistakes, key=lambda m: (m.instrument, m.half))
    ]


def _beside(true: float | None, measured: Interval, digits: int) -> tuple[str, str]:
    value, spread = number(measured, digits)
    return f"{show(true, digits)} → {value}", spread


# --- for the docs -----------------------------------------------------------------------------------------------------


def score_markdown(record: ScoreRecord) -> str:
    """Tables of docs/validation.md: both confusion matrices on the held-out half, methods, and a line for the rest."""
    blocks = []
    for sums in (each for each in record.verdicts if each.half == "held-out"):
        blocks.append(_sentence(sums))
        rows = [(truth, *_counts(sums, truth)) for truth in draw.WORDS if truth in sums.confusion]
        if rows:
            blocks.append(_markdown(("true, by verdict", *draw.WORDS), rows))
    if record.methods:
        rows = [
            (m.method, m.contrast, *(show_interval(draw.metric(m, name), 2) for name in draw.METRICS))
            for m in record.methods
        ]
        blocks.append(_markdown(("method", "looks for", *draw.METRICS.values()), rows))
    blocks += _coverage_lines(record)[:1]
    if record.broken:
        blocks.append(_broken_line(record))
    if left := missing(record):
        blocks.append(f"Not scored yet: {'; '.join(left)}.")
    return "\n\n".join(blocks) + "\n"


def _counts(sums: Verdicts, truth: str) -> list[str]:
    return [str(sums.confusion[truth].get(said, 0)) for said in draw.WORDS]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
