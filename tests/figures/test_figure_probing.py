"""Figures of probing draw the numbers of the record: what is read, what is used, what carries it, what moved."""

from __future__ import annotations

import json
import re

import pytest
from test_figures import HOSTILE, around, panel

from mixturelens import figures
from mixturelens.probing.record import Column, ErasedSite, Erasure, ProbingRecord, Readout, Shift, Subspace
from mixturelens.types import NOT_MEASURED, Interval, Site

LABELS = ("<A>", "neutral", "up", "c", "a", "d", "b", " ", "[a]")
LAYERS, HEADS = 3, 4
USED, UNUSED = Site(layer=0, component="resid_pre", position=0), Site(layer=2, component="resid_post", position=8)


def make_sites(layers: int = LAYERS, heads: int = HEADS, positions: int = len(LABELS)) -> tuple[Site, ...]:
    found = []
    for layer in range(layers):
        for component in ("resid_pre", "resid_mid", "resid_post", "mlp_out"):
            found += [Site(layer=layer, component=component, position=p) for p in range(positions)]
        for head in range(heads):
            found += [Site(layer=layer, component="z", head=head, position=p) for p in range(positions)]
    return tuple(found)


def make_column(values: list[float | None], width: float = 0.02) -> Column:
    return Column(
        value=tuple(values),
        low=tuple(None if v is None else v - width for v in values),
        high=tuple(None if v is None else min(1.0, v + width) for v in values),
    )


def make_readout(target: str, sites: tuple[Site, ...], words: str = "", cues=("A", "B")) -> Readout:
    """Read from its own token on, ever better; in R a little worse, and S's probes only half as well."""
    metric = {"answer": "accuracy", "log-odds": "R2"}.get(target, "AUROC")
    chance = {"answer": 0.1, "log-odds": 0.0}.get(target, 0.5)
    first = {"cue": 0, "hint": 1, "behaviour": 8, "answer": 3, "log-odds": 7}.get(target, 8)

    def score(site: Site, share: float) -> float | None:
        assert isinstance(site.position, int)
        if target == "behaviour" and site.position < 1:
            return None
        grown = min(1.0, 0.4 + 0.25 * site.layer + 0.05 * site.position + (0.2 if site.component[0] == "r" else 0))
        return chance + (1 - chance) * share * grown if site.position >= first else chance + 0.01

    values = {share: [score(site, share) for site in sites] for share in (1.0, 0.97, 0.5)}
    return Readout(
        target=target,
        metric=metric,
        classes=tuple(cues) if target == "cue" else (),
        rows=f"neutral prompts{words}, policy put in place",
        questions=200,
        chance=chance,
        before=make_column(values[1.0]),
        after=make_column(values[0.97]),
        carried=make_column(values[0.5], 0.05),
        untrained=tuple(0.99 if target == "cue" and site.position == 0 else chance + 0.02 for site in sites),
        shuffled=tuple(chance for _ in sites),
        shuffled_high=chance + 0.06,
    )


def make_erasure(site: Site, left: float, cues=("A", "B")) -> Erasure:
    return Erasure(
        site=site,
        readable=around(0.999, 0.001),
        policy="a",
        plain={cues[0]: around(0.996, 0.003), cues[-1]: around(0.002, 0.002)},
        erased={cues[0]: around(0.51 + left / 2, 0.02), cues[-1]: around(0.5 - left / 2, 0.02)},
        left=around(left, 0.02),
        gap=around(0.01, 0.02),
        random=(0.97, 0.99, 1.0, 1.01),
    )


def make_subspace(concept="cue", **fields) -> Subspace:
    accuracy = {"before": around(0.99), "after": around(0.97 if concept == "cue" else 0.72, 0.02)}
    fields = {
        "site": Site(layer=0, component="resid_mid", position="policy"),
        "dimensions": 1 if concept == "cue" else 2,
        **fields,
    }
    return Subspace(
        concept=concept,
        directions=((1.0, 0.0), (0.0, 1.0))[: fields["dimensions"]],
        questions=100,
        pairs=400,
        plain={"before": around(1.0, 0.0), "after": around(0.99)},
        accuracy=accuracy,
        random={side: tuple(0.5 + 0.005 * i for i in range(16)) for side in accuracy},
        shuffled=dict.fromkeys(accuracy, (0.49, 0.51, 0.6, 0.55)),
        margin={side: around((value.value or 0) - 0.6, 0.03) for side, value in accuracy.items()},
        **fields,
    )


def make_shifts(words: str = "") -> tuple[Shift, ...]:
    """Unlike the hint before the last token, like it from there on, the more so the higher."""
    places = [*range(8), "hint", f"last{words}"]
    found = []
    for layer in range(LAYERS):
        for p in places:
            cosine = 0.25 * layer + 0.3 if p in (7, f"last{words}") else -0.05
            found.append(
                Shift(
                    site=Site(layer=layer, component="resid_post", position=p),
                    cosine=around(cosine, 0.04),
                    along=around(cosine * 1.5, 0.1),
                    null=0.12,
                )
            )
    return tuple(found)


