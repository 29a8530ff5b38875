"""Figures of the mechanism draw the numbers of patching, circuits and repairs, S beside R."""

from __future__ import annotations

import json
import re

import pytest
from test_figures import HOSTILE, around, drawn, panel, same

from mixturelens import figures
from mixturelens.behaviour.record import TableCell
from mixturelens.patching.record import Attention, Effect, PatchingRecord, ReaderHeads, Sweep
from mixturelens.routing.circuit import (
    CircuitEdge,
    CircuitNode,
    CircuitRecord,
    FaithfulnessCurve,
    Overlap,
    RoutingCircuit,
)
from mixturelens.routing.repair import Random, Repair, RepairRecord
from mixturelens.types import NOT_MEASURED, Interval, Site

LABELS = ("<A>", "up", " ")
HEADS = (Site(layer=0, component="z", head=1, position="policy"),)


def make_sweep(kind="cue", side="before", effects=None, words="", labels=LABELS, **fields) -> Sweep:
    """Two layers of two heads over three positions; head 1 of layer 0 carries half of it from the last position."""
    if effects is None:
        effects = {
            Site(layer=layer, component="resid_pre", position=p): around(0.01 * p) for layer in (0, 1) for p in range(3)
        }
        for layer in (0, 1):
            for head in (0, 1):
                for p in range(3):
                    effects[Site(layer=layer, component="z", head=head, position=p)] = around(0.01 * layer)
                for component in ("q", "k", "v", "pattern"):
                    effects[Site(layer=layer, component=component, head=head)] = around(0.1 * layer + 0.2 * head)
        effects[Site(layer=0, component="z", head=1, position=2)] = around(0.5 if side == "before" else 0.8)
        effects[Site(layer=1, component="z", head=0, position=0)] = Interval(value=0.3, low=-0.1, high=0.7)
        effects[Site(layer=1, component="z", head=1, position=0)] = NOT_MEASURED
    fields = {"direction": "denoise", "policy": f"a{words}" if kind == "cue" else None, "cue": None, **fields}
    return Sweep(
        kind=kind,
        checkpoint=side,
        clean=f"A{words}",
        corrupt=f"B{words}",
        questions=48,
        target="x",
        foil="y",
        base=around(-3),
        goal=around(3),
        labels=tuple(f"{name}{words}" for name in labels),
        effects=tuple(Effect(site=site, effect=effect) for site, effect in effects.items()),
        **fields,
    )


def make_patching(words="", cues=("A", "B")) -> PatchingRecord:
    sides = ("before", "after")
    return PatchingRecord(
        trained_cue=cues[0],
        harmed_cue=cues[-1],
        policy="a",
        sweeps=tuple(make_sweep(kind, side, words=words) for kind in ("cue", "hint") for side in sides),
        readers=tuple(
            ReaderHeads(
                kind="cue",
                checkpoint=side,
                heads=HEADS,
                questions=24,
                chosen_effect=0.9,
                effect=around(0.91),
                margin=around(0.4),
                rival=(Site(layer=1, component="z", head=0, position="policy"),),
                first=True if side == "before" else None,
            )
            for side in sides
        ),
        attention=tuple(
            Attention(
                head=HEADS[0],
                checkpoint=side,
                labels=tuple(f"{name}{words}" for name in LABELS),
                under={cue: (0.1 + 0.2 * i, 0.2, 0.7 - 0.2 * i) for i, cue in enumerate(cues)},
            )
            for side in sides
        ),
    )


def make_repair(words="", cues=("A", "B"), policies=("a", "b"), above=(0.0, 0.5)) -> RepairRecord:
    """Interchange brings the harmed cue back and moves another cell; ablation does half of it."""
    repairs = []
    for kind, reached, share in zip(("interchange", "zero"), (0.9, 0.5), above, strict=True):
        cells = [
            TableCell(
                cue=cue,
                policy=policy,
                announcement="[x]",
                behaviour="answer",
                shown_before={"answer": 1.0},
                shown_after={"answer": 0.5},
                accuracy_before=0.125,
                accuracy_after=0.75,
                behaviour_change=around(change),
                accuracy_change=around(0.0),
            )
            for policy, cue, change in (
                (policies[0], cues[-1], -0.9),
                (policies[1], cues[0], -0.4 if kind == "interchange" else 0.001),
                (policies[1], cues[-1], 0.0),
            )
        ]
        repairs.append(
            Repair(
                kind=kind,
                what=(f"L0.z.1@policy <- that of cue A{words}",),
                accuracy={cues[0]: around(0.95), cues[-1]: around(reached)},
                gap_closed=around(reached - 0.01),
                trained_change=around(-0.03),
                cells=tuple(cells),
                random=Random(
                    places=tuple(f"L1.z.{i}@policy{words}" for i in range(4)),
                    harmed=(0.0, 0.01, 0.02, 0.6),
                    trained=(0.9,) * 4,
                    median=0.015,
                    above=share,
                    p=None if share is None else (4 * share + 1) / 5,
                ),
            )
        )
    return RepairRecord(
        trained_cue=cues[0],
        harmed_cue=cues[-1],
        policy=policies[0],
        heads=HEADS,
        questions=24,
        policies=policies,
        cues=cues,
        before={cue: around(0.5) for cue in cues},
        after={cues[0]: around(0.97), cues[-1]: around(0.02)},
        ceiling=around(0.98),
        repairs=tuple(repairs),
        checkpoint=f"rl-A-repaired{words}",
    )


