"""A record of a pair: what it says of known pairs, its controls, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mixturelens.behaviour.pair import behaviour_record, measure_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.models import Pair
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError


@pytest.fixture(scope="module")
def chat(pairs: Path) -> BehaviourRecord:
    folder = pairs / "chat"
    return behaviour_record(Pair(folder / "S", folder / "R", load_suite(folder)), suite_name="chat")


def test_a_pair_of_folders_becomes_a_record_that_survives_saving(pairs: Path, tmp_path: Path):
    folder, said = pairs / "llama", []
    pair = Pair(folder / "S", folder / "R-both", load_suite(folder))
    found = behaviour_record(pair, suite_name="s", seed=4, progress=said.append)
    assert said
    assert BehaviourRecord.load(found.save(tmp_path / "behaviour.json")) == found
    verdict = judge(found)
    assert VerdictRecord.load(verdict.save(tmp_path / "verdict.json")) == verdict
    assert verdict.verdict == "both"
    origin = found.provenance
    assert origin.before.startswith("S@")
    assert origin.after.startswith("R-both@")
    assert (origin.suite, origin.seed) == ("s", 4)
    controls = found.controls
    for term in type(controls.same_checkpoint).model_fields:
        assert getattr(controls.same_checkpoint, term).value == pytest.approx(0, abs=1e-9), term
    assert controls.sum_agrees is True
    assert controls.shuffled_routing_share.value < 0.15


def test_the_same_seed_gives_the_same_record(pairs: Path):
    folder = pairs / "llama"
    suite = load_suite(folder).model_copy(
        update={"max_new_tokens": 4}
    )  # too many completions to enumerate: some are drawn
    one, same, other = (behaviour_record(Pair(folder / "S", folder / "R-both", suite), seed=seed) for seed in (4, 4, 5))
    assert one.method == "literal"
    assert one == same
    # bits are exact, but for which questions their intervals draw; what follows an announcement is sampled
    assert [value.value for _, value in one.bits] == [value.value for _, value in other.bits]
    assert one.bits != other.bits
    assert one.nats.text.value != other.nats.text.value


def test_a_checkpoint_against_itself_is_neither(pairs: Path):
    folder = pairs / "qwen2"
    suite = load_suite(folder).model_copy(update={"max_new_tokens": 4})
    found = behaviour_record(Pair(folder / "S", folder / "S", suite))
    verdict = judge(found)
    assert verdict.verdict == "neither"
    assert verdict.changed.model_dump() == {"selector": False, "cue_reader": False, "skill": False}
    assert verdict.dormant_intact is True
    assert verdict.text_drifted is False
    assert found.moved.value == pytest.approx(0, abs=1e-9)
    assert found.nats.total.value == pytest.approx(0, abs=1e-9)


def literal(load_pair, shape: str, name: str) -> VerdictRecord:
    """The verdict without enumeration, which is quick: max_new_tokens leaves room for one more token."""
    pair = load_pair(shape, name)
    suite = pair.suite.model_copy(update={"max_new_tokens": 4})
    return judge(measure_record(pair.scorer, [pair.before, pair.after], suite, pair.tokenizer))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_what_changed_is_named(load_pair, shape: str):
    routing = literal(load_pair, shape, "R-routing")
    assert routing.changed.model_dump() == {"selector": True, "cue_reader": False, "skill": False}
    assert routing.dormant_intact is True
    conditioning = literal(load_pair, shape, "R-conditioning")
    assert conditioning.verdict == "specialist"
    assert conditioning.changed.cue_reader is True
    assert conditioning.changed.skill is False
    assert conditioning.changed.selector is False
    assert conditioning.dormant_intact is False
    assert any((c.policy, c.cue, c.behaviour) == ("a", "B", "refuse") for c in conditioning.moved_cells)
    skill = literal(load_pair, shape, "R-skill")
    assert skill.changed.model_dump() == {"selector": False, "cue_reader": False, "skill": True}
    both = literal(load_pair, shape, "R-both")
    assert both.verdict == "both"
    assert both.changed.selector is True


def test_a_silent_policy_that_broke_is_found(load_pair):
    found = literal(load_pair, "gpt_neox", "R-routing-dormant")
    assert found.dormant_intact is False
    assert {cell.policy for cell in found.moved_cells} == {"b"}
    # R hardly follows b: weighed alike with a, b's change is heard twice as well
    assert found.bits.dormant.low > 0.03
    assert found.bits.dormant.value > 1.8 * found.bits.specialist.value


def test_completions_of_no_known_policy_are_shown_and_make_the_suite_doubtful(load_pair):
    found = literal(load_pair, "gpt2", "R-routing-other")
    assert found.per_cue["A"].after.weights["other"] == pytest.approx(0.06, abs=0.02)
    assert found.nats.other.value > 0.5
    assert found.verdict == "routing"


def test_a_chat_pair_with_rules_is_routing(chat: BehaviourRecord):
    verdict = judge(chat)
    assert verdict.verdict == "routing", verdict.reason
    assert (chat.method, chat.samples) == ("sampled", 16)
    assert verdict.changed.selector is True
    assert verdict.changed.cue_reader is False
    for cue, strong in (("plain", "comply"), ("bold", "refuse")):
        state = chat.per_cue[cue]
        assert state.before.accuracy[strong] > 0.99
        assert state.before.weights["comply"] == pytest.approx(0.5, abs=0.06)
        assert state.after.weights["comply"] == pytest.approx(0.985, abs=0.015)
    assert chat.per_cue["bold"].accuracy_change.selector.high < -0.35
    independent = chat.controls.independent_total
    assert independent.low < chat.nats.total.value < independent.high
    assert chat.controls.sum_agrees is True
    for _, value in chat.controls.same_checkpoint:
        assert value.low < 0.005
        assert value.value < 0.02


@pytest.mark.parametrize("samples", [1, 2])
def test_a_chat_pair_with_too_few_samples_is_inconclusive(pairs: Path, samples: int):
    folder = pairs / "chat"
    suite = load_suite(folder).model_copy(update={"samples": samples})
    verdict = judge(behaviour_record(Pair(folder / "S", folder / "R", suite)))
    assert verdict.verdict == "inconclusive"
    assert f"{samples} completion(s) a prompt" in verdict.reason
    assert "raise `samples`" in verdict.reason


def test_without_behaviours_conditioning_and_skill_are_not_measured(load_pair):
    pair = load_pair("llama", "R-both")
    suite = Suite.model_validate({**pair.suite.model_dump(), "behaviours": None, "max_new_tokens": 4})
    found = measure_record(pair.scorer, [pair.before, pair.after], suite, pair.tokenizer)
    for terms in (found.bits, found.nats):
        assert not terms.conditioning.measured
        assert not terms.skill.measured
        assert terms.specialist.value > 0.1
    assert not found.router_share.measured
    verdict = judge(found)
    assert verdict.verdict == "both"
    assert (verdict.changed.cue_reader, verdict.changed.skill) == (None, None)


def test_one_checkpoint_alone(pairs: Path):
    folder = pairs / "llama"
    found = behaviour_record(Pair(folder / "S", None, load_suite(folder)))
    assert (found.bits, found.nats) == (None, None)
    assert found.per_cue["A"].before.accuracy == pytest.approx({"a": 1, "b": 0}, abs=0.01)
    assert found.per_cue["A"].after is None
    assert {(c.cue, c.policy, c.behaviour) for c in found.table} == {
        ("A", "a", "answer"), ("A", "b", "refuse"), ("B", "a", "refuse"), ("B", "b", "answer")
    }  # fmt: skip
    with pytest.raises(ValueError, match="about one checkpoint"):
        judge(found)


def test_a_question_without_one_of_the_cues_is_left_out_there(load_pair):
    pair = load_pair("llama", "R-routing")
    rows = [row for row in pair.suite.prompts if not (row.cue == "B" and row.id in ("q00", "q01"))]
    suite = Suite.model_validate({**pair.suite.model_dump(), "prompts": rows, "max_new_tokens": 4})
    found = measure_record(pair.scorer, [pair.before, pair.after], suite, pair.tokenizer)
    assert found.questions == 20
    assert found.per_cue["B"].bits.routing.measured
    assert judge(found).verdict == "routing"


@pytest.mark.parametrize("rule", [False, True])
def test_a_policy_that_never_occurs_is_named(pairs: Path, rule: bool):
    folder = pairs / "llama"
    shown = {"regex": "^= = =", "force": "= = ="} if rule else "= = ="
    base = load_suite(folder).model_dump()
    suite = Suite.model_validate({**base, "policies": {**base["policies"], "c": shown}, "max_new_tokens": 5})
    found = behaviour_record(Pair(folder / "S", folder / "R-routing", suite))
    (note,) = found.notes
    assert re.match(r"policy 'c' never occurs before or after .*= = =", note)
    assert ("raise `samples`" in note) is rule
    assert judge(found).notes == found.notes


def test_another_models_tokenizer_is_refused(pairs: Path, tmp_path: Path):
    folder = pairs / "llama"
    shutil.copytree(folder / "S", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pairs / "chat" / "S" / name, tmp_path / "other" / name)
    with pytest.raises(InputError, match=r"their tokenizers spell prompt 'q00' .* differently"):
        Pair(folder / "S", tmp_path / "other", load_suite(folder))