def make_probing(words: str = "", cues=("A", "B"), **changes) -> ProbingRecord:
    sites = make_sites()
    erased = []
    for i, site in enumerate(sites):
        carries = site.position == 0 and site.component == "resid_pre" and site.layer == 0
        carries |= site.position == 8 and site.component.startswith("resid") and site.layer < 2
        left = 0.02 if carries else 1 - 0.15 * ((i * 7) % 5 == 0)
        erased.append(
            ErasedSite(
                site=site,
                readable=around(min(1.0, 0.8 + 0.05 * ((i * 3) % 5)), 0.005),
                left=around(left, 0.03),
                gap=around(0.01, 0.02),
                random=(1.0, 0.99, 1.02),
            )
        )
    fields = {
        "trained_cue": cues[0],
        "policies": ("a", "b"),
        "sites": sites,
        "labels": tuple(f"{name}{words}" for name in LABELS),
        "readouts": tuple(
            make_readout(target, sites, words, cues) for target in ("cue", "hint", "behaviour", "answer", "log-odds")
        ),
        "erased": tuple(erased),
        "used": make_erasure(USED, 0.01, cues),
        "unused": make_erasure(UNUSED, 0.995, cues),
        "subspaces": (make_subspace("cue"), make_subspace("selector")),
        "shifts": make_shifts(words),
        "missing": (f"policy{words}: nothing to read",),
        **changes,
    }
    return ProbingRecord(**fields)


def column_of(record: ProbingRecord, target: str, view: str) -> list[float | None]:
    readout = record.readout(target)
    assert readout is not None
    return list(getattr(readout, view).value)


def test_readability_draws_every_score_of_s_of_r_and_of_probes_carried_over():
    record = make_probing()
    figure = figures.readability(record, "cue")
    names = figure.get_subplot(1, 1).yaxis.ticktext
    layer = [*(f"head {i}" for i in range(HEADS)), "mid", "MLP", "out"]
    assert list(names) == ["L0 in", *(f"L{i} {name}" for i in range(LAYERS) for name in layer)]
    at = {(site.layer, site.component, site.head, site.position): i for i, site in enumerate(record.sites)}
    rows = {"L0 in": (0, "resid_pre", None), "L1 head 2": (1, "z", 2), "L2 MLP": (2, "mlp_out", None)}
    for j, view in enumerate(("before", "after", "carried"), start=1):
        (heat,) = panel(figure, 1, j)
        for name, row in rows.items():
            assert list(heat.z[list(names).index(name)]) == [
                column_of(record, "cue", view)[at[*row, p]] for p in range(len(LABELS))
            ]
        assert (heat.zmin, heat.zmax) == (0.5, 1.0)
    assert list(figure.get_subplot(1, 1).xaxis.ticktext)[:2] == ["&lt;A&gt;", "neutral"]


def test_readable_has_a_row_of_panels_for_each_target_with_its_own_chance():
    record = make_probing()
    figure = figures.readable(record)
    for i, readout in enumerate(record.readouts, start=1):
        assert {trace.zmin for j in (1, 2, 3) for trace in panel(figure, i, j)} == {readout.chance}
        assert list(figure.get_subplot(i, 1).yaxis.ticktext) == ["L0 in", "L0 out", "L1 out", "L2 out"]
    titles = [a.text for a in figure.layout.annotations]
    assert "<b>cue</b>: AUROC, chance 0.50, shuffled labels reach 0.56; 200 questions" in " ".join(titles)
    assert any("R<sup>2</sup>, chance 0," in title for title in titles)


def test_scores_are_written_where_they_exceed_shuffled_labels_and_grey_where_random_weights_reach_them():
    figure = figures.readable(make_probing())
    texts = panel(figure, 1, 1)[0].text[3]
    assert re.fullmatch(r'<span style="color:#\w+">1.0</span>', texts[0])
    assert texts[1] == "1.0"
    behaviour = panel(figure, 3, 1)[0]
    assert behaviour.z[0][0] is None
    assert list(behaviour.text[0]) == [figures.DASH, *[""] * 7, "1.0"], "chance is not written, and null is a dash"
    assert "random weights 0.990" in panel(figure, 1, 1)[0].hovertext[3][0]


def test_a_target_without_probes_is_refused():
    with pytest.raises(KeyError, match="no probes for answer"):
        figures.readability(make_probing(readouts=()), "answer")


def test_named_spans_and_large_networks_have_their_axes():
    sites = tuple(
        Site(layer=layer, component="z", head=head, position=p)
        for layer in range(12)
        for head in range(12)
        for p in ("cue", "last", "policy")
    )
    record = make_probing(sites=sites, labels=(), readouts=(make_spans(sites),))
    axes = figures.readability(record, "cue").get_subplot(1, 1)
    assert list(axes.xaxis.ticktext) == ["cue", "last", "policy"]
    assert list(axes.yaxis.ticktext) == [f"layer {layer}" for layer in range(12)]


