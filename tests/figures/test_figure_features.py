"""Figures of features draw the numbers of the record: what units move, what RL changed of them, and of which term."""

from __future__ import annotations

import json
import re

import pytest
from test_figure_patching import make_repair
from test_figures import HOSTILE, around, panel

from mixturelens import figures
from mixturelens.features.record import (
    Card,
    CrosscoderFit,
    FeatureRecord,
    FiringExample,
    MovedFeature,
    Quality,
    Sae,
    Several,
    SiteChange,
    Table,
    Terms,
    Unit,
    UnitScore,
)
from mixturelens.figures.style import TERMS, UNITS
from mixturelens.figures.units import needed
from mixturelens.types import NOT_MEASURED, Site

SITE = Site(layer=1, component="resid_pre", position="policy")
EFFECTS = {"subspace": 0.97, "feature": 0.91, "direction": 0.84, "head": 0.62, "neuron": 0.14}
"""Not in the order in which they are shown."""


def make_unit(kind: str, words: str = "", index: int = 17) -> Unit:
    if kind == "feature":
        return Unit(kind="feature", site=SITE, index=index)
    if kind == "neuron":
        return Unit(kind="neuron", site=Site(layer=0, component="neurons", neuron=101, position="policy"))
    if kind == "head":
        return Unit(kind="head", site=Site(layer=0, component="z", head=3, position="policy"))
    name = "DAS" if kind == "subspace" else "difference of means"
    return Unit(kind=kind, site=SITE, name=f"{name}{words}")  # pyright: ignore[reportArgumentType]


def make_score(kind: str, repaired: bool, words: str = "", scale: float = 1.0) -> UnitScore:
    effect = scale * EFFECTS[kind]
    fields = {}
    if repaired:
        fields = {
            "gap_closed": around(effect - 0.05, 0.02),
            "trained_change": around(-0.4 * (1 - effect), 0.02),
            "random_gap": (0.0, 0.01, None, 0.06, -0.02, 0.11, 0.0, 0.0),
        }
    return UnitScore(
        unit=make_unit(kind, words),
        among={"feature": 128, "neuron": 768, "head": 12, "direction": 2, "subspace": 1}[kind],
        auroc=NOT_MEASURED if kind == "subspace" else around(0.99 - 0.3 * (kind == "neuron"), 0.01),
        patch=around(effect, 0.03),
        clamp=around(effect - 0.06, 0.03),
        ablate=around(0.4 * effect, 0.04),
        random=tuple(0.02 + 0.2 * effect * ((i * 7) % 24) / 24 for i in range(24)) if kind != "head" else (0.2, 0.02),
        margin=NOT_MEASURED if kind == "subspace" else around(effect - 0.2, 0.05),
        **fields,
    )


def make_several(kind: str, repaired: bool, words: str = "", scale: float = 1.0, **changes) -> Several:
    """Twelve features carry nearly all, 32 neurons a half, and two heads all."""
    number, effect = {"feature": (12, 0.98), "neuron": (32, 0.5), "head": (2, 1.0)}[kind]
    clamped = {"gap_closed": around(scale * effect - 0.3, 0.02), "trained_change": around(-0.1)} if repaired else {}
    fields = {
        "kind": kind,
        "units": tuple(make_unit(kind, words, i) for i in range(number)),
        "among": 128,
        "enough": kind != "neuron",
        "patch": around(scale * effect, 0.01),
        "random": tuple(0.01 * i for i in range(8)) if kind != "head" else (),
        **clamped,
        **changes,
    }
    return Several(**fields)


def make_table(concept: str, words: str = "", cues=("A", "B"), kinds=tuple(EFFECTS), **changes) -> Table:
    clean, corrupt = {"cue": cues, "hint": (f"a{words}", "b"), "selector": ("before", "after")}[concept]
    scale = {"cue": 1.0, "hint": 0.9, "selector": 0.4}[concept]
    return Table(
        concept=concept,  # pyright: ignore[reportArgumentType]
        checkpoint="before" if concept == "hint" else "after",
        clean=clean,
        corrupt=corrupt,
        questions=50,
        base=around(-7.12),
        goal=around(6.5),
        site=SITE,
        **{
            "scores": tuple(make_score(kind, concept != "hint", words, scale) for kind in kinds),
            "several": tuple(
                make_several(kind, concept != "hint", words, scale)
                for kind in ("feature", "neuron", "head")
                if kind in kinds
            ),
            **changes,
        },
    )


