"""The routing circuit as a drawing of its own: what each node writes and who reads it, S beside R, in plain SVG.

The drawing is whole without a script: that of a page shows more or fewer of its edges, and says what is behind them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixturelens.figures.style import GREY, INK, NEGATIVE, POSITIVE, apart
from mixturelens.figures.words import DASH, SIDES, show_interval
from mixturelens.routing.circuit import CARRIES, CircuitEdge, CircuitNode, RoutingCircuit
from mixturelens.types import Interval

EDGES = 40
"""Edges shown a side at first: the strongest of either, on both."""
CHANGED = 0.05
"""Share of the metric by which an edge or a node must differ between S and R to be marked, with intervals that do not
meet."""
HALO = "#F0E442"
_SLOT, _IDLE, _GAP = 28, 17, 46
"""Pixels that a node, a token at which nothing happens, and the space between the two sides take across."""
_LEFT, _TOP = 78, 62
_WIDEST = 1500
"""Pixels from which S stands above R."""
_RUN = 4
"""Tokens in a row at which nothing happens, from which they share one place."""
_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_Key = tuple[str, str, int]


class _Place(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True)
class CircuitDrawing:
    """S and R on one kind of contrast."""

    circuits: tuple[RoutingCircuit, ...]
    edges: tuple[dict[_Key, CircuitEdge], ...]
    """Of each side: all that either side holds."""
    ranks: dict[_Key, int]
    """1 for the strongest edge of either side, and so on."""

    @property
    def most(self) -> int:
        """Edges of a side, at most."""
        return max(self.ranks.values(), default=1)

    @property
    def height(self) -> int:
        """Pixels of the whole drawing."""
        return round(_Canvas(self, None).height)

    def svg(self, size: int | None = None) -> str:
        """The drawing as it stands alone, with the strongest `size` edges of either side; all parts without."""
        return _Canvas(self, size).whole()


def circuit(circuits: Sequence[RoutingCircuit]) -> CircuitDrawing:
    """The circuits of S and R on one kind of contrast: layers upward, positions across, the same places on both sides.

    The width of an edge grows with its |score|, a share of the contrast; what differs between S and R stands on yellow.
    """
    every = [{_key(edge): edge for edge in of.edges if edge.score.measured} for of in circuits]
    ranks: dict[_Key, int] = {}
    for edges in every:
        for rank, key in enumerate(sorted(edges, key=lambda key: -abs(edges[key].score.known)), start=1):
            ranks[key] = min(rank, ranks.get(key, rank))
    return CircuitDrawing(tuple(circuits), tuple(every), ranks)


# --- names ------------------------------------------------------------------------------------------------------------


def _key(edge: CircuitEdge) -> _Key:
    return edge.sender, edge.receiver, edge.position


def node_of(receiver: str) -> str:
    """The node that a reader belongs to: `L1.h2` of `L1.h2.q`."""
    return receiver.rsplit(".", 1)[0] if receiver.count(".") == 2 else receiver


def words_of(of: RoutingCircuit) -> tuple[str, ...]:
    """A word for each position; its number, where prompts differ in length and a position is no one word."""
    return of.labels or tuple(str(each) for each in range(1 + max((edge.position for edge in of.edges), default=0)))


def readers_of(node: str, names: Iterable[str]) -> list[str]:
    """The head itself, or the heads that share these keys and values."""
    layer, unit = node.split(".")
    if not unit.startswith("kv"):
        return [node]
    known = set(names)
    heads, shared = (sum(name.startswith(f"{layer}.{kind}") for name in known) for kind in ("h", "kv"))
    each = max(heads // max(shared, 1), 1)
    return [f"{layer}.h{head}" for head in range(int(unit[2:]) * each, (int(unit[2:]) + 1) * each)]


def _is_head(name: str) -> bool:
    return name not in ("input", "logits") and not name.endswith(".mlp")


def _layer(name: str) -> int:
    return int(name[1:].split(".")[0])


def _unit(name: str) -> tuple[str, int]:
    """What sorts heads (and the keys and values that several share: `kv0`) by number."""
    unit = name.split(".")[1]
    return unit.rstrip("0123456789"), int(unit.lstrip("hkv"))


def changed(here: Interval, there: Interval | None) -> bool:
    """What the other side does not list is weaker there than all that it lists."""
    if here.value is None:
        return False
    if there is None or there.value is None:
        return abs(here.value) >= CHANGED
    return abs(here.value - there.value) >= CHANGED and apart(here, there)


# --- where things stand -----------------------------------------------------------------------------------------------


class _Layout:
    """Where nodes go, on both sides alike. A position is a column: heads in places of their own, then one for the
    stream (input, MLPs, logits). Layers and runs of tokens at which nothing happens take next to no room.
    """

    def __init__(self, keys: Iterable[_Key], layers: int, positions: int) -> None:
        ends = {(name, at) for sender, receiver, at in keys for name in (sender, node_of(receiver))}
        self.top = 2 * layers + 1
        at_row: dict[tuple[int, int], set[str]] = {}
        for name, at in ends:
            if _is_head(name):
                at_row.setdefault((at, _layer(name)), set()).add(name)
        self.heads = {key: sorted(names, key=_unit) for key, names in at_row.items()}
        rows = sorted({0, self.top, *(self._row(name) for name, _ in ends)})
        step = max(27, min(46, 900 // max(len(rows), 1)))
        self.height = step * (len(rows) - 1)
        self.up = {row: self.height - step * i for i, row in enumerate(rows)}
        busy = {at for _, at in ends}
        self.columns: list[tuple[float, float, str, int | None]] = []
        """(left, right, word or number of tokens, position) of each column."""
        self.stream: dict[int, float] = {}
        x, at = 0.0, 0
        while at < positions:
            run = next((n for n in range(at, positions) if n in busy), positions) - at
            if run >= _RUN:
                self.columns.append((x, x + _SLOT, f"{run} tokens", None))
                x, at = x + _SLOT, at + run
                continue
            most = max((len(names) for (p, _), names in self.heads.items() if p == at), default=0)
            wide = (most + 1.6) * _SLOT if at in busy else _IDLE
            self.stream[at] = x + most * _SLOT + _SLOT / 2
            self.columns.append((x, x + wide, "", at))
            x, at = x + wide, at + 1
        self.width = max(x, 1.0)

    def _row(self, name: str) -> int:
        if name in ("input", "logits"):
            return 0 if name == "input" else self.top
        return (1 if _is_head(name) else 2) + 2 * _layer(name)

    def place(self, name: str, position: int) -> _Place:
        """Where a node stands: heads beside each other, next to the stream."""
        y = self.up[self._row(name)]
        if not _is_head(name):
            return _Place(self.stream[position], y)
        row = self.heads[position, _layer(name)]
        return _Place(self.stream[position] - (len(row) - row.index(name)) * _SLOT, y)


def _row_name(row: int, top: int) -> str:
    if row in (0, top):
        return "logits" if row else "input"
    return f"heads {row // 2}" if row % 2 else f"MLP {row // 2 - 1}"


def _curve(start: _Place, end: _Place, arc: float = 0.0) -> str:
    """A cubic of Bezier's; edges of the stream that pass by others of its nodes bend around them."""
    rise = start.y - end.y
    bend = min(0.2 * rise, 30.0) if abs(end.x - start.x) < 8 and rise > 60 else 0.0
    ends = (start.x + bend, start.y - 0.45 * rise - arc, end.x + bend, end.y + 0.45 * rise - arc, end.x, end.y)
    return f"M{start.x:.0f} {start.y:.0f}C" + " ".join(f"{value:.0f}" for value in ends)


