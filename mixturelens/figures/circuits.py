"""The routing circuit as a graph: what each node writes, and who reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.heat import across
from mixturelens.figures.marks import points
from mixturelens.figures.panels import Panel, entry, panels, shade, stacked
from mixturelens.figures.style import GREY, INK, NEGATIVE, POSITIVE, apart
from mixturelens.figures.words import DASH, SIDES, label, number, token, token_axis
from mixturelens.routing.circuit import CARRIES, CircuitEdge, CircuitNode, RoutingCircuit
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

EDGES = 40
"""Edges drawn a side: the strongest, and those that are among the strongest of the other side."""
CHANGED = 0.05
"""Share of the metric by which an edge must differ between S and R to be marked, with intervals that do not meet."""
LEVELS = ((0.3, 8.0), (0.1, 5.0), (0.03, 2.5), (0.0, 1.0))
"""|score| from which an edge is drawn this wide."""
FAINT = 0.45
"""Opacity of edges whose nodes exact patching refutes."""
_HALO = "#F0E442"
_WIDE = 960
_SLOT = 26
"""Pixels that a node needs; with less, S stands above R."""
_Key = tuple[str, str, int]


class _Place(NamedTuple):
    x: float
    y: float


_Path = tuple[list[_Place], str]
"""A line and what it says where one hovers."""


class _Layout:
    """Where nodes go: the same place on both sides, so that these can be compared.

    A position is a column: heads in slots of their own, then one slot for the stream (input, MLPs, logits).
    """

    def __init__(self, edges: Sequence[CircuitEdge], layers: int, positions: int) -> None:
        self.layers = layers
        present: dict[tuple[int, int], set[str]] = {}
        for edge in edges:
            for name in (edge.sender, _node(edge.receiver)):
                if _is_head(name):
                    present.setdefault((edge.position, _layer(name)), set()).add(name)
        self.heads = {key: sorted(names, key=_unit) for key, names in present.items()}
        busy = {edge.position for edge in edges}
        most = [
            max((len(names) for (p, _), names in self.heads.items() if p == position), default=0)
            for position in range(positions)
        ]
        # a column ends in room for the edges of the stream that pass by
        self.slots = [heads + (1.6 if p in busy else 0.7) for p, heads in enumerate(most)]
        self.stream = [sum(self.slots[:p]) + heads for p, heads in enumerate(most)]
        self.starts = [sum(self.slots[:p]) for p in range(positions)]

    @property
    def width(self) -> float:
        return sum(self.slots)

    @property
    def top(self) -> int:
        return 2 * self.layers + 1

    def place(self, name: str, position: int) -> _Place:
        """Where a node stands: heads beside each other, next to the stream."""
        if _is_head(name):
            row = self.heads[position, _layer(name)]
            x = self.stream[position] - len(row) + row.index(name)
            return _Place(x, 1 + 2 * _layer(name))
        y = 0 if name == "input" else self.top if name == "logits" else 2 + 2 * _layer(name)
        return _Place(self.stream[position], y)


def circuit(circuits: Sequence[RoutingCircuit]) -> Figure:
    """The strongest edges of S and R on one kind of contrast: layers up, positions across, what changed on yellow.

    The width of an edge is its |score|, a share of the contrast, in the steps of LEVELS; scores have the record's
    intervals over questions where one hovers.
    """
    shown = _shown(circuits)
    words = [_words(of) for of in circuits]
    positions = max(map(len, words), default=1)
    layers = max((node.layer for of in circuits for node in of.nodes if node.name == "logits"), default=1)
    layout = _Layout([edge for edges in shown for edge in edges.values()], layers, positions)
    beside = _WIDE / max(len(circuits), 1) / max(layout.width, 1) >= _SLOT
    rows, columns = (1, len(circuits)) if beside else (len(circuits), 1)
    narrowest = min(layout.slots, default=1) / max(layout.width, 1)  # where nothing happens there is little room
    labels, axis, below = token_axis(words, narrowest * _WIDE / max(columns, 1))
    inner, spacing = stacked(rows, (46 if layout.top < 12 else 34) * (layout.top + 1), below + 70)
    titles = [_title(of, len(edges)) for of, edges in zip(circuits, shown, strict=True)]
    more = {"horizontal_spacing": 0.02, "vertical_spacing": spacing}
    margin = {"l": 74, "r": 14, "t": 126, "b": below}
    figure = panels((rows, columns), titles, inner + below + 126, margin, **more)
    figure.update_layout(plot_bgcolor="white")
    for i, (of, edges, names) in enumerate(zip(circuits, shown, labels, strict=True)):
        panel = Panel(figure, 1, i + 1) if beside else Panel(figure, i + 1, 1)
        drawing = _Drawing(panel, layout, of, edges)
        _attention(drawing)
        _edges(drawing, shown[1 - i] if len(circuits) == 2 else None)
        _nodes(drawing)
        _axes(panel, layout, names, axis)
    refuted = any(node.used is False for of in circuits for node in of.nodes)
    _legend(figure, changed=len(circuits) == 2, refuted=refuted)
    return figure


class _Drawing(NamedTuple):
    """One side of a circuit and where it is drawn."""

    panel: Panel
    layout: _Layout
    of: RoutingCircuit
    edges: dict[_Key, CircuitEdge]


def _axes(panel: Panel, layout: _Layout, names: Sequence[str], axis: dict[str, Any]) -> None:
    """Words across, parts of the network up, and every other position on a light ground."""
    columns = list(zip(layout.starts, layout.slots, strict=True))
    for start, slots in columns[::2]:  # last: plotly leaves out panels that are still empty
        shade(panel, (start - 0.5, start + slots - 0.5), "#F1F4F7")
    middles = [start + slots / 2 - 0.5 for start, slots in columns]
    across(panel, names, tickvals=middles, range=[-0.6, layout.width - 0.4], zeroline=False, **axis)
    parts = [f"{what} {n}" for n in range(layout.layers) for what in ("heads", "MLP")]
    look: dict[str, Any] = {"tickvals": list(range(layout.top + 1)), "ticktext": ["input", *parts, "logits"]}
    look |= {"tickfont": {"size": 12}, "range": [-0.6, layout.top + 0.6], "showgrid": False, "zeroline": False}
    panel.figure.update_yaxes(**look, showticklabels=panel.first, **panel.at)


def _shown(circuits: Sequence[RoutingCircuit]) -> list[dict[_Key, CircuitEdge]]:
    """The strongest edges of each side, and of each side those that the other shows."""
    every = [{_key(edge): edge for edge in of.edges if edge.score.measured} for of in circuits]
    strongest = [sorted(edges, key=lambda key: -abs(_score(edges[key])))[:EDGES] for edges in every]
    wanted = dict.fromkeys(key for keys in strongest for key in keys)
    return [{key: edges[key] for key in wanted if key in edges} for edges in every]


def _score(edge: CircuitEdge) -> float:
    """Of an edge that was measured: others are not drawn."""
    assert edge.score.value is not None
    return edge.score.value


def _words(of: RoutingCircuit) -> tuple[str, ...]:
    """A word for each position; its number, where prompts differ in length and a position is no one word."""
    return of.labels or tuple(str(each) for each in range(1 + max((edge.position for edge in of.edges), default=0)))


def _key(edge: CircuitEdge) -> _Key:
    return edge.sender, edge.receiver, edge.position


def _node(receiver: str) -> str:
    """The node that a reader belongs to: `L1.h2` of `L1.h2.q`."""
    return receiver.rsplit(".", 1)[0] if receiver.count(".") == 2 else receiver


def _layer(name: str) -> int:
    return int(name[1:].split(".")[0])


def _is_head(name: str) -> bool:
    return name not in ("input", "logits") and not name.endswith(".mlp")


def _unit(name: str) -> tuple[str, int]:
    """What sorts heads (and the keys and values that several share: `kv0`) by number."""
    unit = name.split(".")[1]
    return unit.rstrip("0123456789"), int(unit.lstrip("hkv"))


def _title(of: RoutingCircuit, drawn: int) -> str:
    return (
        f"<b>{SIDES[of.checkpoint]}</b>, {of.kind} {label(of.clean, 14)} against {label(of.corrupt, 14)}<br>"
        f"{drawn} edges, the strongest of {of.edges_total:,} at {len(_words(of))} positions<br>"
        f"{label(of.method, 24)}, {of.questions} questions"
    )


def _attention(drawing: _Drawing) -> None:
    """From where a head's keys and values come in to where its output leaves: what attention moves."""
    layout, names = drawing.layout, {node.name for node in drawing.of.nodes}
    leaves: dict[str, set[int]] = {}
    arrives: dict[str, set[int]] = {}
    for sender, receiver, position in drawing.edges:
        leaves.setdefault(sender, set()).add(position)
        if receiver.endswith((".k", ".v")):
            arrives.setdefault(_node(receiver), set()).add(position)
    paths = [
        _curve(layout.place(node, start), layout.place(head, end), arc=0.2 + 0.08 * _unit(head)[1])
        for node, froms in arrives.items()
        for head in _readers(node, names)
        for start in sorted(froms)
        for end in sorted(leaves.get(head, set()))
        if end != start
    ]
    line = {"color": "#777777", "width": 1, "dash": "dash"}
    _lines(drawing.panel, [(path, "") for path in paths], line, name="attention")


