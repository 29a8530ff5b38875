"""Every probe keeps the contract: stated beforehand, quick, same numbers from the same seed, a record that lasts."""

from __future__ import annotations

import ast
import functools
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_figure_features import make_change, make_features, make_score, make_table, make_terms

from mixturelens import pipeline
from mixturelens.features.record import FeatureRecord, SiteChange, Table
from mixturelens.grafting.record import Effects, GraftRecord
from mixturelens.lab import runs
from mixturelens.models import Pair
from mixturelens.probing.record import Column, ProbingRecord
from mixturelens.types import InputError, Interval
from probes.contract import Answer, Probe, ProbeRecord, all_probes, every, main, more, over, places, some, under

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "artifacts" / "reference"
PROBES = all_probes()

each = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)


@functools.cache
def first(name: str) -> tuple[ProbeRecord, float]:
    start = time.process_time()
    return PROBES[name].run(REFERENCE, seed=0), time.process_time() - start


def test_names_are_those_of_the_files():
    files = {file.stem for file in (ROOT / "probes").glob("*.py")} - {"__init__", "contract"}
    assert set(PROBES) == files
    assert len({probe.HYPOTHESIS for probe in PROBES.values()}) == len(PROBES)
    assert len(PROBES) >= 10


@each
def test_states_beforehand_what_it_will_be_judged_by(probe: Probe):
    for text in (probe.HYPOTHESIS, probe.PREDICTION, probe.CONTROL):
        assert len(text.split()) >= 8
        assert text.endswith(".")
    record, _ = first(probe.NAME)
    assert (record.name, record.hypothesis) == (probe.NAME, probe.HYPOTHESIS)
    assert (record.prediction, record.control) == (probe.PREDICTION, probe.CONTROL)


@each
def test_answers_for_every_pair_with_numbers_and_controls(probe: Probe):
    record, seconds = first(probe.NAME)
    assert set(record.answers) == {"sft--rl-A", "sft--rl-B"}
    assert record.holds == every(answer.holds for answer in record.answers.values())
    assert record.finding.endswith(".")
    for answer in record.answers.values():
        assert answer.outcome
        assert answer.control
        assert all(value.measured for value in {**answer.outcome, **answer.control}.values())
        assert sum(value.low is not None for value in answer.outcome.values()) >= 2
    assert seconds < 60  # of the processor, whoever shares it: a few


@pytest.mark.slow
@each
def test_same_seed_same_numbers(probe: Probe):
    record, _ = first(probe.NAME)
    assert probe.run(REFERENCE, seed=0) == record


@each
def test_record_comes_back_from_a_file(probe: Probe, tmp_path: Path):
    record, _ = first(probe.NAME)
    assert ProbeRecord.load(record.save(tmp_path / "probe.json")) == record


@each
def test_refuses_what_is_no_run(probe: Probe, tmp_path: Path):
    with pytest.raises(InputError, match=r"spec\.json"):
        probe.run(tmp_path)


def test_the_tag_is_read_by_two_heads_in_one_direction_and_by_one_in_the_other():
    """Where two heads share the work the prediction fails, and its own numbers say so."""
    record, _ = first("one_head_reads_the_tag")
    two, one = record.answers["sft--rl-A"], record.answers["sft--rl-B"]
    assert (record.holds, two.holds) == (False, False)
    assert set(two.sites) == {"L0.z.2@policy", "L0.z.3@policy"}
    assert two.outcome["the head alone"].below(0.9)
    assert two.outcome["as few heads as needed"].above(0.99)
    assert one.sites == ("L0.z.0@policy",)
    assert one.outcome["the head alone"].above(0.95)