def make_terms(routing: float, conditioning: float | None, skill: float) -> Terms:
    return Terms(
        routing=around(routing, 0.005),
        conditioning=NOT_MEASURED if conditioning is None else around(conditioning, 0.002),
        skill=around(skill, 0.0005),
        specialist=around((conditioning or 0.0) + skill, 0.002),
    )


def make_change(**changes) -> SiteChange:
    """Half of R's change of the choice is in the first two features."""
    features = tuple(
        MovedFeature(
            index=index,
            rate={"before": 0.05 * i + 0.02, "after": 0.06 * i},
            strength={"before": 1.0 + 0.5 * i, "after": 1.2 + 0.4 * i},
            moved=2.0 / (i + 1),
            terms=make_terms(0.2 / (i + 1) ** 2, 0.004, 0.0005),
        )
        for i, index in enumerate((17, 3, 90, 41, 77, 5, 101, 64))
    )
    fields = {
        "site": SITE,
        "features": features,
        "together": make_terms(0.41, 0.012, 0.002),
        "every": make_terms(0.55, 0.02, 0.003),
        "whole": make_terms(0.62, 0.021, 0.003),
        "random": tuple(make_terms(0.01 * (i % 4), 0.001 * (i % 3), 0.0001) for i in range(12)),
        "questions": 48,
        **changes,
    }
    return SiteChange(**fields)


def make_fit(seed: int = 0, **changes) -> CrosscoderFit:
    fields = {
        "site": Site(layer=1, component="resid_post"),
        "seed": seed,
        "explained": {"before": 0.98, "after": 0.97},
        "dead": 0.02,
        "shared": 240 - seed,
        "exclusive": {"before": seed, "after": 3 + seed},
        "false": 5,
        "tested": 3,
        "causal": 2,
        "causal_terms": {"selector": 2, "skill": 0},
        "without": make_terms(0.31, 0.01, 0.001),
        "random": (make_terms(0.01, 0.0, 0.0), make_terms(0.02, 0.001, 0.0)),
        **changes,
    }
    return CrosscoderFit(**fields)


def make_card(index: int = 17, words: str = "", **changes) -> Card:
    tokens = ("<B>", f"neutral{words}", "up", "c", "a", "d", "b", "=", "[a]", " ", "a", "b", "c", "<eos>")
    fields = {
        "unit": make_unit("feature", index=index),
        "why": f"best feature for the cue{words}",
        "auroc": {"cue": 0.993, "hint": None, "policy": 0.51},
        "rate": {"before": 0.061, "after": 0.07},
        "strength": {"before": 3.1, "after": 4.25},
        "promotes": ((f"sorry{words}", 6.2), (" ", 0.3), ("<eos>", 0.01)),
        "suppresses": (("a", -3.5), ("b", -2.25)),
        "examples": tuple(
            FiringExample(
                tokens=tokens, activations=tuple(4.0 / (k + 1) if i in (8, 9 + k) else 0.0 for i in range(14))
            )
            for k in range(3)
        ),
        **changes,
    }
    return Card(**fields)


def make_quality(explained: float, recovered: float | None) -> Quality:
    loss = NOT_MEASURED if recovered is None else around(recovered, 0.004)
    return Quality(explained=explained, active=7.9, dead=0.0, loss_recovered=loss, tokens=2800)