def make_circuit(kind="cue", side="before", words="", shared=False, scores=(0.6, 0.2, -0.05)) -> RoutingCircuit:
    """The cue is read at position 0 by head 1, which hands it to the MLP at position 2, and that to the logits."""
    keys = "L0.kv0" if shared else "L0.h1"
    ends = (("input", f"{keys}.k", 0), ("L0.h1", "L0.mlp", 2), ("L0.mlp", "logits", 2))
    names = ["input", *(f"L0.h{i}" for i in range(2)), *(["L0.kv0"] if shared else []), "L0.mlp", "logits"]
    layers = {"input": -1, "logits": 1}
    return RoutingCircuit(
        kind=kind,
        checkpoint=side,
        clean=f"A{words}",
        corrupt=f"B{words}",
        questions=48,
        method="EAP-IG",
        labels=tuple(f"{name}{words}" for name in LABELS),
        edges_total=14,
        nodes=tuple(CircuitNode(name=n, layer=layers.get(n, 0), score=around(0.1 * i)) for i, n in enumerate(names)),
        edges=tuple(
            CircuitEdge(sender=sender, receiver=receiver, position=p, score=around(score))
            for (sender, receiver, p), score in zip(ends, scores, strict=True)
        ),
        faithfulness=FaithfulnessCurve(
            sizes=(0, 1, 7, 14),
            fractions=(0.0, 1 / 14, 0.5, 1.0),
            found=tuple(around(value) for value in (0.0, 0.3, 0.9, 1.0)),
            random=tuple(around(value) for value in (0.0, 0.01, 0.1, 1.0)),
            cpr=around(0.81),
            cmd=around(0.19),
            random_cpr=around(0.32),
            random_cmd=around(0.68),
        ),
    )


def make_circuits(words="", shared=False) -> tuple[RoutingCircuit, ...]:
    changed = {"before": (0.6, 0.2, -0.05), "after": (0.6, 0.4, -0.06)}
    return tuple(
        make_circuit(kind, side, words, shared, scores) for kind in ("cue", "hint") for side, scores in changed.items()
    )


def make_verified() -> RoutingCircuit:
    """Patched exactly: head 1 moves nothing, and the MLP half of the contrast."""
    found = {"L0.h1": (around(0.001, 0.001), around(0.0, 0.001)), "L0.mlp": (around(0.5), around(0.9))}
    circuit = make_circuit()
    nodes = (
        node.model_copy(update=dict(zip(("patched", "needed"), found.get(node.name, ()), strict=False)))
        for node in circuit.nodes
    )
    return circuit.model_copy(update={"nodes": tuple(nodes)})


def make_circuit_record(words="") -> CircuitRecord:
    alike = Overlap(kind="cue", left="before", right=f"rl-{words}B", size=20, jaccard=around(0.74), chance=0.04)
    return CircuitRecord(circuits=make_circuits(words), overlaps=(alike,))


def outlines(figure) -> set[tuple[int, int, str]]:
    return {(round(s.x0 + 0.47), round(s.y0 + 0.46), s.xref) for s in figure.layout.shapes if s.type == "rect"}