def make_spans(sites: tuple[Site, ...]) -> Readout:
    readout = make_readout("cue", make_sites())
    column = make_column([0.9] * len(sites))
    empty = tuple(None for _ in sites)
    changes = dict.fromkeys(("before", "after", "carried"), column) | dict.fromkeys(("untrained", "shuffled"), empty)
    return readout.model_copy(update=changes)


def test_erasure_puts_use_beside_readability():
    record = make_probing()
    figure = figures.erasure(record, ("A", "B"))
    traces = {trace.name: trace for trace in panel(figure, 1, 1)}
    assert len(traces["random directions"].x) == 3 * len(record.erased)
    heads = [each for each in record.erased if each.site.component == "z"]
    assert list(traces["heads"].x) == [each.readable.value for each in heads]
    assert list(traces["heads"].y) == [1 - each.left.value for each in heads]
    assert list(traces["heads"].error_y.array) == pytest.approx([each.left.value - each.left.low for each in heads])
    assert traces["where the cue reader reads"].y[0] == pytest.approx(0.99)
    assert traces["readable, unused"].y[0] == pytest.approx(0.005)
    named = [a.text for a in figure.layout.annotations]
    assert any("L0.resid_pre@0" in text for text in named)
    assert any("Reading is not use" in text for text in named)


def test_erasure_shows_what_the_policy_does_under_each_cue():
    record, cues = make_probing(cues=("A", "B")), ("Z", "A", "B")
    figure = figures.erasure(record, cues)
    traces = {trace.name: trace for trace in panel(figure, 1, 2)}
    assert list(traces["cue A"].x) == pytest.approx([0.996, 0.515, 1.0075])
    assert traces["cue B"].marker.color == figures.cue_colour("B", cues)
    assert list(traces["cue Z"].x) == [None] * 3
    rows = figure.get_subplot(1, 2).yaxis.ticktext
    assert rows[1].endswith("left 0.01 [−0.01, 0.03]<br>random 0.97 to 1.01")


def test_erasure_without_an_unused_site_or_without_any():
    assert len(figures.erasure(make_probing(unused=None), ("A", "B")).get_subplot(1, 2).yaxis.ticktext) == 2
    alone = figures.erasure(make_probing(used=None, unused=None), ("A", "B"))
    assert {trace.xaxis for trace in alone.data} == {"x"}


def test_subspaces_draw_both_nulls_and_both_checkpoints():
    record = make_probing()
    figure = figures.subspaces(record)
    traces = {trace.name: trace for trace in figure.data}
    cue, selector = record.subspaces
    assert list(traces["the subspace"].x) == [
        of.accuracy[side].value for of in (cue, selector) for side in ("before", "after")
    ]
    assert list(traces["random subspaces"].x) == [v for of in (cue, selector) for s in of.random for v in of.random[s]]
    assert list(traces["learnt on shuffled labels"].x)[:4] == [0.49, 0.51, 0.6, 0.55]
    assert list(traces["the model itself on the source"].x) == [1.0, 0.99, 1.0, 0.99]
    assert list(figure.layout.yaxis.ticktext)[3].startswith(
        "<b>selector (hint)</b>, R (after)<br>L0.resid_mid@policy, 2"
    )
    assert figure.layout.annotations[1].text == "0.39<br>[0.36, 0.42]"


def test_shifts_are_written_beyond_their_null_alone():
    record = make_probing()
    figure = figures.shifts(record)
    cosine, along = (panel(figure, 1, j)[0] for j in (1, 2))
    found = {(each.site.layer, each.site.position): each for each in record.shifts}
    places = [*range(8), "hint", "last"]
    assert list(cosine.z[1]) == [found[1, p].cosine.value for p in places]
    assert list(along.z[2]) == [found[2, p].along.value for p in places]
    assert list(cosine.text[0]) == [*[""] * 7, "0.30", "", "0.30"]
    assert "null 0.120" in cosine.hovertext[0][0]
    assert list(figure.get_subplot(1, 1).xaxis.ticktext)[-2:] == ["hint", "last"]


def test_names_of_probing_are_shown_literally():
    record = make_probing(HOSTILE, ("<A>", HOSTILE))
    drawn = [
        figures.readable(record),
        figures.readability(record, "hint"),
        figures.erasure(record, ("<A>", HOSTILE)),
        figures.subspaces(record),
        figures.shifts(record),
    ]
    for figure in drawn:
        text = json.dumps(figure.to_plotly_json(), default=list, ensure_ascii=False)
        assert not re.search(r"</?script|<A>|<[0-9]|<- ", text)


def test_what_was_not_measured_is_no_point():
    bare = make_subspace("cue").model_copy(update={"accuracy": {"before": around(0.9), "after": NOT_MEASURED}})
    assert list(figures.subspaces(make_probing(subspaces=(bare,))).layout.yaxis.tickvals) == [0]
    erased = (ErasedSite(site=USED, readable=Interval(), left=around(0.5), random=(1.0,)),)
    figure = figures.erasure(make_probing(erased=erased, used=None, unused=None), ("A", "B"))
    assert [list(trace.x) for trace in figure.data] == [[]]