def make_features(words: str = "", cues=("A", "B"), **changes) -> FeatureRecord:
    fields = {
        "trained_cue": cues[0],
        "harmed_cue": cues[-1],
        "saes": (
            Sae(
                site=SITE,
                folder="sae/L1.resid_pre",
                trained=128,
                width=121,
                quality={"before": make_quality(0.993, 0.991), "after": make_quality(0.968, 0.97)},
            ),
        ),
        "tables": tuple(make_table(concept, words, cues) for concept in ("cue", "hint", "selector")),
        "changes": (make_change(),),
        "cards": (make_card(words=words), make_card(3, words, why="moved most by RL")),
        "crosscoders": (make_fit(0), make_fit(1), make_fit(2)),
        "missing": (f"hint{words}: no site carries it",),
        **changes,
    }
    return FeatureRecord(**fields)


def test_best_units_draw_every_effect_in_the_colour_of_its_kind():
    record = make_features()
    figure = figures.best_units(record)
    kinds = ["feature", "neuron", "head", "direction", "subspace"]
    for row, table in enumerate(record.tables, start=1):
        scores = [table.best(kind) for kind in kinds]  # pyright: ignore[reportArgumentType]
        traces = {trace.name: trace for trace in panel(figure, row, 1)}
        for field in ("patch", "clamp", "ablate"):
            values = [getattr(score, field) for score in scores]
            assert list(traces[field].x) == [value.value for value in values]
            assert list(traces[field].error_x.array) == pytest.approx([value.high - value.value for value in values])
            assert list(traces[field].marker.color) == [UNITS[kind] for kind in kinds]
        assert list(traces["patch of controls"].x) == [v for score in scores for v in score.random]
        names = figure.get_subplot(row, 1).yaxis.ticktext
        assert names[0] == "<b>feature</b><br>L1.resid_pre@policy feature 17"
        assert names[2] == "<b>head</b><br>L0.z.3@policy"
    assert (
        len({trace.marker.symbol for trace in panel(figure, 1, 1) if trace.name in ("patch", "clamp", "ablate")}) == 3
    )
    said = [a.text for a in figure.layout.annotations]
    assert "0.99 [0.98, 1.00]<br>0.71 [0.66, 0.76]" in said, "AUROC and margin of the feature"
    assert figures.DASH in said, "the subspace has neither"
    titles = " ".join(said)
    assert "<b>cue</b> in R (after): cue A put into cue B<br>log-odds −7.12 → 6.50 nats" in titles
    assert "<b>hint</b> in S (before): hint a put into hint b" in titles
    assert "<b>selector</b> in R (after): S (before) put into R (after)" in titles


def test_best_units_of_one_concept_and_of_none():
    record = make_features()
    figure = figures.best_units(record, "hint")
    assert list(figure.data[1].x) == [record.tables[1].best(kind).patch.value for kind in UNITS]  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
    assert {trace.xaxis or "x" for trace in figure.data} == {"x"}
    with pytest.raises(KeyError, match="no units for hint"):
        figures.best_units(make_features(tables=()), "hint")
    with pytest.raises(ValueError, match="no units were compared"):
        figures.best_units(make_features(tables=()))


def test_units_that_were_not_found_have_no_row():
    table = make_table("cue", kinds=("head", "feature"))
    axis = figures.best_units(make_features(tables=(table,))).get_subplot(1, 1).yaxis
    assert [name.split("<br>")[0] for name in axis.ticktext] == ["<b>feature</b>", "<b>head</b>"]


def test_needed_puts_the_fewest_together_beside_the_best_one():
    record = make_features()
    figure = needed(record)
    for column, table in enumerate(record.tables, start=1):
        traces = {trace.name: trace for trace in panel(figure, 1, column)}
        assert list(traces["one"].x) == [table.best(kind).patch.value for kind in UNITS]  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        assert list(traces["one"].marker.color) == list(UNITS.values())
        assert list(traces["together"].x) == [each.patch.value for each in table.several]
        assert list(traces["together"].y) == [0, 1, 2]
        assert list(traces["together"].text) == ["12 features", "32 neurons, not enough", "2 heads"]
        lines = [trace for trace in panel(figure, 1, column) if trace.name == "from one to the set"]
        for line, each in zip(lines, table.several, strict=True):
            assert list(line.x) == [table.best(each.kind).patch.value, each.patch.value]  # pyright: ignore[reportOptionalMemberAccess]
        grey = traces["controls"]
        rows = {round(y) for y in grey.y}
        assert rows == {0, 1, 3, 4}, "a set of heads for which there are no others; a direction has those of the one"
        assert list(grey.x)[:16] == [0.01 * i for i in range(8)] * 2
    said = [a.text for a in figure.layout.annotations]
    assert said.count("AUROC") == 3
    assert said.count("0.99") == 9, "features, heads and directions read it"
    assert said.count(figures.DASH) == 3
    assert figure.get_subplot(1, 1).yaxis.ticktext == tuple(f"<b>{kind}</b>" for kind in UNITS)


