"""Judging is arithmetic that can be done by hand, and every method says what its own instrument says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixturelens.features.dictionary import Dictionary
from mixturelens.lab.proving import localise as at
from mixturelens.lab.proving.judged import best_cut, chance, judge, score
from mixturelens.lab.proving.localise import BROKEN, METHODS, Case, Found, cases, localise
from mixturelens.lab.proving.planted import Planted
from mixturelens.patching.sweep import find_reader
from mixturelens.probing import subspace
from mixturelens.routing.circuit import CircuitNode, routing_circuit
from mixturelens.types import InputError, Interval

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference"


def planted(**changes: object) -> Planted:
    plain = {
        "architecture": "llama",
        "number": 0,
        "layers": 2,
        "reader": ("L0.h2", "L1.mlp"),
        "selector": ("L1.h0",),
        "decoys": ("L0.h3", "L1.h1"),
        "redundant": False,
        "changed": "L0.mlp",
    }
    return Planted.model_validate({**plain, **changes})


def found(*values: float, method: str = "some", organism: str = "one", contrast: str = "cue") -> Found:
    nodes = ("L0.h2", "L1.mlp", "L0.h3", "L1.h0", "L0.h0")
    scores = dict(zip(nodes, values, strict=True))
    return Found.model_validate(
        {"organism": organism, "contrast": contrast, "method": method, "scores": scores, "seconds": 1.0}
    )


# --- judging ----------------------------------------------------------------------------------------------------------


def test_judged_by_hand():
    """Planted 0.9 and 0.4 against 0.9, 0.1 and 0: of six pairs four are in order, and one is a tie."""
    result = judge(found(0.9, 0.4, 0.9, 0.1, 0.0), planted(), cut=0.5)
    assert result.auroc == pytest.approx(4.5 / 6)
    assert result.top == 0.5  # it ties with the decoy
    assert result.iou == pytest.approx(1 / 3)
    assert (result.decoys, result.both) == (0.0, None)


@pytest.mark.parametrize(
    ("decoy", "cut", "rejected"), [(0.3, 0.2, 0.0), (0.3, 0.35, 1.0), (0.4, 0.5, 0.0), (0.39, 0.5, 1.0)]
)
def test_a_decoy_is_rejected_below_the_cut_and_below_every_planted_node(decoy: float, cut: float, rejected: float):
    assert judge(found(0.9, 0.4, decoy, 0.0, 0.0), planted(), cut).decoys == rejected


def test_the_decoys_of_a_contrast_are_the_twins_of_its_heads():
    of_hint = planted(selector=("L1.h0",), decoys=("L0.h0", "L0.h3"))
    assert judge(found(0.0, 0.0, 0.2, 0.9, 1.0, contrast="hint"), of_hint, 0.5).decoys == 1.0


def test_redundant_readers_are_both_found_or_not():
    two = planted(reader=("L0.h2", "L1.h0", "L1.mlp"), selector=("L0.h0",), redundant=True, decoys=("L0.h3",) * 3)
    assert judge(found(0.9, 0.9, 0.0, 0.6, 0.0), two, 0.5).both is True
    assert judge(found(0.9, 0.9, 0.0, 0.4, 0.0), two, 0.5).both is False
    of_hint = judge(found(0.0, 0.0, 0.0, 0.0, 1.0, contrast="hint"), two, 0.5)
    assert (of_hint.both, of_hint.top) == (None, 1.0)


def test_nothing_found_is_no_better_than_chance():
    result = judge(found(0.0, 0.0, 0.0, 0.0, 0.0), planted(), cut=0.1)
    assert (result.auroc, result.top, result.iou) == (0.5, 0.25, 0.0)  # one of four heads


def test_a_node_that_nobody_scored_is_refused():
    with pytest.raises(InputError, match=r"one: L1\.h7 must be some of the scored L0\.h2"):
        judge(found(1.0, 0.0, 0.0, 0.0, 0.0, contrast="hint"), planted(selector=("L1.h7",)), 0.5)


def test_the_cut_of_greatest_overlap():
    """Above 0.5 the second organism has nothing, below 0.4 both have too much."""
    some = [found(0.8, 0.6, 0.3, 0.0, 0.0), found(0.5, 0.2, 0.4, 0.1, 0.0)]
    assert best_cut(some, [planted()] * 2) == pytest.approx(0.45)
    assert best_cut([found(0.9, 0.8, 0.1, 0.0, 0.0)], [planted()]) == pytest.approx(0.45)  # the middle
    assert best_cut([found(0.0, 0.0, 0.0, 0.0, 0.0)], [planted()]) == 0.0
    assert 0 < best_cut([found(0.7, 0.7, 0.7, 0.7, 0.7)], [planted()]) < 0.7
    with pytest.raises(InputError, match="at least one"):
        best_cut([], [])


def test_chance_is_where_it_should_be():
    result = chance(found(1.0, 1.0, 0.0, 0.0, 0.0), planted())
    assert result.auroc == pytest.approx(0.5, abs=0.08)
    assert result.top == pytest.approx(0.25, abs=0.15)
    assert result.method == "random scores"


def test_cuts_come_from_organisms_that_are_not_judged():
    exact, broken = "exact patching", "exact patching, one layer off"
    founds = [
        found(0.9, 0.8, 0.0, 0.0, 0.0, method=exact, organism="open"),
        found(0.0, 0.0, 0.0, 0.2, 0.0, method=broken, organism="open"),  # would choose another cut
        *(found(0.9, 0.3, 0.0, 0.0, 0.0, method=exact, organism=name) for name in ("x", "y")),
        found(0.0, 0.0, 0.3, 0.3, 0.0, method=broken, organism="x"),
    ]
    result = {each.method: each for each in score(founds, dict.fromkeys(("open", "x", "y"), planted()), ["open"])}
    assert list(result) == [exact, broken, "random scores"]
    assert result[exact].cut == result[broken].cut == pytest.approx(0.4)
    assert result[exact].organisms == 2
    assert result[exact].iou.value == 0.5  # 0.3 is missed, whatever cut would have found it
    assert (result[broken].iou.value, result[broken].auroc.value) == (0.0, pytest.approx(1 / 6))
    assert result[exact].both.value is None
    with pytest.raises(InputError, match="did not choose"):
        score(founds[:1], {"open": planted()}, ["open"])


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> tuple[Case, ...]:
    return tuple(replace(case, contrasts=case.contrasts.first(40)) for case in cases(REFERENCE))


@pytest.fixture(scope="module")
def small(reference: tuple[Case, ...]) -> Case:
    return replace(reference[0], contrasts=reference[0].contrasts.first(16))


def test_every_node_is_scored_and_patching_finds_the_reader(reference: tuple[Case, ...]):
    methods = ["probe", "exact patching", "exact patching, one layer off"]
    results = {(each.contrast, each.method): each.scores for each in localise(REFERENCE, methods)}
    assert list(results) == [(kind, method) for kind in ("cue", "hint") for method in methods]
    exact = results["cue", "exact patching"]
    assert list(exact) == [f"L{layer}.{node}" for layer in range(3) for node in ("h0", "h1", "h2", "h3", "mlp")]
    for case, position in zip(reference, ("policy", "last"), strict=True):
        scores = results[case.kind, "exact patching"]
        first = find_reader(case.lens, case.contrasts, position).heads[0]
        assert f"L{first.layer}.h{first.head}" == max((n for n in scores if ".h" in n), key=lambda n: scores[n])
    off = results["cue", "exact patching, one layer off"]
    assert [off[f"L{(layer - 1) % 3}.mlp"] for layer in range(3)] == [exact[f"L{layer}.mlp"] for layer in range(3)]
    read = results["cue", "probe"]  # what is read is not what is used
    assert sum(value > 0.95 for value in read.values()) > 2 * sum(value > 0.1 for value in exact.values())


@pytest.mark.slow
def test_edges_of_a_node_add_up(small: Case):
    """EAP-IG's signed sums are below the circuit's sums of |score|, and nothing is behind the last MLP."""
    small = replace(small, contrasts=small.contrasts.first(8))
    nodes = {node.name: node for node in routing_circuit(small.lens, small.contrasts, "before").nodes}
    signed, exact = METHODS["EAP-IG"](small), METHODS["exact patching"](small)
    assert all(abs(signed[node]) <= (nodes[node].score.value or 0.0) + 1e-4 for node in small.sites)
    assert signed["L2.mlp"] == pytest.approx(exact["L2.mlp"], abs=0.1)


def test_the_circuit_is_judged_by_what_it_verified(small: Case, monkeypatch: pytest.MonkeyPatch):
    """The larger of the two effects where a node is used; 0 where its slopes are refuted, undecided or unchecked."""

    def node(name: str, patched: float, needed: float, half: float = 0.0) -> CircuitNode:
        both = [Interval(value=value, low=value - half, high=value + half) for value in (patched, needed)]
        return CircuitNode(name=name, layer=0, score=Interval(value=0.9), patched=both[0], needed=both[1])

    unchecked = CircuitNode(name="L1.h0", layer=1, score=Interval(value=0.9))
    used = node("L0.h0", 0.2, 0.7), node("L0.h1", -0.4, 0.1), node("L0.h2", 0.004, 0.001), node("L0.h3", 0.1, 0.1, 0.2)
    monkeypatch.setattr(at, "routing_circuit", lambda *_: SimpleNamespace(nodes=(*used, unchecked)))
    monkeypatch.setattr(Case, "sites", dict.fromkeys(("L0.h0", "L0.h1", "L0.h2", "L0.h3", "L1.h0")))
    assert list(METHODS["routing circuit"](replace(small)).values()) == [0.7, -0.4, 0, 0, 0]


def test_shuffled_sides_take_the_effect_away(small: Case):
    plain, shuffled = METHODS["exact patching"](small), BROKEN["exact patching, sides shuffled"](small)
    assert max(map(abs, shuffled.values())) < max(plain.values()) * 0.75


def test_one_dimension_carries_what_a_whole_head_does_and_no_more(small: Case, monkeypatch: pytest.MonkeyPatch):
    """DAS of the node that carries most, and of one that carries nothing."""
    for module in (at, subspace):
        monkeypatch.setattr(module, "STEPS", 10)
    monkeypatch.setattr(Case, "sites", {node: small.sites[node] for node in ("L0.h2", "L2.h1")})
    scores = METHODS["DAS"](replace(small))
    assert scores["L0.h2"] > 0.4
    assert abs(scores["L2.h1"]) < 0.1


def test_an_unknown_method_and_sides_that_are_alike(small: Case):
    with pytest.raises(InputError, match="no method 'luck'; there are probe"):
        localise(REFERENCE, ["luck"])
    rows = tuple(replace(row, corrupt=row.clean) for row in small.contrasts.rows)
    with pytest.raises(InputError, match=r"differ by 0\.00 nats"):
        METHODS["exact patching"](replace(small, contrasts=replace(small.contrasts, rows=rows)))


def test_the_feature_is_chosen_on_one_half(small: Case, monkeypatch: pytest.MonkeyPatch):
    """An SAE of the node, in place of training: its one feature is the difference between the sides."""
    monkeypatch.setattr(Case, "sites", {"L0.h2": small.sites["L0.h2"]})
    small = replace(small)  # what it had cached is of all nodes
    clean, corrupt = small.outputs["L0.h2"][:, :, -1].mean(1)
    along = torch.nn.functional.normalize(clean - corrupt, dim=0)[None]
    one = Dictionary(along, torch.zeros(1), torch.tensor([-torch.inf]), along)
    monkeypatch.setattr(at, "train_sae", lambda rows, folder, *_: folder)
    monkeypatch.setattr(at, "load_sae", lambda _: one)
    whole = METHODS["exact patching"](small.half(1))["L0.h2"]
    assert METHODS["SAE feature"](small)["L0.h2"] == pytest.approx(whole, rel=0.3)
    assert np.sign(whole) == 1
