"""The circuit's drawing says what the record says: edges by weight and sign, what changed, what is not borne out."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from test_figure_patching import make_circuit, make_circuits, make_verified
from test_figures import HOSTILE, around

from mixturelens.figures import circuit
from mixturelens.figures.circuits import behind, readers_of
from mixturelens.figures.style import NEGATIVE, POSITIVE
from mixturelens.routing.circuit import CircuitEdge, CircuitNode, RoutingCircuit
from mixturelens.routing.looks import Look

SVG = "{http://www.w3.org/2000/svg}"


class Drawn:
    """An SVG, read back."""

    def __init__(self, text: str) -> None:
        self.root = ElementTree.fromstring(text)

    def sides(self) -> list[ElementTree.Element]:
        return [each for each in self.root.iter(f"{SVG}g") if "data-side" in each.attrib]

    def parts(self, name: str, side: int = 0) -> list[ElementTree.Element]:
        return [each for each in self.sides()[side].iter() if name in each.get("class", "").split()]

    def edges(self, side: int = 0) -> dict[str, ElementTree.Element]:
        """What each says first -> the edge."""
        return {(each.findtext(f"{SVG}title") or "").split("\n")[0]: each for each in self.parts("edge", side)}

    def line(self, said: str, side: int = 0) -> ElementTree.Element:
        return next(each for each in self.edges(side)[said] if each.get("class") == "line")


READS, HANDS, ENDS = "input → L0.h1.k at <A>", "L0.h1 → L0.mlp at ␣", "L0.mlp → logits at ␣"


def test_edges_are_wide_by_weight_and_coloured_by_sign():
    drawn = Drawn(circuit(make_circuits()[:2]).svg())
    assert set(drawn.edges(1)) == {READS, HANDS, ENDS}
    widths = [float(drawn.line(said, 1).get("stroke-width", 0)) for said in (READS, HANDS, ENDS)]
    assert widths == [pytest.approx(12 * score**0.5, abs=0.05) for score in (0.6, 0.4, 0.06)]
    assert [drawn.line(said).get("stroke") for said in (READS, HANDS, ENDS)] == [POSITIVE, POSITIVE, NEGATIVE]
    said = drawn.edges()[HANDS].findtext(f"{SVG}title")
    assert said == f"{HANDS}\nscore 0.200 [0.190, 0.210]\nother side 0.400 [0.390, 0.410]"


def test_what_changed_stands_on_yellow_on_both_sides():
    drawn = Drawn(circuit(make_circuits()[:2]).svg())
    for side in (0, 1):
        marked = [said for said, edge in drawn.edges(side).items() if any("halo" in e.get("class", "") for e in edge)]
        assert marked == [HANDS], "the only edge whose score moved"


def test_an_interval_that_holds_0_is_faint_and_says_so():
    faint = make_circuit(scores=(0.6, 0.005, -0.05))
    drawn = Drawn(circuit([faint]).svg())
    assert [drawn.line(said).get("stroke-opacity") for said in (READS, HANDS, ENDS)] == ["1", "0.45", "1"]
    assert (drawn.edges()[HANDS].findtext(f"{SVG}title") or "").endswith("the interval holds 0")


@pytest.mark.parametrize("shared", [False, True])
def test_attention_goes_from_where_a_head_reads_to_where_it_writes(shared: bool):
    drawn = Drawn(circuit(make_circuits(shared=shared)[:1]).svg())
    (link,) = drawn.parts("moves")
    reads = "L0.kv0" if shared else "L0.h1"
    assert (link.get("data-from"), link.get("data-to")) == (f"{reads}@0", "L0.h1@2")
    places = {each.get("data-node"): at(each) for each in drawn.parts("node")}
    assert places["input@0"][1] > places["L0.h1@2"][1] > places["L0.mlp@2"][1] > places["logits@2"][1], "layers go up"
    assert places["L0.h1@2"][0] > places[f"{reads}@0"][0], "positions go across"
    assert places["L0.h1@2"][1] == places[f"{reads}@0"][1]


def at(node: ElementTree.Element) -> tuple[int, int]:
    x, y = re.findall(r"-?\d+", node.get("transform", ""))
    return int(x), int(y)


def test_heads_that_share_keys_and_values_are_all_their_readers():
    names = [*(f"L0.h{i}" for i in range(4)), "L0.kv0", "L0.kv1"]
    assert readers_of("L0.kv1", names) == ["L0.h2", "L0.h3"]
    assert readers_of("L0.h3", names) == ["L0.h3"]


def test_edges_that_exact_patching_refutes_are_dotted():
    """Those into a head that moves nothing and out of it."""
    drawn = Drawn(circuit([make_verified()]).svg())
    dotted = {said for said in drawn.edges() if drawn.line(said).get("stroke-dasharray")}
    assert dotted == {READS, HANDS}
    assert "slope alone: patching L0.h1 moves under 0.01" in (drawn.edges()[READS].findtext(f"{SVG}title") or "")
    idle = [each.get("data-node") for each in drawn.parts("node") if "idle" in each.get("class", "")]
    assert idle == ["L0.h1@0", "L0.h1@2"]
    plain = Drawn(circuit([make_circuit()]).svg())
    assert not [said for said in plain.edges() if plain.line(said).get("stroke-dasharray")]


def many(side: str, sign: int, layers: int = 1, positions: int = 100) -> RoutingCircuit:
    """Edges all over a network: each layer's MLP is handed something at another token."""
    edges = [
        CircuitEdge(
            sender="input", receiver=f"L{p % layers}.mlp", position=p, score=around(0.5 + sign * 0.001 * p, 0.0001)
        )
        for p in range(0, positions, 1 if layers == 1 else 7)
    ]
    nodes = ("input", *(f"L{layer}.mlp" for layer in range(layers)), "logits")
    named = tuple(CircuitNode(name=name, layer=i - 1, score=around(0.1)) for i, name in enumerate(nodes))
    labels = tuple(f"word {p}" for p in range(positions))
    return make_circuit(side=side).model_copy(update={"edges": tuple(edges), "labels": labels, "nodes": named})