def test_needed_without_a_set_that_moves_anything():
    none = make_several("feature", False, units=(), enough=False, patch=NOT_MEASURED, random=())
    one = make_several("head", False, units=(make_unit("head"),))
    table = make_table("cue", kinds=("feature", "head"), several=(none, one))
    figure = needed(make_features(tables=(table,)))
    traces = {trace.name: trace for trace in panel(figure, 1, 1)}
    assert list(traces["together"].text) == ["1 head"]
    assert list(traces["together"].y) == [1]
    assert {trace.name for trace in figure.data if trace.mode == "lines"} == {"from one to the set"}
    with pytest.raises(ValueError, match="no units were compared"):
        needed(make_features(tables=()))


def test_a_kind_of_unit_looks_like_no_policy_cue_or_term():
    many = [str(i) for i in range(6)]
    others = {figures.policy_colour(name, many) for name in many} | {figures.cue_colour(name, many) for name in many}
    assert len(set(UNITS.values())) == len(UNITS)
    assert not set(UNITS.values()) & (others | set(TERMS.values()))


def test_clamping_puts_units_beside_the_repairs_of_heads():
    record, repair = make_features(), make_repair()
    figure = figures.clamping(record, repair)
    units = [
        score
        for table in record.tables
        if table.concept != "hint"
        for kind in UNITS
        if (score := table.best(kind)) is not None  # pyright: ignore[reportArgumentType]
    ]
    gap, change = ({trace.name: trace for trace in panel(figure, 1, j)} for j in (1, 2))
    assert list(gap["gap"].x) == [each.gap_closed.value for each in (*units, *repair.repairs)]
    assert list(change["change"].x) == [each.trained_change.value for each in (*units, *repair.repairs)]
    assert list(gap["gap"].error_x.array)[:10] == pytest.approx([0.02] * 10)
    assert list(gap["gap"].marker.symbol) == ["diamond"] * 10 + ["square"] * 2
    sets = [each for table in record.tables if table.concept != "hint" for each in table.several]
    assert list(gap["together"].x) == [each.gap_closed.value for each in sets]
    assert list(change["together"].x) == [each.trained_change.value for each in sets]
    assert [round(y) for y in gap["together"].y] == [0, 1, 2, 5, 6, 7]
    random = list(gap["controls, clamped"].x)
    assert random == [v for each in units for v in each.random_gap if v is not None]
    names = figure.get_subplot(1, 1).yaxis.ticktext
    assert names[0] == "<b>feature</b> for the cue<br>L1.resid_pre@policy feature 17"
    assert names[-2] == "<b>repair</b>: interchange<br>L0.z.1@policy"
    said = [a.text for a in figure.layout.annotations]
    assert "0.86 [0.84, 0.88]<br>12: 0.68 [0.66, 0.70]" in said, "the feature, and twelve of them"


def test_clamping_without_a_repair_or_without_clamps():
    alone = figures.clamping(make_features(tables=(make_table("cue"),)))
    assert len(alone.get_subplot(1, 1).yaxis.ticktext) == 5
    assert "heads repaired" not in {trace.name for trace in alone.data}
    single = figures.clamping(make_features(tables=(make_table("cue", several=()),)))
    assert "the fewest together, clamped" not in {trace.name for trace in single.data}
    assert "0.86 [0.84, 0.88]" in [a.text for a in single.layout.annotations]
    with pytest.raises(ValueError, match="no unit was clamped"):
        figures.clamping(make_features(tables=(make_table("hint"),)), make_repair())