def test_map_has_positions_across_and_layers_up():
    sweep = make_sweep()
    figure = figures.patching_map(sweep, "z")
    (heat,) = figure.data
    effects = {
        (e.site.layer, e.site.head, e.site.position): e.effect.value for e in sweep.effects if e.site.component == "z"
    }
    for y, (layer, head) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert list(heat.z[y]) == [effects[layer, head, p] for p in range(3)]
    assert list(figure.layout.yaxis.ticktext) == ["L0 head 0", "L0 head 1", "L1 head 0", "L1 head 1"]
    low, high = figure.layout.yaxis.range
    assert low < high, "layers go up"
    assert list(figure.layout.xaxis.ticktext) == ["&lt;A&gt;", "up", "␣"]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1, 1)
    assert figure.layout.coloraxis.colorbar.title.text == "share of the contrast"
    # surely there; not surely there; too small; not measured
    assert [heat.text[1][2], heat.text[2][0], heat.text[0][1], heat.text[3][0]] == ["0.50", "", "", figures.DASH]
    assert heat.hovertext[1][2] == "L0.z.1@2 (␣)<br>effect 0.500 [0.490, 0.510]"


def test_map_of_named_spans():
    spans = {Site(layer=0, component="attn_out", position=name): around(0.2) for name in ("cue", "question", "last")}
    figure = figures.patching_map(make_sweep(effects=spans, labels=()), "attn_out")
    assert list(figure.layout.xaxis.ticktext) == ["cue", "question", "last"]
    assert list(figure.layout.yaxis.ticktext) == ["layer 0"]


def test_maps_put_s_beside_r_and_outline_what_differs():
    record = make_patching()
    figure = figures.patching_maps(record, "cue", "z")
    before, after = (panel(figure, 1, column)[0] for column in (1, 2))
    assert (before.z[1][2], after.z[1][2]) == (0.5, 0.8)
    assert outlines(figure) == {(2, 1, "x"), (2, 1, "x2")}
    titles = [a.text for a in figure.layout.annotations]
    assert [title.split(",")[0] for title in titles] == ["<b>S (before)</b>", "<b>R (after)</b>"]
    for words in ("denoise", "48 questions", "cue A put into cue B", "policy a put in place"):
        assert all(words in title for title in titles)
    # a difference within the intervals, or too small to matter, is no difference
    assert not outlines(figures.patching_maps(record, "cue", "resid_pre"))


def test_maps_have_a_row_for_each_contrast_and_direction():
    sweeps = [make_sweep(side=side, direction=way) for way in ("denoise", "noise") for side in ("after", "before")]
    figure = figures.patching_maps(make_patching().model_copy(update={"sweeps": tuple(sweeps)}), "cue", "z")
    assert [panel(figure, row, column)[0].z[1][2] for row in (1, 2) for column in (1, 2)] == [0.5, 0.8, 0.5, 0.8]
    assert "cue B put into cue A" in figure.layout.annotations[2].text
    alone = make_sweep("checkpoint", "after", cue="B")
    figure = figures.patching_maps(make_patching().model_copy(update={"sweeps": (alone,)}), "checkpoint", "z")
    assert "S put into R<br>prompts of cue B" in figure.layout.annotations[0].text


def test_large_maps_name_layers_and_keep_their_labels_apart():
    effects = {
        Site(layer=layer, component="z", head=head, position=p): around(-0.5)
        for layer in range(12)
        for head in range(12)
        for p in range(16)
    }
    sweeps = tuple(make_sweep(side=s, effects=effects, labels=("a-long-token",) * 16) for s in ("before", "after"))
    figure = figures.patching_maps(make_patching().model_copy(update={"sweeps": sweeps}), "cue", "z")
    assert len(figure.layout.yaxis.tickvals) == 12
    assert figure.layout.yaxis.ticktext[0] == "layer 0,<br>heads 0–11"
    assert figure.layout.xaxis.tickangle == -90
    assert figure.data[0].text[0][0] == "−.50"
    assert figure.layout.height > 144 * 15