def test_a_size_keeps_the_strongest_of_either_side_on_both():
    drawing = circuit([many("before", 1), many("after", -1)])
    assert drawing.most == 50, "the strongest of one are the weakest of the other"
    drawn = Drawn(drawing.svg(40))
    assert [len(drawn.edges(side)) for side in (0, 1)] == [80, 80]
    assert {float(each.get("data-rank", 99)) <= 40 for each in drawn.parts("edge")} == {True}


def test_layers_and_tokens_at_which_nothing_happens_take_next_to_no_room():
    """A model of 30 layers and 70 tokens fits a screen, with every token at which something happens."""
    drawing = circuit([many("before", 1, 30, 70), many("after", -1, 30, 70)])
    drawn = Drawn(drawing.svg())
    assert float(drawn.root.get("width", 0)) <= 1500
    assert drawing.height == float(drawn.root.get("height", 0)) < 1400
    texts = [each.text for each in drawn.sides()[0].iter(f"{SVG}text")]
    assert "6 tokens" in texts
    assert {f"word {p}" for p in range(0, 70, 7)} <= set(texts)
    rows = [text for text in texts if (text or "").startswith(("MLP", "heads"))]
    assert len(rows) == len({p % 30 for p in range(0, 70, 7)})


def test_names_are_shown_literally():
    text = circuit(make_circuits(HOSTILE)[:2]).svg()
    assert not re.search(r"</?script|<img|<A>", text)
    assert any(HOSTILE[:10] in (each.text or "") for each in Drawn(text).root.iter())


def test_what_is_behind_a_node_is_what_the_record_says():
    look = Look(head="L0.h1", position=2, clean={0: 0.9}, corrupt={0: 0.2, 1: 0.7})
    of = make_verified().model_copy(update={"looks": (look,)})
    found = behind([of])["before"]
    assert found["looks"] == {"L0.h1@2": [{0: 0.9}, {0: 0.2, 1: 0.7}]}
    assert found["nodes"]["L0.mlp"][1:] == ["0.500 [0.490, 0.510]", "0.900 [0.890, 0.910]"]
    assert found["nodes"]["input"][1] == "–"