def _readers(node: str, names: set[str]) -> list[str]:
    """The head itself, or the heads that share these keys and values."""
    layer, unit = node.split(".")
    if not unit.startswith("kv"):
        return [node]
    heads, shared = (sum(name.startswith(f"{layer}.{kind}") for name in names) for kind in ("h", "kv"))
    each = max(heads // max(shared, 1), 1)
    return [f"{layer}.h{head}" for head in range(int(unit[2:]) * each, (int(unit[2:]) + 1) * each)]


def _edges(drawing: _Drawing, other: dict[_Key, CircuitEdge] | None) -> None:
    """A trace for every width and sign: plotly has one width a trace. Dotted where exact patching refutes a node."""
    refuted = {node.name: node for node in drawing.of.nodes if node.used is False}
    drawn: dict[tuple[bool, int, str], list[_Path]] = {}
    halos: dict[float, list[_Path]] = {}
    for key, edge in drawing.edges.items():
        score = _score(edge)
        level = next(i for i, (least, _) in enumerate(LEVELS) if abs(score) >= least)
        path = _edge_path(drawing.layout, edge)
        idle = [refuted[name] for name in (edge.sender, _node(edge.receiver)) if name in refuted]
        text = f"{edge.sender} → {edge.receiver} at position {edge.position}<br>score {number(edge.score)}"
        if other is not None:
            there = other[key].score if key in other else None
            text += f"<br>other side {DASH if there is None else number(there)}"
            if _changed(edge.score, there) and not idle:
                halos.setdefault(LEVELS[level][1] + 7, []).append((path, ""))
        text += "".join(
            f"<br>slope alone: patching {node.name} moves under {CARRIES:g}<br>{_exactly(node)}" for node in idle
        )
        drawn.setdefault((not idle, level, POSITIVE if score >= 0 else NEGATIVE), []).append((path, text))
    for width, paths in sorted(halos.items()):
        _lines(drawing.panel, paths, {"color": _HALO, "width": width})
    for (borne_out, level, colour), paths in sorted(drawn.items(), key=lambda item: (item[0][0], -item[0][1])):
        line = {"color": colour, "width": LEVELS[level][1], "dash": "solid" if borne_out else "dot"}
        _lines(drawing.panel, paths, line, opacity=1.0 if borne_out else FAINT)


def _exactly(node: CircuitNode) -> str:
    return f"patched exactly {number(node.patched)}<br>needed {number(node.needed)}"


def _changed(here: Interval, there: Interval | None) -> bool:
    """An edge that the other side does not list is weaker there than all that it lists."""
    if here.value is None:
        return False
    if there is None or there.value is None:
        return abs(here.value) >= CHANGED
    return abs(here.value - there.value) >= CHANGED and apart(here, there)


def _lines(panel: Panel, paths: Sequence[_Path], line: dict[str, Any], **look: Any) -> None:
    """Paths as one trace, with gaps between them."""
    x = [end for path, _ in paths for end in (*(place.x for place in path), None)]
    y = [end for path, _ in paths for end in (*(place.y for place in path), None)]
    texts = [text for path, text in paths for _ in (*path, None)]
    look = {"mode": "lines", "line": line, "showlegend": False, "name": "edges", **look}
    points(panel, x, y, texts if any(texts) else None, **look)


def _edge_path(layout: _Layout, edge: CircuitEdge) -> list[_Place]:
    start, end = (layout.place(name, edge.position) for name in (edge.sender, _node(edge.receiver)))
    # queries, keys and values come in side by side
    end = _Place(end.x + {".q": -0.2, ".v": 0.2}.get(edge.receiver[-2:], 0.0), end.y)
    return _curve(start, end)


def _curve(start: _Place, end: _Place, arc: float = 0.0) -> list[_Place]:
    """A smooth line (a cubic of Bezier's); edges of the stream that pass by others of its nodes bend around them."""
    rise = end.y - start.y
    bend = min(0.22 * rise, 1.1) if abs(end.x - start.x) < 0.3 and rise > 1 else 0.0
    x = (start.x, start.x + bend, end.x + bend, end.x)
    y = (start.y, start.y + 0.45 * rise + arc, end.y - 0.45 * rise + arc, end.y)
    path = []
    for t in (step / 12 for step in range(13)):
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        path.append(_Place(*(sum(w * v for w, v in zip(weights, of, strict=True)) for of in (x, y))))
    return path


def _nodes(drawing: _Drawing) -> None:
    """Heads as circles, MLPs and the ends of the stream as squares; grey where exact patching moves nothing."""
    of, nodes = drawing.of, {node.name: node for node in drawing.of.nodes}
    unknown = CircuitNode(name="", layer=0, score=Interval())  # keys and values that heads share are no node
    both = [((edge.sender, _node(edge.receiver)), edge.position) for edge in drawing.edges.values()]
    at = list(dict.fromkeys((name, position) for names, position in both for name in names))
    places = [drawing.layout.place(name, position) for name, position in at]
    inks = [GREY if nodes.get(name, unknown).used is False else INK for name, _ in at]
    hover = [
        f"{name} at {token(_words(of)[position], 40)} (position {position})<br>"
        f"|score| of all edges through it {number(nodes.get(name, unknown).score)}<br>"
        f"{_exactly(nodes.get(name, unknown))}"
        for name, position in at
    ]
    text = [name.split(".")[1] if _is_head(name) else "M" if name.endswith(".mlp") else "" for name, _ in at]
    marker: dict[str, Any] = {"size": 22, "color": "white", "line": {"color": inks, "width": 1.2}}
    marker["symbol"] = ["circle" if _is_head(name) else "square" for name, _ in at]
    look = {"mode": "markers+text", "text": text, "textfont": {"size": 11, "color": inks}, "marker": marker}
    x, y = [place.x for place in places], [place.y for place in places]
    points(drawing.panel, x, y, hover, showlegend=False, name="nodes", **look)


def _legend(figure: Figure, changed: bool, refuted: bool) -> None:
    for i, (least, width) in enumerate(LEVELS):
        over = f"at least {least:g}" if least else f"under {LEVELS[i - 1][0]:g}"
        entry(figure, f"|score| {over}", line={"color": INK, "width": width})
    entry(figure, "carries the contrast", line={"color": POSITIVE, "width": 4})
    entry(figure, "works against it", line={"color": NEGATIVE, "width": 4})
    if changed:
        entry(figure, "differs between S and R", line={"color": _HALO, "width": 10})
    entry(figure, "attention moves it", line={"color": "#777777", "width": 1, "dash": "dash"})
    if refuted:
        dotted = {"color": GREY, "width": 4, "dash": "dot"}
        entry(figure, f"slope alone: patching moves under {CARRIES:g}", line=dotted)
