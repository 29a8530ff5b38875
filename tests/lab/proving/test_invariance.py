"""What is said of a pair does not depend on how long or how wordy completions are, nor on how the suite is written."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.pair import measure_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.lab.organism import SplitSpec, build_model, build_tokenizer, prompt_row, questions
from mixturelens.lab.proving.asked import suite_of
from mixturelens.lab.proving.exhaustive import Asking, prompt_truth
from mixturelens.lab.proving.manner import TEMPLATE, Manner
from mixturelens.lab.proving.organisms import (
    Fitting,
    Lessons,
    MixtureTarget,
    fit,
    rows_of,
    sizes,
    small_spec,
    target_of,
)
from mixturelens.lab.proving.truth import Truth, truth_of
from mixturelens.lab.tasks import Sequence
from mixturelens.models import end_tokens
from mixturelens.routing.verdict import judge
from mixturelens.suite import Suite
from mixturelens.types import Interval

MANNER = Manner(chat=True, tail=8)
LENGTHS = (8, 16, 32)
DRIFTS = (0.01, 0.06, 0.3)
SAMPLES = 96
"""Completions a prompt of 46: as many as can tell no change from the least that counts."""
BITS = ("routing", "specialist", "conditioning", "skill", "dormant")
pytestmark = pytest.mark.slow


class Ground:
    """S, and Rs of the same mixture at other weights, with other tails; asked about what they were trained on."""

    def __init__(self) -> None:
        spec = small_spec("llama", "token", 2)
        family, split = Sequence(operations=("copy",), symbols=26, length=1), SplitSpec(rl=1, evaluation=2)
        model = sizes("llama", width=16, context=64)
        self.spec = spec.model_copy(update={"questions": family, "split": split, "model": model})
        self.tokenizer = build_tokenizer(self.spec, MANNER.words)
        self.tokenizer.chat_template = TEMPLATE
        self.asked = questions(self.spec).sft
        self.before = build_model(self.spec, self.tokenizer)
        self.fit(self.before, target_of(self.spec), Fitting(400, 1e-2))
        self.made: dict[tuple[float, float], Any] = {}

    def fit(self, model: Any, target: MixtureTarget, fitting: Fitting) -> None:
        fit(model, rows_of(self.spec, target, self.tokenizer, Lessons(self.asked, MANNER, 12)), fitting)

    def after(self, weight: float, drift: float) -> Any:
        if (weight, drift) not in self.made:
            model = copy.deepcopy(self.before)
            target = replace(target_of(self.spec), weights={"a": weight, "b": 1 - weight}, drift=drift)
            self.fit(model, target, Fitting(100, 3e-3))
            self.made[weight, drift] = model
        return self.made[weight, drift]

    def suite(self, tokens: int = 0) -> Suite:
        rows = tuple(prompt_row(self.spec, cue, question) for question in self.asked for cue in self.spec.cues)
        return suite_of(self.spec, MANNER, tokens).model_copy(update={"prompts": rows, "samples": SAMPLES})

    def measured(self, suite: Suite, weight: float, drift: float) -> BehaviourRecord:
        scorer = Scorer(end_tokens(self.before, self.tokenizer), len(self.tokenizer))
        return measure_record(scorer, [self.before, self.after(weight, drift)], suite, self.tokenizer)

    def truth(self, weight: float, drift: float, tokens: int) -> Truth:
        models, longest = (self.before, self.after(weight, drift)), tokens or 2
        return truth_of(
            prompt_truth(self.spec, models, self.tokenizer, self.asked, Asking(MANNER, tokens > 0, longest))
        )


@pytest.fixture(scope="module")
def ground() -> Ground:
    return Ground()


def check(record: BehaviourRecord, truth: Truth, verdict: str) -> None:
    said = judge(record)
    assert said.verdict == truth.verdict == verdict
    for name in BITS:
        assert holds(getattr(record.bits, name), truth.bits[name]), name
    assert holds(record.moved, truth.moved)
    if verdict != "neither":
        assert truth.routing_share is not None
        assert holds(record.routing_share, truth.routing_share)


def holds(found: Interval, true: float, slack: float = 2e-3) -> bool:
    """Within the interval, or as near as samples of rare slips can say."""
    assert found.low is not None
    assert found.high is not None
    return found.low - slack <= true <= found.high + slack


@pytest.mark.parametrize("tokens", [0, *LENGTHS])
@pytest.mark.parametrize("drift", DRIFTS)
def test_style_alone_is_neither(ground: Ground, drift: float, tokens: int):
    record, truth = ground.measured(ground.suite(tokens), 0.5, drift), ground.truth(0.5, drift, tokens)
    check(record, truth, "neither")
    assert truth.text_drifted == (tokens > 0)
    assert holds(record.text.nats_per_token, truth.text, 0.05 * truth.text + 1e-3)


@pytest.mark.parametrize("tokens", [0, *LENGTHS])
@pytest.mark.parametrize("drift", [0.0, *DRIFTS])
def test_routing_is_routing_whatever_the_style_and_however_long(ground: Ground, drift: float, tokens: int):
    """Of a completion of 32 tokens, 0.3 nats a token are far more than the 0.5 nats that routing costs."""
    record, truth = ground.measured(ground.suite(tokens), 0.95, drift), ground.truth(0.95, drift, tokens)
    check(record, truth, "routing")
    assert truth.bits == pytest.approx(ground.truth(0.95, drift, 0).bits, abs=1e-6)
    if drift == DRIFTS[-1] and tokens == LENGTHS[-1]:
        assert record.nats is not None
        assert (record.nats.text.value or 0) > 2 * (record.nats.routing.value or 0)


def test_names_of_policies_say_nothing(ground: Ground):
    for tokens in (0, 16):
        suite = ground.suite(tokens)
        a, b = suite.policies.values()
        plain, other = (
            ground.measured(each, 0.95, 0.06)
            for each in (suite, suite.model_copy(update={"policies": {"zealous": a, "abashed": b}}))
        )
        assert other.bits == plain.bits
        assert judge(other).verdict == judge(plain).verdict == "routing"
        turned = ground.measured(suite.model_copy(update={"policies": {"b": b, "a": a}}), 0.95, 0.06)
        check(turned, ground.truth(0.95, 0.06, tokens), "routing")


def test_questions_asked_twice_say_the_same(ground: Ground):
    for tokens in (0, 16):
        suite = ground.suite(tokens)
        again = tuple(row.model_copy(update={"id": f"{row.id}, again"}) for row in suite.prompts)
        once = ground.measured(suite, 0.95, 0.06)
        twice = ground.measured(suite.model_copy(update={"prompts": (*suite.prompts, *again)}), 0.95, 0.06)
        check(twice, ground.truth(0.95, 0.06, tokens), "routing")
        if not tokens:
            assert twice.moved.value == pytest.approx(once.moved.value, abs=1e-6)
