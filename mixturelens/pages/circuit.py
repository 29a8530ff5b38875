"""The circuit, to look at: a drawing with a slider and what is behind each node, for a page, a notebook or a file."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixturelens.figures.circuits import EDGES, CircuitDrawing, behind, circuit, words_of
from mixturelens.figures.words import SIDES
from mixturelens.pages.parts import render
from mixturelens.records import write_bytes, write_text
from mixturelens.routing.attribution_graph import attribution_graph
from mixturelens.types import InputError

if TYPE_CHECKING:
    from mixturelens.contrasts import Kind
    from mixturelens.features.record import FeatureRecord
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.routing.circuit import CircuitRecord, RoutingCircuit
    from mixturelens.types import Side, Site

_PIXELS = 2.0
"""Of a PNG, for each of the drawing's."""
_AROUND = 460
"""Pixels of a notebook's frame for what stands around the drawing."""


@dataclass(frozen=True)
class CircuitView:
    """S beside R on one kind of contrast. A notebook shows it as the page does; `save` writes a file."""

    drawing: CircuitDrawing
    looks: Mapping[str, Mapping[str, object]]
    """Checkpoint -> where heads look that the circuit's own record does not say."""
    features: Sequence[Mapping[str, object]]
    """Node, title, why and anchor of features with a card."""
    models: Mapping[str, str]
    """Checkpoint -> its name, where the record says."""

    def html(self, name: str, size: int = EDGES) -> str:
        """The drawing as an element of a page that holds `circuit.css` and, behind it, `circuit.js`."""
        sides = behind(self.drawing.circuits)
        for side, looks in self.looks.items():
            if side in sides:
                sides[side]["looks"] = {**looks, **sides[side]["looks"]}
        words = max((words_of(of) for of in self.drawing.circuits), key=len, default=())
        data = json.dumps({"words": words, "sides": sides, "features": list(self.features)}, ensure_ascii=False)
        data = data.replace("<", "\\u003c")  # no text of a suite ends the script
        size = min(size, self.drawing.most)
        values = {"name": name, "most": self.drawing.most, "size": size, "svg": self.drawing.svg(), "data": data}
        return render("circuit.html.j2", values)

    def page(self, size: int = EDGES) -> str:
        """A page that holds the drawing alone, and asks no network for anything."""
        return render("circuit_alone.html.j2", {"title": "The routing circuit", "circuit": self.html("circuit", size)})

    def _repr_html_(self) -> str:
        """In a frame of its own, so that neither the notebook's style nor another drawing's script gets in its way."""
        page = html.escape(self.page(), quote=True)
        look = f'width="100%" height="{self.drawing.height + _AROUND}" frameborder="0"'
        return f'<iframe title="The routing circuit" {look} srcdoc="{page}"></iframe>'

    def _repr_svg_(self) -> str:
        """For viewers that show no frames."""
        return self.drawing.svg(EDGES)

    def save(self, path: str | Path, size: int = EDGES, side: Side = "after") -> Path:
        """Write it as .svg, .pdf, .png (with the strongest `size` edges of each side) or .html, by the name's ending;
        as .json, the graph of one side as circuit-tracer and Neuronpedia read it.

        Raises InputError as `check_export` does.
        """
        path = Path(path)
        check_export(path)
        kind = path.suffix.lower()
        if kind == ".svg":
            write_text(path, self.drawing.svg(size) + "\n")
        elif kind == ".html":
            write_text(path, self.page(size))
        elif kind == ".json":
            write_text(path, json.dumps(self.graph(path.stem, side), indent=1, ensure_ascii=False) + "\n")
        else:
            import vl_convert

            drawn = self.drawing.svg(size)
            write_bytes(path, vl_convert.svg_to_pdf(drawn) if kind == ".pdf" else vl_convert.svg_to_png(drawn, _PIXELS))
        return path

    def graph(self, slug: str, side: Side = "after") -> dict[str, object]:
        """One side as circuit-tracer and Neuronpedia read it (`routing.attribution_graph`).

        Raises InputError where there is no such side.
        """
        for of in self.drawing.circuits:
            if of.checkpoint == side:
                return attribution_graph(of, slug, self.models.get(side, SIDES[side]))
        raise InputError(f"there is no circuit of {SIDES[side]}")


def check_export(path: Path) -> None:
    """Raise InputError for a file whose ending is none that a circuit is written as, or that nothing here can write."""
    kind = path.suffix.lower()
    if kind not in (".svg", ".pdf", ".png", ".html", ".json"):
        raise InputError(f"{path}: a circuit is written as .svg, .pdf, .png, .html or .json")
    if kind in (".pdf", ".png") and importlib.util.find_spec("vl_convert") is None:
        raise InputError(f"{path}: vl-convert-python makes it: in a clone, pip install '.[export]'; or ask for .svg")


def circuit_view(
    record: CircuitRecord,
    kind: Kind | None = None,
    *,
    patching: PatchingRecord | None = None,
    features: FeatureRecord | None = None,
    anchors: Sequence[str] = (),
) -> CircuitView:
    """The circuits of S and R on one kind of contrast (the first that the record has), to look at.

    `patching` and `features`, where they were measured, say where reader heads look and which features there are;
    `anchors` are addresses of the features' cards on a page. Raises InputError where there is no such circuit.
    """
    circuits = circuits_of(record, kind)
    cards, made = () if features is None else features.cards, record.provenance
    return CircuitView(
        circuit(circuits),
        {} if patching is None else _looks(patching, circuits[0].clean, circuits[0].corrupt),
        [
            {**node, "title": str(card.unit), "why": card.why, "anchor": anchor}
            for card, anchor in zip(cards, [*anchors, *[""] * len(cards)], strict=False)
            if (node := _node_of(card.unit.site))
        ],
        {side: name for side, name in (("before", made.before), ("after", made.after)) if name is not None},
    )


def circuits_of(record: CircuitRecord, kind: Kind | None = None) -> list[RoutingCircuit]:
    """Those on one kind of contrast: S, then R. Raises InputError where there are none."""
    kinds: list[Kind] = list(dict.fromkeys(of.kind for of in record.circuits))
    if (kind or next(iter(kinds), None)) not in kinds:
        why = "; ".join(record.missing) or "it was not looked for"
        raise InputError(f"there is no circuit{f' of the {kind}' if kind else ''} ({why})")
    return [of for of in record.circuits if of.kind == (kind or kinds[0])]


def _looks(patching: PatchingRecord, clean: str, corrupt: str) -> dict[str, dict[str, object]]:
    """Attention that patching kept: that of the reader heads, from the token at which they write."""
    found: dict[str, dict[str, object]] = {}
    for each in patching.attention:
        if {clean, corrupt} == set(each.under):
            at = len(each.labels) - 1  # the policy's word, the last
            both = [{i: share for i, share in enumerate(each.under[cue]) if share >= 0.01} for cue in (clean, corrupt)]
            found.setdefault(each.checkpoint, {})[f"L{each.head.layer}.h{each.head.head}@{at}"] = both
    return found


def _node_of(site: Site) -> dict[str, object]:
    """The nodes whose output a site is, or that leave behind what it is of the stream: all of them that begin so."""
    layer = site.layer - 1 if site.component == "resid_pre" else site.layer
    heads = site.component in ("z", "attn_out", "resid_mid")
    if layer < 0 or not (heads or site.component in ("mlp_out", "neurons", "resid_pre", "resid_post")):
        return {}
    one = "" if site.head is None else site.head
    at = site.position if isinstance(site.position, int) else None
    return {"node": f"L{layer}.h{one}" if heads else f"L{layer}.mlp", "whole": site.head is not None, "at": at}