def test_the_hint_is_read_where_rl_moved_the_most():
    """The first head is the same in both directions; the ranks of the others say less than chance would need."""
    record, _ = first("selector_reads_the_hint")
    for answer in record.answers.values():
        assert answer.sites[0] == "L2.z.0@last"
        assert answer.outcome["undone at it, less at the best other head"].above(0.3)
        assert answer.control["agreement with the hint less with the cue"].above(0.5)
    assert record.holds is False


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["probe", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main(PROBES["one_head_reads_the_tag"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1


# --- what is read off records -----------------------------------------------------------------------------------------

PAIR = runs.run_pairs(REFERENCE)[0]


def sure(value: float) -> Interval:
    return Interval(value=value, low=value - 0.01, high=value + 0.01)


@pytest.fixture
def answer_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """(name of a probe, what to change in the record of the first pair of the reference) -> its answer."""

    def answer(name: str, **changes: object) -> Answer:
        for what in ("probe", "graft"):
            record = getattr(pipeline, what)(PAIR)
            known = {key: value for key, value in changes.items() if key in type(record).model_fields}
            changed = record.model_copy(update=known)
            monkeypatch.setattr(pipeline, what, lambda _, changed=changed, **__: changed)
        monkeypatch.setattr(runs, "run_pairs", lambda _: [PAIR])
        return PROBES[name].run(REFERENCE).answers[PAIR.name]

    return answer


@pytest.fixture(scope="module")
def probing() -> ProbingRecord:
    return pipeline.probe(PAIR)


@pytest.fixture(scope="module")
def graft() -> GraftRecord:
    return pipeline.graft(PAIR)


def test_a_wrong_prediction_is_a_result_and_no_error_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The unembedding of the reference is frozen in RL, so that it cannot carry anything."""
    out, name = tmp_path / "record.json", "the_unembedding_chooses"
    monkeypatch.setattr(sys, "argv", ["probe", str(REFERENCE), "--out", str(out)])
    with monkeypatch.context() as anew:  # what `python -m` does, where libraries are there already
        anew.delitem(sys.modules, f"probes.{name}")
        runpy.run_module(f"probes.{name}", run_name="__main__", alter_sys=True)
    done = capsys.readouterr()
    assert done.err == ""
    assert "holds: no. In sft--rl-A the unembedding alone carries 0.000" in done.out
    record = ProbeRecord.load(out)
    assert record == first(name)[0]
    assert record.holds is False
    for answer in record.answers.values():
        assert answer.outcome["carried by the unembedding"] == Interval(value=0.0, low=0.0, high=0.0)
        assert answer.control["attributed to the largest other component"].above(0.1)


def test_the_tag_is_used_at_the_tag_and_left_unused_elsewhere():
    for answer in first("the_tag_is_readable_where_nothing_uses_it")[0].answers.values():
        assert answer.holds is True
        assert answer.sites[1] == "L0.resid_pre@cue"
        assert answer.sites[0] != answer.sites[1]


def test_the_choice_is_noise_and_the_hint_is_not():
    for answer in first("the_choice_cannot_be_read_before_it_is_made")[0].answers.values():
        assert answer.holds is True
        assert len(answer.sites) == 3


def test_the_subspace_of_the_tag_goes_on_working():
    for answer in first("the_reader_survives_rl")[0].answers.values():
        assert answer.holds is True
        assert answer.outcome["interchange accuracy in R"].value > 0.999
        assert answer.outcome["interchange accuracy in R"].above(0.96)  # a hundred questions show no more


def test_no_one_feature_carries_the_tag():
    """The prediction fails: the tag is spread over several features, as it is over neurons."""
    record, _ = first("one_feature_carries_the_tag")
    for answer in record.answers.values():
        assert answer.holds is False
        assert answer.outcome["best feature"].below(0.5)
        assert answer.outcome["best neuron"].below(0.5)
        assert answer.outcome["best probe direction"].above(0.9)


def test_rl_moves_features_of_the_selector_alone():
    record, _ = first("rl_moves_features_of_the_selector")
    for answer in record.answers.values():
        assert answer.holds is True
        assert answer.outcome["specialists by the features"].below(0.01)
        assert answer.sites[0] == "L2.mlp_out"


def test_no_component_alone_is_enough_on_the_reference():
    """Redundant, but less than foretold: the strongest component carries most of the change, and not 0.9 of it."""
    for answer in first("one_component_suffices_and_none_is_needed")[0].answers.values():
        assert answer.holds is False
        assert answer.outcome["carried by the best component alone"].above(0.7)
        assert answer.outcome["left without the one that is missed most"].above(0.9)


UNKNOWN = {
    "the_tag_is_readable_where_nothing_uses_it": {"used": None, "unused": None, "erased": ()},
    "the_reader_survives_rl": {"subspaces": ()},
    "one_component_suffices_and_none_is_needed": {"components": (), "factorial": None},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_was_not_measured_is_unknown(name: str, answer_of: Callable[..., Answer]):
    found = answer_of(name, **UNKNOWN[name])
    assert found.holds is None
    assert not any(value.measured for value in (*found.outcome.values(), *found.control.values()))


def test_unchanged_routing_has_no_share(graft: GraftRecord, answer_of: Callable[..., Answer]):
    nothing = graft.after.model_copy(update={"routing": Interval()})
    found = answer_of("the_unembedding_chooses", after=nothing, components=())
    assert found.holds is None
    assert not any(value.measured for value in found.outcome.values())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("the_choice_cannot_be_read_before_it_is_made", {"readouts": ()}),
        ("rl_makes_neutral_prompts_look_hinted", {"shifts": ()}),
    ],
)
def test_a_suite_without_hints_is_refused(name: str, changes: dict, answer_of: Callable[..., Answer]):
    with pytest.raises(InputError, match="sft--rl-A: no "):
        answer_of(name, **changes)


def test_a_tag_that_is_used_wherever_it_is_read_refutes(probing: ProbingRecord, answer_of: Callable[..., Answer]):
    name = "the_tag_is_readable_where_nothing_uses_it"
    used = tuple(each.model_copy(update={"left": sure(0.2)}) for each in probing.erased)
    assert answer_of(name, unused=None, erased=used).holds is False
    crossing = tuple(
        each.model_copy(update={"left": Interval(value=0.9, low=0.8, high=1.0)}) for each in probing.erased
    )
    assert answer_of(name, unused=None, erased=crossing).holds is None


def test_random_erasures_that_harm_refute(probing: ProbingRecord, answer_of: Callable[..., Answer]):
    assert probing.used is not None
    harmful = probing.used.model_copy(update={"random": (0.3, 0.4, 0.95)})
    found = answer_of("the_tag_is_readable_where_nothing_uses_it", used=harmful)
    assert found.holds is False
    assert found.control["left by a random erasure where it is used"] == Interval(value=0.4)


def test_a_readable_choice_refutes(probing: ProbingRecord, answer_of: Callable[..., Answer]):
    def read(score: float) -> Column:
        number = len(probing.sites)
        return Column(value=(score,) * number, low=(score - 0.01,) * number, high=(score + 0.01,) * number)

    def readouts(**scores: float):
        return tuple(
            each.model_copy(update={"before": read(scores[each.target])} if each.target in scores else {})
            for each in probing.readouts
        )

    name = "the_choice_cannot_be_read_before_it_is_made"
    assert answer_of(name, readouts=readouts(policy=0.8)).holds is False
    assert answer_of(name, readouts=readouts(policy=0.5)).holds is False  # the control: not even at its announcement
    assert answer_of(name, readouts=readouts(hint=0.7)).holds is False


@pytest.mark.parametrize(
    ("last", "question", "holds"), [(0.8, 0.3, True), (0.8, 0.9, False), (0.3, 0.1, False), (0.5, 0.1, None)]
)
def test_a_shift_is_held_against_the_question(
    last: float, question: float, holds: bool | None, probing: ProbingRecord, answer_of: Callable[..., Answer]
):
    at = places(PAIR)["last"]
    planted = tuple(
        each.model_copy(update={"cosine": sure(last if each.site.position in at else question), "null": 0.2})
        for each in probing.shifts
    )
    assert answer_of("rl_makes_neutral_prompts_look_hinted", shifts=planted).holds is holds


@pytest.mark.parametrize(
    ("alone", "without", "noise", "holds"),
    [
        (0.95, 0.97, 0.02, True),
        (0.95, 0.5, 0.02, False),
        (0.5, 0.97, 0.02, False),
        (0.95, 0.97, -0.3, False),
        (0.9, 0.97, 0.02, None),
    ],
)
def test_one_component_and_its_nulls(
    alone: float,
    without: float,
    noise: float,
    holds: bool | None,
    graft: GraftRecord,
    answer_of: Callable[..., Answer],
):
    def share(effects: Effects, value: float) -> Effects:
        return effects.model_copy(update={"weight": sure(value)})

    components = tuple(
        each.model_copy(
            update={
                "suffices": share(each.suffices, alone if number == 0 else 0.1),
                "without": share(each.without, without if number == 1 else 0.99),
            }
        )
        for number, each in enumerate(graft.components)
    )
    assert graft.factorial is not None
    factorial = graft.factorial.model_copy(
        update={
            "selector": (components[0].name,),
            "selector_only": share(graft.factorial.selector_only, alone),
            "noise": tuple(share(each, noise if k == 2 else 0.0) for k, each in enumerate(graft.factorial.noise)),
        }
    )
    found = answer_of("one_component_suffices_and_none_is_needed", components=components, factorial=factorial)
    assert found.holds is holds
    assert found.sites == (components[0].name, components[1].name)


def test_an_unembedding_that_chooses(graft: GraftRecord, answer_of: Callable[..., Answer]):
    """As where RL moves it alone: it carries all, and the rest of what changed nothing."""
    change = [path.change for path in graft.path if path.metric.startswith("routing@")]
    mean = sum(change) / len(change)
    one, other = graft.components[:2]
    whole = one.suffices.model_copy(update={"routing": sure(0.99)})
    parts = (
        other.model_copy(update={"routing": sure(0.0)}),
        one.model_copy(update={"name": "unembed", "suffices": whole, "routing": sure(mean)}),
    )
    found = answer_of("the_unembedding_chooses", components=parts)
    assert found.holds is True
    assert found.outcome["attributed to the unembedding"].value == pytest.approx(1.0)
    assert found.sites == ("unembed", other.name)


# --- what is read off records of features -----------------------------------------------------------------------------


@pytest.fixture
def said_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, FeatureRecord], Answer]:
    """(name of a probe, the record of the one pair) -> its answer."""

    def answer(name: str, record: FeatureRecord) -> Answer:
        monkeypatch.setattr(pipeline, "decompose", lambda *_, **__: record)
        monkeypatch.setattr(runs, "run_pairs", lambda _: [PAIR])
        found = PROBES[name].run(REFERENCE)
        assert found.finding.endswith(".")
        return found.answers[PAIR.name]

    return answer


def carries(feature: float, neuron: float, margin: float) -> Table:
    """What the best feature and the best neuron move, and by how much the feature exceeds every random one."""
    made = {"feature": (feature, margin), "neuron": (neuron, 0.0)}
    scores = [
        make_score(kind, True).model_copy(
            update={"patch": sure(value), "margin": sure(least), "random": (0.0, value - least)}
        )
        for kind, (value, least) in made.items()
    ]
    return make_table("cue", scores=(*scores, make_score("head", True), make_score("direction", True)))


@pytest.mark.parametrize(
    ("feature", "neuron", "margin", "holds"),
    [
        (0.9, 0.1, 0.5, True),
        (0.9, 0.1, 0.05, False),  # a random feature does nearly as much
        (0.9, 0.95, 0.5, False),  # a neuron does more
        (0.3, 0.1, 0.2, False),
        (0.9, 0.895, 0.5, None),
        (0.505, 0.1, 0.3, None),
    ],
)
def test_a_feature_carries_the_tag_where_no_neuron_and_no_random_one_does(
    feature: float, neuron: float, margin: float, holds: bool | None, said_of: Callable[[str, FeatureRecord], Answer]
):
    record = make_features(tables=(carries(feature, neuron, margin), make_table("selector")))
    found = said_of("one_feature_carries_the_tag", record)
    assert found.holds is holds
    assert found.outcome["best feature"] == sure(feature)
    assert found.outcome["best neuron"] == sure(neuron)
    assert found.control["best random feature"].value == pytest.approx(max(0.0, feature - margin))
    assert found.sites == ("L1.resid_pre@policy feature 17", "L0.neurons.101@policy")


def moves(routing: float, specialists: float, random: float) -> SiteChange:
    """Of 0.4 bits of routing and as much of what policies do that all of R's activations bring."""
    nothing = make_terms(random, 0.0, 0.0)
    return make_change(
        together=make_terms(routing, specialists, 0.0), whole=make_terms(0.4, 0.4, 0.0), random=(nothing,) * 3
    )


@pytest.mark.parametrize(
    ("routing", "specialists", "random", "holds"),
    [
        (0.35, 0.001, 0.05, True),
        (0.1, 0.001, 0.05, False),
        (0.35, 0.1, 0.05, False),  # what policies do changes as well
        (0.35, 0.001, 0.38, False),  # and random ones bring as much
        (0.202, 0.001, 0.05, None),
        (0.35, 0.0045, 0.05, None),
    ],
)
def test_features_of_the_selector_bring_routing_alone(
    routing: float,
    specialists: float,
    random: float,
    holds: bool | None,
    said_of: Callable[[str, FeatureRecord], Answer],
):
    record = make_features(changes=(moves(routing, specialists, random),))
    found = said_of("rl_moves_features_of_the_selector", record)
    assert found.holds is holds
    assert found.control["routing by the best random set"] == Interval(value=random)
    assert found.sites[:2] == ("L1.resid_pre@policy", "feature 17")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("one_feature_carries_the_tag", make_features(tables=())),
        ("one_feature_carries_the_tag", make_features(tables=(make_table("cue", kinds=("head", "neuron")),))),
        ("one_feature_carries_the_tag", make_features(tables=(make_table("selector"),))),
        ("rl_moves_features_of_the_selector", make_features(changes=())),
    ],
)
def test_features_that_were_not_measured_are_unknown(
    name: str, record: FeatureRecord, said_of: Callable[[str, FeatureRecord], Answer]
):
    found = said_of(name, record)
    assert found.holds is None
    assert not all(value.measured for value in found.outcome.values())
    assert not any(value.measured for value in found.control.values())


# --- words of the contract --------------------------------------------------------------------------------------------


def test_places_are_tokens_and_spans():
    found = places(PAIR)
    assert found["cue"] == ("cue", 0)
    assert found["last"] == ("last", 7)
    assert found["question"] == ("question", 2, 3, 4, 5, 6)


def test_places_through_a_chat_template(pairs: Path):
    folder = pairs / "chat"
    after = next(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != "S")
    found = places(Pair(folder / "S", after, folder / "suite.yaml"))
    name, last = found["last"]
    assert name == "last"
    assert isinstance(last, int)
    assert all(isinstance(at, str) or at <= last for tokens in found.values() for at in tokens)


def test_states():
    assert (every([]), some([])) == (True, False)
    assert some([None, True]) is True
    assert some([None, False]) is None
    assert (over(sure(0.5), 0.4), under(sure(0.5), 0.4), over(sure(0.4), 0.4)) == (True, False, None)
    assert (more(sure(0.5), sure(0.4)), more(sure(0.4), sure(0.5)), more(sure(0.4), sure(0.41))) == (True, False, None)
    assert more(Interval(), sure(0.5)) is None


def test_the_package_never_imports_a_probe():
    for file in (ROOT / "mixturelens").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not any(name.split(".")[0] in ("probes", "scripts") for name in names), file