def _wide(score: float) -> float:
    """Pixels of an edge: its square root, so that weak ones can be seen beside strong ones."""
    return max(0.8, min(11.0, 12 * abs(score) ** 0.5))


# --- drawing ----------------------------------------------------------------------------------------------------------


class _Canvas:
    """The parts of a drawing, and whether each is shown."""

    def __init__(self, drawing: CircuitDrawing, size: int | None) -> None:
        self.drawing, self.size, circuits = drawing, size, drawing.circuits
        shown = [key for key, rank in drawing.ranks.items() if size is None or rank <= size]
        self.words = max((words_of(of) for of in circuits), key=len, default=())
        layers = max((node.layer for of in circuits for node in of.nodes if node.name == "logits"), default=1)
        self.layout = _Layout(shown, layers, max(len(self.words), 1))
        self.keys = sorted(shown, key=lambda key: -drawing.ranks[key])  # the strongest last: on top
        self.below = 24 + min(130, 7 * max((len(_short(word)) for word in self.words), default=1))
        self.beside = 2 * self.layout.width + _GAP + _LEFT <= _WIDEST

        self.each = self.layout.height + _TOP + self.below
        sides = len(circuits)
        self.width = _LEFT + (sides if self.beside else 1) * (self.layout.width + _GAP)
        self.legend = self._legend(self.width - _LEFT)
        self.height = (self.each if self.beside else self.each * sides) + 12 + 20 * len(self.legend)

    def whole(self) -> str:
        wide, each, legend, width, height = self.layout.width, self.each, self.legend, self.width, self.height
        parts = []
        for i, of in enumerate(self.drawing.circuits):
            x, y = (_LEFT + i * (wide + _GAP), _TOP) if self.beside else (_LEFT, _TOP + i * each)
            parts.append(
                f'<g data-side="{of.checkpoint}" transform="translate({x:.0f},{y:.0f})">{self._side(i, of)}</g>'
            )
        for line, entries in enumerate(reversed(legend)):
            parts.append(f'<g transform="translate({_LEFT},{height - 12 - 20 * line:.0f})">{entries}</g>')
        names = " and ".join(SIDES[of.checkpoint] for of in self.drawing.circuits)
        said = _text(f"Circuit of the {self.drawing.circuits[0].kind}, {names}") if names else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="group" aria-label="{said}" '
            f'font-family="{_FONT}" font-size="12" fill="{INK}">'
            f'<rect class="ground" width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
        )

    def _side(self, i: int, of: RoutingCircuit) -> str:
        edges = self.drawing.edges[i]
        other = self.drawing.edges[1 - i] if len(self.drawing.edges) == 2 else None
        drawn = [key for key in self.keys if key in edges]
        first = i == 0 or not self.beside
        return "".join(
            [
                self._title(of),
                self._axes(first),
                *self._attention(of, drawn),
                *(self._edge(of, edges[key], None if other is None else (other.get(key),)) for key in drawn),
                *self._nodes(i, of, drawn),
            ]
        )

    def _title(self, of: RoutingCircuit) -> str:
        said = f"the strongest of {of.edges_total:,} edges; {of.method}; {of.questions} questions"
        return (
            f'<text y="-40" font-weight="600" font-size="14">{_text(SIDES[of.checkpoint])}: {_text(of.kind)} '
            f"{_text(_short(of.clean))} against {_text(_short(of.corrupt))}</text>"
            f'<text class="soft" y="-22" fill="#5a616e">{_text(said)}</text>'
        )

    def _axes(self, first: bool) -> str:
        high, parts = self.layout.height, []
        for n, (left, right, text, at) in enumerate(self.layout.columns):
            if n % 2 == 0:
                parts.append(
                    f'<rect class="band" x="{left:.0f}" y="-14" width="{right - left:.0f}" height="{high + 28:.0f}" '
                    'fill="#F1F4F7"/>'
                )
            middle, word = (left + right) / 2, text if at is None else _short(self.words[at])
            look = ' class="soft" fill="#5a616e" font-style="italic"' if at is None else ' class="word"'
            parts.append(
                f'<text{look} transform="translate({middle + 4:.0f},{high + 22:.0f}) rotate(-90)" text-anchor="end">'
                f"{_text(word)}</text>"
            )
        rows = sorted(self.layout.up)
        for last, row in zip([None, *rows], rows, strict=False):
            y = self.layout.up[row]
            if first:
                name = _row_name(row, self.layout.top)
                parts.append(f'<text class="row" x="-24" y="{y + 4:.0f}" text-anchor="end">{name}</text>')
            if first and last is not None and row - last > 1:
                parts.append(f'<text class="soft" x="-24" y="{y + 17:.0f}" text-anchor="end" fill="#5a616e">⋮</text>')
        return "".join(parts)

    def _attention(self, of: RoutingCircuit, drawn: Sequence[_Key]) -> list[str]:
        """From where a head's keys and values come in to where its output leaves: what attention moves."""
        leaves: dict[str, dict[int, int]] = {}
        arrives: dict[str, dict[int, int]] = {}
        for key in drawn:
            sender, receiver, at = key
            rank = self.drawing.ranks[key]
            _least(leaves.setdefault(sender, {}), at, rank)
            if receiver.endswith((".k", ".v")):
                _least(arrives.setdefault(node_of(receiver), {}), at, rank)
        names = [node.name for node in of.nodes]
        return [
            f'<path class="moves" data-rank="{max(early, late)}" data-from="{node}@{start}" data-to="{head}@{end}" '
            f'd="{_curve(*ends, arc=22.0 + 5 * (_unit(head)[1] % 4))}" fill="none" stroke="#777" '
            'stroke-dasharray="4 3"/>'
            for node, froms in arrives.items()
            for head in readers_of(node, names)
            for start, early in sorted(froms.items())
            for end, late in sorted(leaves.get(head, {}).items())
            if end != start
            for ends in [(self.layout.place(node, start), self.layout.place(head, end))]
        ]

    def _edge(self, of: RoutingCircuit, edge: CircuitEdge, other: tuple[CircuitEdge | None] | None) -> str:
        score, rank = edge.score.known, self.drawing.ranks[_key(edge)]
        start, end = (self.layout.place(name, edge.position) for name in (edge.sender, node_of(edge.receiver)))
        # queries, keys and values come in side by side
        end = _Place(end.x + {".q": -6, ".v": 6}.get(edge.receiver[-2:], 0), end.y)
        idle = [
            node.name for node in of.nodes if node.used is False and node.name in (edge.sender, node_of(edge.receiver))
        ]
        unsure = not edge.score.excludes(0.0)
        said = [
            f"{edge.sender} → {edge.receiver} at {_short(self.words[edge.position], 40)}",
            f"score {show_interval(edge.score)}",
        ]
        marked = False
        if other is not None:
            there = None if other[0] is None else other[0].score
            said.append(f"other side {DASH if there is None else show_interval(there)}")
            marked = changed(edge.score, there) and not idle
        said += [f"slope alone: patching {name} moves under {CARRIES:g}" for name in idle]
        said += ["the interval holds 0"] if unsure else []
        path, wide = _curve(start, end), _wide(score)
        look = ' stroke-dasharray="2 3"' if idle else ""
        halo = f'<path class="halo" d="{path}" stroke="{HALO}" stroke-width="{wide + 7:.1f}"/>' if marked else ""
        return (
            f'<g class="edge {"for" if score >= 0 else "against"}" data-rank="{rank}" fill="none" '
            f'data-from="{edge.sender}@{edge.position}" data-to="{node_of(edge.receiver)}@{edge.position}">'
            f'<title>{_text(chr(10).join(said))}</title>{halo}<path class="line" d="{path}" '
            f'stroke="{POSITIVE if score >= 0 else NEGATIVE}" stroke-width="{wide:.1f}"{look}'
            f' stroke-opacity="{0.45 if idle or unsure else 1}"/></g>'
        )

    def _nodes(self, i: int, of: RoutingCircuit, drawn: Sequence[_Key]) -> list[str]:
        """Heads as circles, MLPs and the ends of the stream as squares; grey where exact patching moves nothing."""
        known = {node.name: node for node in of.nodes}
        both = len(self.drawing.circuits) == 2
        there = {node.name: node for node in self.drawing.circuits[1 - i].nodes} if both else {}
        ranks: dict[tuple[str, int], int] = {}
        for key in drawn:
            for name in (key[0], node_of(key[1])):
                _least(ranks, (name, key[2]), self.drawing.ranks[key])
        return [
            self._node(known.get(name), there.get(name), (name, at, rank)) for (name, at), rank in sorted(ranks.items())
        ]

    def _node(self, node: CircuitNode | None, there: CircuitNode | None, where: tuple[str, int, int]) -> str:
        name, at, rank = where
        x, y = self.layout.place(name, at)
        ink = GREY if node is not None and node.used is False else INK
        said = f"{name} at {_short(self.words[at], 40)}"
        marked = node is not None and there is not None and changed(node.score, there.score)
        if node is not None:
            said += f": {show_interval(node.score)} through it, patched {show_interval(node.patched)}"
        halo = '<circle class="halo" r="15" fill="none" stroke="#F0E442" stroke-width="6"/>' if marked else ""
        look = f'class="body" fill="#fff" stroke="{ink}" stroke-width="1.3"'
        body = (
            f'<circle r="11" {look}/>' if _is_head(name) else f'<rect x="-11" y="-11" width="22" height="22" {look}/>'
        )
        text = name.split(".")[1] if _is_head(name) else {"input": "in", "logits": "out"}.get(name, "M")
        return (
            f'<g class="node{" idle" if ink == GREY else ""}" data-rank="{rank}" data-node="{name}@{at}" role="button" '
            f'tabindex="-1" aria-label="{_text(said)}" transform="translate({x:.0f},{y:.0f})">{halo}{body}'
            f'<text y="4" text-anchor="middle" font-size="{9 if len(text) > 2 else 11}" fill="{ink}">{text}</text></g>'
        )

    def _legend(self, width: float) -> list[str]:
        """Lines of entries, none wider than the drawing."""
        both = len(self.drawing.circuits) == 2
        idle = any(node.used is False for of in self.drawing.circuits for node in of.nodes)
        entries = [("for", "carries the contrast", f'stroke="{POSITIVE}" stroke-width="4"')]
        entries.append(("against", "works against it", f'stroke="{NEGATIVE}" stroke-width="4"'))
        entries += [("halo", "differs between S and R", f'stroke="{HALO}" stroke-width="10"')] if both else []
        entries.append(("moves", "attention", 'stroke="#777" stroke-dasharray="4 3"'))
        look = f'stroke="{POSITIVE}" stroke-width="3" stroke-dasharray="2 3" opacity=".45"'
        entries += [("for", "slope alone: patching moves nothing", look)] if idle else []
        entries += [
            ("ink", f"score {value:g}", f'stroke="{INK}" stroke-width="{_wide(value):.1f}"')
            for value in (0.03, 0.1, 0.3)
        ]
        lines, x = [""], 0
        for name, text, look in entries:
            if x and x + 34 + 6.3 * len(text) > width:
                lines, x = [*lines, ""], 0
            path = f'<path class="{"halo" if name == "halo" else "line"}" d="M{x} -4h26" {look} fill="none"/>'
            lines[-1] += f'<g class="edge {name}">{path}</g><text x="{x + 32}">{text}</text>'
            x += 50 + round(6.3 * len(text))
        return lines


def _least(found: dict[Any, int], key: object, rank: int) -> None:
    found[key] = min(rank, found.get(key, rank))


def _short(text: str, limit: int = 18) -> str:
    text = " ".join(text.replace("\n", "⏎").split()) or "␣"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def behind(circuits: Sequence[RoutingCircuit]) -> dict[str, dict[str, Any]]:
    """What is behind each node of each side, for a script to show: numbers, edges, and where a head looks."""
    return {of.checkpoint: _behind(of) for of in circuits}


def _behind(of: RoutingCircuit) -> dict[str, Any]:
    looks = {f"{look.head}@{look.position}": [look.clean, look.corrupt] for look in of.looks}
    nodes = {
        node.name: [show_interval(node.score), show_interval(node.patched), show_interval(node.needed)]
        for node in of.nodes
    }
    return {"name": SIDES[of.checkpoint], "clean": of.clean, "corrupt": of.corrupt, "nodes": nodes, "looks": looks}