def test_feature_change_shows_every_term_on_one_scale():
    change = make_change()
    figure = figures.feature_change(change)
    for j, term in enumerate(("routing", "conditioning", "skill"), start=1):
        traces = {trace.name: trace for trace in panel(figure, 1, j)}
        shown = [change.whole, change.every, change.together]
        assert list(traces[term].x) == [
            *(getattr(terms, term).value for terms in shown),
            None,
            *(getattr(each.terms, term).value for each in change.features),
        ]
        assert traces[term].marker.color == TERMS[term]
        assert list(traces["as many random ones"].x) == [getattr(terms, term).value for terms in change.random]
        assert set(map(round, traces["as many random ones"].y)) == {3}
    assert len({tuple(figure.get_subplot(1, j).xaxis.range) for j in (1, 2, 3)}) == 1
    names = figure.get_subplot(1, 1).yaxis.ticktext
    assert list(names[2:5]) == ["<b>these 8</b> together", "8 random others", "feature 17, moved 2.00"]
    assert figure.layout.title.text.startswith("<b>L1.resid_pre@policy</b>: R's change put into S, 48 questions")


def test_terms_that_were_not_measured_are_dashes():
    bare = make_terms(0.1, None, 0.01)
    change = make_change(features=(), together=bare, every=bare, whole=bare, random=())
    figure = figures.feature_change(change)
    assert list(panel(figure, 1, 2)[1].x) == [None] * 3
    assert [a.text for a in figure.layout.annotations].count(figures.DASH) == 3


def test_firing_holds_r_against_s():
    change = make_change()
    figure = figures.firing(change)
    for j, field in enumerate(("rate", "strength"), start=1):
        traces = {trace.name: trace for trace in panel(figure, 1, j)}
        assert list(traces[field].x) == [getattr(each, field)["before"] for each in change.features]
        assert list(traces[field].y) == [getattr(each, field)["after"] for each in change.features]
        assert list(traces[field].text) == [str(each.index) for each in change.features]
        assert list(traces["alike"].x) == list(traces["alike"].y)
    one_side = change.features[0].model_copy(update={"rate": {"before": 0.1}})
    assert list(panel(figures.firing(make_change(features=(one_side,))), 1, 1)[1].x) == []


def test_crosscoder_counts_what_is_exclusive_and_what_it_does():
    pair, null = (
        (make_fit(0), make_fit(1)),
        (make_fit(exclusive={}, tested=0, causal=0, causal_terms={}, without=None, random=()),),
    )
    figure = figures.crosscoder({"sft to rl-A": pair, "base against base": null})
    counts = {trace.name: list(trace.x) for trace in panel(figure, 1, 1)}
    assert counts == {"R alone": [3, 4, 0], "S alone": [0, 1, 0], "by norm alone, false": [5, 5, 5]}
    traces = {trace.name: trace for trace in panel(figure, 1, 2)}
    assert list(traces["routing"].x) == [0.31, 0.31, None]
    assert list(traces["as many random ones"].x) == [0.01, 0.02, 0.01, 0.02]
    said = [a.text for a in figure.layout.annotations]
    assert said[-3:] == ["2 of 3<br>2 routing", "2 of 3<br>2 routing", figures.DASH]
    assert said.count(figures.DASH) == 4
    assert figure.get_subplot(1, 1).yaxis.ticktext[1] == "<b>sft to rl-A</b><br>L1.resid_post, seed 1: 239 shared"
    assert figures.crosscoder({}).data[0].x == ()


def test_names_of_features_are_shown_literally():
    record = make_features(HOSTILE, ("<A>", HOSTILE))
    drawn = [
        figures.best_units(record),
        needed(record),
        figures.clamping(record, make_repair(HOSTILE, ("<A>", HOSTILE))),
        figures.feature_change(record.changes[0]),
        figures.firing(record.changes[0]),
        figures.crosscoder({HOSTILE: record.crosscoders}),
    ]
    for figure in drawn:
        text = json.dumps(figure.to_plotly_json(), default=list, ensure_ascii=False)
        assert not re.search(r"</?script|<A>|<[0-9]|<- ", text)