def test_head_effects_draw_channels_with_intervals_strongest_on_top():
    sweep = make_sweep()
    figure = figures.head_effects(sweep)
    assert [trace.name for trace in figure.data] == ["q", "k", "v", "pattern"]
    assert list(figure.layout.yaxis.ticktext) == ["L1 head 1", "L0 head 1", "L1 head 0", "L0 head 0"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    for trace in figure.data:
        assert list(trace.x) == pytest.approx([0.3, 0.2, 0.1, 0.0])
        assert list(trace.error_x.array) == pytest.approx([0.01] * 4)


def test_heads_that_share_keys_are_not_taken_for_heads():
    effects = {Site(layer=0, component="q", head=head): around(0.1) for head in range(4)}
    effects |= {Site(layer=0, component="k", head=head): around(0.5) for head in range(2)}
    figure = figures.head_effects(make_sweep(effects=effects))
    assert list(figure.layout.yaxis.ticktext)[:2] == ["L0 shared k, v 0", "L0 shared k, v 1"]
    assert [x for x in figure.data[0].x if x is not None] == [0.1] * 4
    assert [x for x in figure.data[1].x if x is not None] == [0.5] * 2


def test_attention_has_the_colours_of_all_cues_of_the_suite():
    cues = ("Z", "A", "B")
    figure = figures.attention(make_patching(), cues)
    for column in (1, 2):
        for trace, cue in zip(panel(figure, 1, column), ("A", "B"), strict=True):
            assert trace.marker.color == figures.cue_colour(cue, cues)
            assert trace.name == f"cue {cue}"
    assert list(figure.data[1].y) == pytest.approx([0.3, 0.2, 0.5])
    assert sum(trace.showlegend for trace in figure.data) == 2


def test_repairs_draw_s_r_and_every_repair_with_what_they_close():
    record = make_repair(cues=("A", "C", "B"))
    figure = figures.repairs(record)
    assert list(figure.layout.yaxis.ticktext) == ["before training (S)", "after training (R)", "interchange", "zero"]
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["cue B (harmed)"].x) == [0.5, 0.02, 0.9, 0.5]
    assert list(traces["cue C"].x) == [0.5, None, None, None]
    assert traces["cue B (harmed)"].marker.color == figures.cue_colour("B", ("A", "C", "B"))
    assert [s.x0 for s in figure.layout.shapes if s.line.dash == "dot"] == [0.98]
    beside = [a.text for a in figure.layout.annotations]
    assert beside == ["<b>gap closed</b>", figures.DASH, figures.DASH, "0.89 [0.88, 0.90]", "0.49 [0.48, 0.50]"]


def test_repair_nulls_draw_every_random_place_and_the_repair_itself():
    record = make_repair()
    figure = figures.repair_nulls(record)
    traces = {trace.name: trace for trace in figure.data}
    points = traces["at random places"]
    assert list(points.x) == [*record.repairs[0].random.harmed, *record.repairs[1].random.harmed]
    assert all(abs(y - row) < 0.3 for y, row in zip(points.y, [0] * 4 + [1] * 4, strict=True))
    assert list(traces["the repair itself"].x) == [0.9, 0.5]
    assert "2 of 4 reach it" in figure.layout.annotations[2].text
    assert list(points.y) == list(figures.repair_nulls(record).data[-2].y), "jitter is the same every time"


def test_faithfulness_draws_found_against_random_by_size():
    figure = figures.faithfulness(make_circuits())
    assert {axis.type for axis in figure.select_xaxes()} == {"log"}
    for column in (1, 2):
        lines = [trace for trace in panel(figure, 1, column) if trace.mode == "lines+markers"]
        of = make_circuit().faithfulness
        assert [trace.name.split(":")[0] for trace in lines] == [
            "S (before), found",
            "S (before), random",
            "R (after), found",
            "R (after), random",
        ]
        assert lines[0].name.endswith("CPR 0.81 [0.80, 0.82], CMD 0.19 [0.18, 0.20]")
        assert list(lines[0].x) == list(of.fractions[1:])
        assert list(lines[0].y) == [value.value for value in of.found[1:]]
        bands = [trace for trace in panel(figure, 1, column) if trace.fill == "tonexty"]
        assert list(bands[0].y) == [value.high for value in of.found[1:]]


def test_names_of_the_mechanism_are_shown_literally():
    record, repair, circuits = (
        make_patching(HOSTILE, ("<A>", HOSTILE)),
        make_repair(HOSTILE, ("<A>", HOSTILE)),
        make_circuits(HOSTILE),
    )
    drawn = [
        figures.patching_map(record.sweeps[0], "z"),
        figures.patching_maps(record, "hint", "resid_pre"),
        figures.head_effects(record.sweeps[0]),
        figures.attention(record, ("<A>", HOSTILE)),
        figures.repairs(repair),
        figures.repair_nulls(repair),
        figures.faithfulness(circuits),
    ]
    for figure in drawn:
        text = json.dumps(figure.to_plotly_json(), default=list, ensure_ascii=False)
        assert not re.search(r"</?script|<A>|<[0-9]|<- ", text)


def test_whiskers_of_repairs_are_those_of_the_record():
    record = make_repair()
    harmed = next(trace for trace in figures.repairs(record).data if "harmed" in (trace.name or ""))
    expected = [record.before["B"], record.after["B"], *(repair.accuracy["B"] for repair in record.repairs)]
    turned = type("Turned", (), {"y": harmed.x, "error_y": harmed.error_x})
    assert same(drawn(turned), expected)
