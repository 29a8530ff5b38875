"""The page says what the records say, holds everything it needs and runs nothing that it was told."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_figure_features import make_card, make_features, make_score
from test_figure_grafting import make_effects, make_graft, make_mechanism
from test_figure_patching import make_circuit, make_circuit_record, make_patching, make_repair, make_verified
from test_figure_probing import make_probing
from test_figures import HOSTILE, around, make_pair, make_trajectory

from mixturelens import figures
from mixturelens.behaviour.record import Bits
from mixturelens.features.record import FiringExample
from mixturelens.grafting.record import Null
from mixturelens.pages import Findings, Grown, evidence, features, mechanism, write_report
from mixturelens.pages.parts import Pictures
from mixturelens.pages.reading import reading
from mixturelens.routing.circuit import CircuitRecord, RoutingCircuit
from mixturelens.types import Interval


class Page(HTMLParser):
    """Tags, attributes, scripts and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.source = text
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def write(path: Path, hostile: bool = False, mechanism: bool = False, **changes) -> str:
    """A page of two pairs, of which only one was watched along training; with `mechanism`, the first was patched."""
    words = HOSTILE if hostile else ""
    policies = (HOSTILE, "<img src=http://x.invalid/y onerror=alert(1)>") if hostile else ("a", "b")
    cues = ("<A>", HOSTILE) if hostile else ("A", "B")
    found = [
        Findings(f"watched {words}", *make_pair(policies, cues, words=words)),
        Findings(f"outside {words}", *make_pair(policies, cues, after="R@2", wordings=2, named=False, words=words)),
    ]
    if mechanism:
        judged = found[0].verdict.model_copy(update={"mechanism": make_mechanism(words, agrees=False)})
        found[0] = replace(
            found[0],
            verdict=judged,
            patching=make_patching(words, cues),
            repair=make_repair(words, cues, policies),
            circuit=make_circuit_record(words),
            probing=make_probing(words, cues),
            graft=make_graft(words, cues, policies),
            features=make_features(words, cues),
        )
    found[0] = replace(found[0], **changes)
    trajectories = (make_trajectory(policies, cues, "sft", rl=False), make_trajectory(policies, cues, f"rl-{words}A"))
    grown = Grown(words or "A title", f"name: {words or 'default'}", words or "A note.", trajectories)
    assert write_report(path, found, grown) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The page with everything on it, written once."""
    return write(tmp_path_factory.mktemp("report") / "report.html", mechanism=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """The page without instruments."""
    return write(tmp_path_factory.mktemp("plain") / "report.html")


def test_page_tells_the_story_in_order(plain):
    text = plain
    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections == ["answer", "headline", "numbers", "split", "policies", "trajectories", "controls", "method"]


def test_page_says_what_the_records_say(plain):
    page = Page(plain)
    record, verdict = make_pair()
    assert verdict.reason in page.text
    assert figures.show_interval(verdict.routing_share) in page.text
    before = record.per_cue["B"].before
    for key in ("weights.a", "accuracy.b", "overall"):
        assert figures.show(before.intervals[key].value) in page.text
    answer = page.text[page.text.index("Selector") : page.text.index("What happened")]
    words = " ".join(answer.split())
    assert words.startswith("Selector changed which policy is expressed Cue reader cannot say")
    assert "Skill unchanged" in words
    assert "Silent specialists not intact" in words
    assert "Text drifted how completions are worded: 0.0312 [0.0212, 0.0412] nats per token" in words
    assert "routing share = routing / (routing + specialist)" in page.text


def test_bits_are_shown_and_nats_are_folded_away(whole):
    shown, folded = section(whole, "split").split("The same change in nats, by the chain rule")
    bits = make_pair()[1].bits
    assert f"routing {figures.show(bits.routing.value, 4)} 0.0990 to 0.1010 0.2000" in shown
    for name in ("specialist", "conditioning", "skill", "dormant"):
        assert f" {name} {figures.show(getattr(bits, name).value, 4)} " in shown
    assert not any(f" {name} 0" in shown for name in ("text", "wording", "other", "total"))
    for name in ("routing", "specialist", "conditioning", "skill", "text", "wording", "other", "total"):
        assert f" {name} {figures.show(getattr(make_pair()[1].nats, name).value, 4)} " in folded
    (details,) = re.findall(r"<details>.*?</details>", section_html(whole, "split"), re.DOTALL)
    assert "chain rule" in details


@pytest.mark.parametrize(
    ("samples", "value", "state"),
    [
        (None, Interval(value=1e-9, low=0.0, high=1e-9), "yes"),
        (None, Interval(value=0.001, low=0.0, high=0.002), "no"),
        (8, Interval(value=0.006, low=0.001, high=0.011), "yes"),
        (8, Interval(value=0.02, low=0.006, high=0.03), "no"),
        (8, Interval(), "not measured"),
    ],
)
def test_the_same_checkpoint_is_zero_or_not_surely_more_where_samples_say(tmp_path, samples, value, state):
    """Bits from samples have intervals of their own, which a checkpoint against itself must not leave."""
    record, verdict = make_pair()
    null = verdict.controls.pair.same_checkpoint.model_copy(update=dict.fromkeys(Bits.model_fields, value))
    controls = verdict.controls.pair.model_copy(update={"same_checkpoint": null})
    seen = verdict.model_copy(update={"controls": verdict.controls.model_copy(update={"pair": controls})})
    found = Findings("pair", record.model_copy(update={"samples": samples}), seen)
    text = write_report(tmp_path / "report.html", [found], Grown("A title")).read_text(encoding="utf-8")
    row = re.findall(r'<tr><th scope="row">Same checkpoint</th>(.*?)</tr>', text, re.DOTALL)[0]
    must, shown, holds = (" ".join(Page(cell).text.split()) for cell in row.split("<td>")[1:])
    assert must.endswith("must be zero." if samples is None else "under 0.005 bits, or not surely more.")
    assert (shown == figures.DASH) is (state == "not measured")
    assert holds == state


def test_what_was_not_measured_is_a_dash(tmp_path):
    words = " ".join(Page(write(tmp_path / "report.html")).text.split())
    assert f"Router share {figures.DASH}" in words
    assert f"Mechanism {figures.DASH} not measured for this pair" in words
    assert f"put in place 0.800 0.790 to 0.810 {figures.DASH} 0.750 0.740 to 0.760 {figures.DASH}" in words
    assert (
        f"conditioning {figures.DASH} {figures.DASH} {figures.DASH}" in words
    )  # the suite of the outside pair names no behaviours


def test_controls_say_whether_they_hold(tmp_path):
    text = write(tmp_path / "report.html")
    for name, measured, state in (
        ("Same checkpoint", "all terms 0 bits", "yes"),
        ("Noise", "0.7000 [0.6900, 0.7100] bits; noise: 0.0200; R's are 35 times that of noise", "yes"),
        ("Shuffled labels", figures.DASH, "not measured"),
        ("Independent sum", "0.400 [0.390, 0.410] nats", "no"),
        ("Random components", figures.DASH, "not measured"),
    ):
        (row, *_) = re.findall(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', text, re.DOTALL)
        _, shown, holds = (Page(cell).text.strip() for cell in row.split("<td>")[1:])
        assert shown.startswith(measured)
        assert holds == state


@pytest.mark.parametrize(
    ("noise", "word", "holds"),
    [(0.3, "both", "yes"), (0.4, "both", "no"), (None, "both", "not measured"), (0.4, "neither", "not measured")],
)
def test_noise_of_the_size_of_the_change_must_do_less(tmp_path, noise: float | None, word: str, holds: str):
    record, verdict = make_pair()
    null = None if noise is None else Bits(**dict.fromkeys(Bits.model_fields, around(noise)))
    controls = verdict.controls.pair.model_copy(update={"noise": null})
    seen = {"verdict": word, "controls": verdict.controls.model_copy(update={"pair": controls})}
    found = Findings("pair", record, verdict.model_copy(update=seen))
    text = write_report(tmp_path / "report.html", [found], Grown("A title")).read_text(encoding="utf-8")
    row = re.findall(r'<tr><th scope="row">Noise</th>(.*?)</tr>', text, re.DOTALL)[0]
    assert Page(row.split("<td>")[3]).text.strip() == holds
    times = {0.3: "1.2 times", 0.4: "0.9 times"}.get(noise or 0)
    moved = section(text, "answer").split("Moved")[1]
    assert (f"routing + specialist; {times} that of noise" in moved) is (times is not None)


def test_page_says_where_the_router_is(whole):
    text = whole
    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections[4:11] == ["policies", "router", "reading", "weights", "features", "mechanism", "repair"]
    words = section(text, "router")
    assert "cue S (before) L0.z.1@policy 0.910 0.900 to 0.920 0.400 0.390 to 0.410 L1.z.0@policy yes" in words
    assert "R (after) L0.z.1@policy 0.910 0.900 to 0.920 0.400 0.390 to 0.410 L1.z.0@policy cannot say" in words
    for title in ("The cue reader", "The selector", "What the reader heads look at", "The routing circuit"):
        assert title in words
    assert "What undoes training" not in words, "S was not patched into R"
    assert words.count("What would falsify it") == 4


def test_the_page_says_which_slopes_exact_patching_refutes():
    def caption(circuit: RoutingCircuit) -> str:
        found = Findings("pair", *make_pair(), circuit=CircuitRecord(circuits=(circuit,), overlaps=()))
        return mechanism.where(found, 1, Pictures()).groups[0].pictures[0].caption

    said = caption(make_verified())
    assert "S (before): 1 of 2 heads and MLPs move at least 0.01" in said
    assert said.endswith("slopes alone speak for L0.h1 (slopes 0.200, patched 0.001, needed 0), drawn dotted.")
    assert caption(make_circuit()).endswith("yellow: S and R differ.")  # of a record from before they were patched


@pytest.mark.slow
def test_sections_of_the_mechanism_appear_only_with_their_records(tmp_path):
    text = write(tmp_path / "report.html", mechanism=True, repair=None, patching=None, probing=None, graft=None)
    assert 'id="repair"' not in text
    assert "The cue reader" not in section(text, "router")
    assert "The routing circuit" in section(text, "router")
    text = write(tmp_path / "report.html", mechanism=True, patching=None, circuit=None, probing=None, graft=None)
    assert 'id="router"' not in text
    assert 'id="repair"' in text


def test_sections_of_the_evidence_appear_only_with_their_records(tmp_path):
    nothing = dict.fromkeys(("patching", "repair", "circuit", "graft", "features"))
    bare = make_probing(readouts=(), erased=(), used=None, unused=None, subspaces=(), missing=("no probes",))
    text = write(tmp_path / "report.html", mechanism=True, **nothing, probing=bare)
    words = section(text, "reading")
    assert "Do neutral prompts look hinted?" in words
    assert words.count("What would falsify it") == 1
    assert words.endswith("Not measured, or in part: no probes.")
    assert not {"weights", "router", "repair", "features"} & set(re.findall(r'<section id="(\w+)">', text))
    assert "Random weights" not in text
    text = write(tmp_path / "report.html", graft=make_graft(components=(), placed=(), rollback=None))
    assert 'id="mechanism"' not in text
    words = section(text, "weights")
    assert "Selector and rest, two by two" in words
    assert words.count("What would falsify it") == 1
    assert "Rollback" not in words


def test_page_says_what_is_read_and_what_is_used(whole):
    words = section(whole, "reading")
    titles = ("What can be read where", "Reading is not use", "The subspace that carries it", "Do neutral prompts")
    assert [words.index(title) for title in titles] == sorted(words.index(title) for title in titles)
    assert words.count("What would falsify it") == 4
    assert "Used where the cue reader reads: L0.resid_pre@0; readable but unused: L2.resid_post@8." in words
    for name in ("used", "unused"):
        assert f"Manipulation check where the cue is {name}: it is erased (left of its gap on questions" in words
    lacking = reading("x", make_probing(unused=None, readouts=()), ("A", "B"), Pictures())
    assert "No site was found where the cue is surely erased and unused" in lacking.groups[0].pictures[0].caption


def test_page_says_which_weights_changed_it(whole):
    words = section(whole, "weights")
    assert words.count("What would falsify it") == 4
    assert "Selector: L0.attn, the fewest parts" in words
    assert "the fewest parts without which it chooses as S does (L0.attn), and nothing trained. It is" in words
    assert "plain checkpoint: rl-A-rollback. Expected accuracy" in words
    assert "B 0.500 0.490 to 0.510 0.020 0.010 to 0.030 0.610 0.600 to 0.620" in words
    assert "routing@A 5.1000 5.1004 32" in words
    assert "Specialists: the same share" not in words, "no specialist changed"
    both = evidence.changing("x", make_graft(changed=True, method="forced texts", placed=()), Pictures())
    assert both.groups[0].pictures[2].caption.startswith("Specialists: the same share")
    assert both.forced


def test_mechanism_stands_beside_the_behavioural_verdict(whole):
    words = section(whole, "answer")
    assert "Grafts and features say: routing ; disagrees ." in words
    assert "Mechanism routing (disagrees with behaviour) from grafts" in words
    words = section(whole, "mechanism")
    assert "Mechanism: routing , behaviour: both ; it disagrees. Share of the choice: 0.990 [0.985, 0.995]." in words
    assert "all weights selector 0.270 0.260 to 0.280 0.004 changed S with all of R's weights" in words
    assert f"one part specialists 0.004 0.001 to 0.007 {figures.DASH} cannot say R's L1.mlp in S alone" in words


def test_mechanism_of_grafts_alone_and_of_none():
    _, verdict = make_pair()
    assert evidence.judged("x", verdict) is None
    mechanism = make_mechanism()
    lines = {name: line for name, line in mechanism.evidence.items() if line.source == "all weights"}
    alone = verdict.model_copy(update={"mechanism": mechanism.model_copy(update={"evidence": lines})})
    judged = evidence.judged("x", alone)
    assert judged is not None
    assert (judged.who, judged.agrees) == ("Grafts say", "agrees")
    assert [line.says for line in judged.lines] == ["changed", "unchanged"]


@pytest.mark.parametrize(("noise", "holds"), [(0.01, True), (0.99, False), (None, None)])
def test_random_weights_must_not_do_what_the_selector_does(noise, holds):
    record = make_graft()
    assert record.factorial is not None
    none = () if noise is None else (make_effects(noise), make_effects(0.0))
    changed = make_graft(factorial=record.factorial.model_copy(update={"noise": none}))
    control, _ = evidence.controls(changed, None)
    assert (control.name, control.holds) == ("Random weights", holds)
    assert control.measured.startswith(figures.DASH if noise is None else "0.274 [0.264, 0.284] bits; random: at most")


@pytest.mark.parametrize(
    ("null", "holds"),
    [((0.004, 0.0006), True), ((0.2, 0.1), None), ((None, None), None)],  # 0.28 bits moved
)
def test_noise_of_rs_size_stands_beside_what_r_does(null, holds):
    _, control = evidence.controls(make_graft(null=Null(chosen=null[0], done=null[1])), None)
    assert (control.name, control.holds) == ("Noise of R's size", holds)
    if holds:
        assert control.measured.startswith("choice 0.280 [0.270, 0.290] bits, noise 0.0040; what policies do ")
        assert control.measured.endswith(", noise 0.0006")
    assert (control.measured == figures.DASH) is (null[0] is None)


@pytest.mark.parametrize(("shuffled", "holds"), [(0.56, True), (0.999, False), (None, None)])
def test_probes_must_beat_shuffled_labels(shuffled, holds):
    record = make_probing()
    readout = record.readouts[0].model_copy(update={"shuffled_high": shuffled})
    found = evidence.controls(None, record.model_copy(update={"readouts": (readout,)}))
    assert [control.holds for control in found] == ([] if holds is None else [holds])
    if found:
        assert found[0].measured.startswith("AUROC 1.000 [0.980, 1.000] at L0.resid_pre@8; shuffled: 95% under")


def test_page_says_what_features_do(whole):
    words = section(whole, "features")
    assert "A sparse autoencoder (SAE) learns to write each activation as a sum of a few" in words
    titles = (
        "Do they describe",
        "Which unit",
        "One unit, clamped",
        "What training changed",
        "All units",
        "S and R in one",
    )
    assert [words.index(title) for title in titles] == sorted(words.index(title) for title in titles)
    assert words.count("What would falsify it") == 5
    assert "L1.resid_pre@policy 121 of 128 S (before) 0.993 7.9 0 0.991 0.987 to 0.995" in words
    assert "cue feature L1.resid_pre@policy feature 17 128 0.990 0.980 to 1.000 0.910 0.880 to 0.940" in words
    assert "White squares: the repairs of heads" in words
    assert words.endswith("against R. Whiskers: 95% bootstrap over questions.")
    assert "Not measured, or in part: hint: no site carries it." in words


def test_every_card_has_an_address_and_the_index_leads_to_it(whole):
    page = Page(whole)
    anchors = [name for name in page.ids if name.startswith("feature-")]
    assert anchors == ["feature-1-L1-resid_pre-policy-17", "feature-1-L1-resid_pre-policy-3"]
    assert [link for link in page.links if link.startswith("#feature-")] == [f"#{name}" for name in anchors]
    twins = features.featured("x", 2, make_features(cards=(make_card(), make_card(), make_card(1))), None, Pictures())
    assert [card.anchor[-4:] for card in twins.cards] == ["y-17", "7--2", "cy-1"]


def test_a_card_says_what_a_feature_tells_and_does(whole):
    (card, _) = re.findall(r'<article class="card".*?</article>', whole, re.DOTALL)
    words = " ".join(Page(card).text.split())
    assert words.startswith("L1.resid_pre@policy feature 17 best feature for the cue What it tells (AUROC)")
    assert f"cue 0.993 ; hint {figures.DASH} ; policy 0.510" in words
    assert "S (before) 0.061 3.10 R (after) 0.070 4.25" in words
    assert "Promotes next (nats) sorry +6.20 ␣ +0.30 <eos> +0.01 Suppresses next (nats) a −3.50 b −2.25" in words
    assert "the nearer its maximum of 4.00 here" in words
    tokens = re.findall(r'<span style="--shade: (.*?)" title="(.*?)">(.*?)</span>', card)
    assert tokens[:1] == [("0.00", "0", "&lt;B&gt;")]
    assert tokens[8:10] == [("1.00", "4.00", "[a]"), ("1.00", "4.00", "␣")]
    assert [shade for shade, _, text in tokens if text == "[a]"] == ["1.00", "0.50", "0.33"]


def test_cards_of_features_that_never_fire_or_read_linearly():
    silent = FiringExample(tokens=("a", "\n", ""), activations=(0.0, -1.5, 0.0))
    cards = (make_card(examples=(silent,)), make_card(examples=(), promotes=(), suppresses=(), auroc={}))
    found = features.featured("x", 1, make_features(cards=cards), None, Pictures()).cards
    assert [(token.text, token.shade, token.activation) for token in found[0].examples[0]] == [
        ("a", "0.00", "0"),
        ("⏎", "0.00", "−1.50"),
        ("␣", "0.00", "0"),
    ]
    assert (found[1].examples, found[1].most) == ([], "0")


def test_features_without_tables_changes_or_crosscoders(tmp_path):
    bare = make_features(saes=(), tables=(), changes=(), cards=(), crosscoders=(), missing=("no SAE",))
    text = write(tmp_path / "report.html", features=bare)
    words = section(text, "features")
    assert words.endswith("watched Not measured, or in part: no SAE.")
    assert "falsify" not in words
    assert "#feature-" not in "".join(Page(text).links)
    assert "Random features" not in text


@pytest.mark.parametrize(("margin", "holds"), [(0.3, True), (0.005, False), (None, None)])
def test_the_best_feature_must_beat_matched_random_ones(margin, holds):
    record = make_features()
    value = Interval() if margin is None else around(margin)
    score = make_score("feature", repaired=True).model_copy(update={"margin": value})
    table = record.tables[0].model_copy(update={"scores": (score,)})
    (control,) = features.controls(record.model_copy(update={"tables": (table,)}))
    assert (control.name, control.holds) == ("Random features", holds)
    assert control.measured.startswith("0.910 [0.880, 0.940] by L1.resid_pre@policy feature 17; margin ")
    assert features.controls(record.model_copy(update={"tables": ()})) == []
    assert features.controls(None) == []


def test_page_says_what_a_repair_brings_back_and_breaks(whole):
    words = section(whole, "repair")
    assert "interchange L0.z.1@policy <- that of cue A 0.890 0.880 to 0.900 −0.030 −0.040 to −0.020" in words
    assert "median 0.015, 0 of 4 reach the repair" in words
    damage = words[words.index("Damage") :]
    # not the cell that is meant to move, and not the one that stayed
    assert damage.endswith("interchange b A 0.125 → 0.750 answer −0.400 [−0.410, −0.390]")


@pytest.mark.parametrize(
    ("above", "p", "state"),
    [(0.0, 0.04, "yes"), (0.0, 0.2, "not measured"), (0.25, 0.4, "no"), (None, None, "not measured")],
)
def test_random_components_are_those_of_an_interchange(tmp_path, above, p, state):
    """Four places cannot give a p below 0.05, whatever they do."""
    record = make_repair(above=(above, None))
    first = record.repairs[0]
    places = first.random.places * (6 if p == 0.04 else 1)
    null = first.random.model_copy(update={"p": p, "places": places})
    record = record.model_copy(update={"repairs": (first.model_copy(update={"random": null}), *record.repairs[1:])})
    text = write(tmp_path / "report.html", repair=record)
    row = re.findall(r'<tr><th scope="row">Random components</th>(.*?)</tr>', text, re.DOTALL)[0]
    _, shown, holds = (" ".join(Page(cell).text.split()) for cell in row.split("<td>")[1:])
    assert holds == state
    assert shown.startswith(figures.DASH if above is None else "0.900 [0.890, 0.910]; random: ")


def section_html(text: str, name: str) -> str:
    return re.findall(rf'<section id="{name}">(.*?)</section>', text, re.DOTALL)[0]


def section(text: str, name: str) -> str:
    """The words of one section."""
    return " ".join(Page(section_html(text, name)).text.split())


def unpacked(page: Page, name: str) -> str:
    """What a script of the page holds, as the page itself unpacks it."""
    (packed,) = re.findall(rf'<script type="application/gzip" id="{name}">(.*?)</script>', page.source, re.DOTALL)
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_page_needs_no_network_and_holds_plotly_once(tmp_path):
    page = Page(write(tmp_path / "report.html"))
    assert not [link for link in page.links if not link.startswith(("data:", "#"))]
    assert unpacked(page, "plotly") == figures.plotly_script()
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    # two along RL, one before and after, two splits, two tables, two trajectories
    shown = [name for name in page.ids if name.startswith("figure-")]
    assert len(shown) == len(set(shown)) == len(json.loads(unpacked(page, "drawn"))) == 8


def test_a_page_that_people_send_each_other_is_small(whole):
    assert len(whole.encode()) < 5_000_000


def test_every_figure_says_how_to_read_it(whole):
    captions = re.findall(r"<figcaption.*?</figcaption>", whole, re.DOTALL)
    assert len(captions) == whole.count("<figure>")
    for number, caption in enumerate(captions, start=1):
        words = " ".join(Page(caption).text.split())
        assert re.match(rf"Figure {number}. How to read it: [^.]+[.:]", words), words


def test_the_page_begins_in_plain_words(whole):
    words = " ".join(Page(whole).text.split())
    top = words[: words.index("Selector changed")]
    assert "A language model can hold several ways of acting at once" in top
    assert "watched : training changed which policy is chosen, and what the policies do as well" in top
    assert "Under cue B right answers went from" in top


def test_pages_of_equal_records_are_equal(tmp_path):
    assert write(tmp_path / "one.html") == write(tmp_path / "two.html")


def test_hostile_names_stay_text(whole, tmp_path):
    usual, hostile = Page(whole), Page(write(tmp_path / "report.html", hostile=True, mechanism=True))
    assert hostile.tags == usual.tags
    assert hostile.links == usual.links
    assert HOSTILE in hostile.text
    assert not any(re.search(r"</?script|<img", script) for script in hostile.scripts)


def test_page_without_pairs_or_trajectories(tmp_path):
    text = write_report(tmp_path / "report.html", [], Grown("A title")).read_text(encoding="utf-8")
    assert "No pair of checkpoints was measured" in text
    assert re.findall(r'<section id="(\w+)">', text) == ["answer", "method"]


def test_a_failed_page_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> str:
        raise RuntimeError("no figure")

    monkeypatch.setattr(figures, "figure_json", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
