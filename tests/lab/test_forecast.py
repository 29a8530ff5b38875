"""The forecast against planted networks, against RL by exact gradients, and against what RL did to the reference."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import prepare
from mixturelens.lab import runs
from mixturelens.lab.forecast import forecast as room
from mixturelens.lab.forecast.forecast import RlStart, _forecast, forecast_records
from mixturelens.lab.forecast.kernel import Bootstrapped, Network, log_weights
from mixturelens.lab.forecast.record import ForecastRecord, Point, compare
from mixturelens.lab.organism import Spec, build_model, build_suite, build_tokenizer, load_spec
from mixturelens.lab.theory import group_pace, velocity
from mixturelens.types import InputError, Interval

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
FEW = {
    "split": {"rl": 40, "evaluation": 6},
    "questions": {"family": "sequence", "operations": ["copy"], "symbols": 5, "length": 4},
}
WEIGHTS = np.array([0.45, 0.45, 0.10])


def good_everywhere(**rl) -> Spec:
    spec = load_spec("good-everywhere", **FEW)
    return spec.model_copy(update={"rl": spec.rl.model_copy(update={"steps": 60, **rl})})


class Planted(torch.nn.Module):
    """A network whose log-weights are `shared`, the same under every cue, plus `own` of the cue: nothing else."""

    def __init__(self, spec: Spec, weights: np.ndarray, own: float = 0.0) -> None:
        super().__init__()
        tokenizer = build_tokenizer(spec)
        vocabulary = tokenizer.get_vocab()
        self.tags = torch.tensor([vocabulary[tag] for tag in spec.cues.values()])
        self.words = torch.tensor([vocabulary[row.announce[0]] for row in spec.policies.values()])
        self.size, self.scale = len(vocabulary), own
        self.shared = torch.nn.Parameter(torch.tensor(weights).log())
        self.own = torch.nn.Parameter(torch.zeros(len(spec.cues), len(weights), dtype=torch.double))
        suite = build_suite(spec)
        self.prompts = prepare(suite, suite.neutral, tokenizer)

    def forward(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        cue = (input_ids[:, :1] == self.tags).double().argmax(-1)
        log_odds = (1 - self.scale) * self.shared + self.scale * (self.shared.detach() + self.own[cue])
        logits = torch.full((*input_ids.shape, self.size), -50.0, dtype=torch.double)
        logits[..., self.words] = log_odds[:, None].expand(-1, input_ids.shape[1], -1)
        return SimpleNamespace(logits=logits)


def planted(spec: Spec, own: float = 0.0) -> tuple[Planted, ForecastRecord]:
    """The network, and the forecast of RL on A."""
    model, cues = Planted(spec, WEIGHTS, own), list(spec.cues)
    right = np.array([[float(row.table[cue] == "answer") for row in spec.policies.values()] for cue in cues])
    draws = room.RUNS + 1
    state = Bootstrapped(
        np.broadcast_to(WEIGHTS, (draws, 2, 3)).copy(),
        np.broadcast_to(right, (draws, 2, 3)).copy(),
        np.zeros((draws, 2)),
    )
    network = Network(model, model.prompts, cues, set(), "cpu")  # pyright: ignore[reportArgumentType]
    return model, _forecast(spec, state, network, network.gradients(), "A", seed=0)


def centre(record: ForecastRecord) -> np.ndarray:
    return np.array([value.value for value in record.off["B"].forecast])


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RUNS", 40)


def test_weights_that_cues_share_follow_plain_softmax_drift_under_gradient_descent():
    _, record = planted(good_everywhere(adam_epsilon=10.0, learning_rate=10.0))
    np.testing.assert_allclose(centre(record), record.off["B"].softmax, atol=2e-3)
    assert record.reach == pytest.approx({"A": 1.0, "B": 1.0})
    assert record.rescaled == 0
    rate = 10 / 10 / 6**2  # of one of six tokens, and Adam's epsilon dwarfs the gradient
    between = np.eye(3) - 1 / 3  # what all policies gain together says nothing
    np.testing.assert_allclose(between @ record.kernel["B"] @ between, 6 * rate * between, rtol=0.02, atol=1e-3)


def test_a_cue_that_shares_nothing_stays():
    _, record = planted(good_everywhere(adam_epsilon=10.0, learning_rate=10.0), own=1.0)
    assert record.reach["B"] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(centre(record), record.off["B"].constant, atol=1e-9)


def test_a_small_epsilon_makes_every_policy_move_alike():
    """Adam's sign descent: what hardly earns moves as fast, so that a rare policy that is good keeps up."""
    _, record = planted(good_everywhere(adam_epsilon=1e-9, learning_rate=0.05))
    assert record.rescaled == pytest.approx(1)
    middle = len(record.on) // 2
    assert centre(record)[middle] > record.off["B"].softmax[middle] + 0.01


@pytest.mark.parametrize(("epsilon", "rate"), [(10.0, 10.0), (1e-2, 0.02)])
def test_the_forecast_is_what_adam_then_does(epsilon: float, rate: float):
    """RL by its expected gradient on the planted network, half of whose log-weights are each cue's own."""
    spec = good_everywhere(adam_epsilon=epsilon, learning_rate=rate, steps=40)
    model, record = planted(spec, own=0.3)
    on_cue, off_cue = (
        model.prompts.part([i for i, row in enumerate(model.prompts.rows) if row.cue == cue]) for cue in "AB"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, eps=epsilon)
    right_on, right_off = np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])
    points = []
    for step in range(spec.rl.steps + 1):
        logs = log_weights(model, on_cue).mean(0)  # pyright: ignore[reportArgumentType]
        weights = logs.detach().exp().numpy()
        there = log_weights(model, off_cue)[0].detach().exp().numpy()  # pyright: ignore[reportArgumentType]
        accuracy = {"A": sure(weights @ right_on), "B": sure(there @ right_off)}
        points.append(Point(step=step, accuracy=accuracy, forced={"A": {"a": sure(1)}, "B": {"a": sure(0)}}))
        pull = group_pace(float(weights @ right_on), spec.rl.group) * velocity(weights, right_on) / spec.max_new_tokens
        optimizer.zero_grad()
        (-torch.tensor(pull) @ logs).backward()
        optimizer.step()
    happened = compare(record, points).happened
    assert happened is not None
    score = happened.scores["B"]
    assert len(happened.compared) > 5
    errors = {name: value or 0.0 for name, value in score.errors.items()}
    assert errors["forecast"] < 0.01
    assert errors["forecast"] < min(value for name, value in errors.items() if name != "forecast")
    assert score.covered is not None
    assert score.covered >= 0.9
    clock = {name: value or 0.0 for name, value in happened.clock.errors.items()}
    assert clock["forecast"] < 0.3 * clock["constant"]
    assert happened.specialists == 0


def test_the_nulls_are_what_they_say():
    """Without b, the rest of S under A is right, and under B only g of a and g: 0.1 of 0.55."""
    _, record = planted(good_everywhere())
    curves = record.off["B"]
    assert set(curves.constant) == {0.55}
    assert curves.renormalised[0] == pytest.approx(0.55)
    assert curves.renormalised[-1] == pytest.approx(0.1 / 0.55)
    # of policies that earn alike, replicator dynamics keep the proportions: the same line
    np.testing.assert_allclose(curves.replicator, curves.renormalised, atol=1e-3)


def sure(value: float) -> Interval:
    value = float(value)
    return Interval(value=value, low=value, high=value)


def test_only_steps_away_from_both_ends_are_compared():
    _, record = planted(good_everywhere())
    forced = {"A": {"a": sure(1.0)}, "B": {"a": sure(0.0)}}
    found = [(0, 0.55, 0.55), (1, 0.58, 0.10), (2, 0.75, 0.40), (3, 0.97, 0.9)]
    points = [
        Point(
            step=step, accuracy={"A": sure(on), "B": sure(off)}, forced=forced if step < 3 else {"A": {"a": sure(0.7)}}
        )
        for step, on, off in found
    ]
    happened = compare(record, points).happened
    assert happened is not None
    assert happened.compared == (2,)
    assert happened.scores["B"].errors["constant"] == pytest.approx(0.15)
    assert happened.scores["B"].errors["softmax"] == pytest.approx(
        abs(0.40 - np.interp(0.75, record.on, record.off["B"].softmax))
    )
    assert happened.clock.errors["constant"] == pytest.approx(0.20)
    assert happened.specialists == pytest.approx(0.3)
    early = compare(record, points[:2]).happened
    assert early is not None
    assert early.scores["B"].covered is None
    assert set(early.scores["B"].errors.values()) == {None}
    with pytest.raises(InputError, match="step 0 was measured under the cues"):
        compare(record, [Point(step=0, accuracy={"A": sure(0.5)}, forced={})])


@pytest.mark.parametrize("shown", [{"a": "[a]", "b": "[b]"}, {"a": ("[a] p", "sorry"), "b": "[b] sorry"}])
def test_log_weights_are_the_measured_ones_and_their_gradients_are_true(shown: dict, load_pair):
    pair = load_pair("llama", "R-routing")
    suite = pair.suite.model_copy(update={"policies": shown, "max_new_tokens": 4})
    prompts = prepare(suite, suite.neutral[:6], pair.tokenizer)
    measured = literal_behaviour(pair.scorer, pair.before, prompts).weights[:, :-1]
    np.testing.assert_allclose(log_weights(pair.before, prompts).exp().detach().numpy(), measured, rtol=1e-4)
    network = Network(pair.before, prompts, [prompts.rows[0].cue], set(), "cpu")
    (gradient,) = network.gradients()
    before = {name: value.clone() for name, value in pair.before.state_dict().items()}
    by = 1e-2 * gradient[0] / np.linalg.norm(gradient[0])
    with torch.no_grad():
        still = log_weights(pair.before, network.prompts[0]).mean(0)
        with network.moved(by):
            moved = log_weights(pair.before, network.prompts[0]).mean(0) - still
    np.testing.assert_allclose(moved, gradient @ by, rtol=0.1, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in pair.before.state_dict().items())


def test_a_run_is_forecast_before_rl_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, spec = tmp_path / "run", load_spec("default")
    spec = spec.model_copy(update={"split": spec.split.model_copy(update={"evaluation": 8})})
    runs.start_run(spec, run)
    shutil.copytree(REFERENCE / "checkpoints" / "sft", run / "checkpoints" / "sft")
    records = runs.forecast(run)
    assert [record.trained_cue for record in records] == ["A", "B"]
    for record in records:
        curves = next(iter(record.off.values()))
        assert record.happened is None
        assert 0.95 < min(record.reach.values()) <= max(record.reach.values()) < 1.05
        assert curves.forecast[-1].value < 0.02 < 0.45 < (curves.forecast[0].value or 0)
        assert all(v.low <= v.value <= v.high for v in curves.forecast)
    there = ForecastRecord.load(run / "records" / "forecast-A.json")
    assert there == records[0]
    monkeypatch.setattr(runs, "forecast_records", lambda *_, **__: pytest.fail("measured again"))
    assert runs.forecast(run) == records


def test_what_the_theory_does_not_know_is_refused(tmp_path: Path):
    spec = good_everywhere()
    silent = {name: row.model_copy(update={"announce": ()}) for name, row in spec.policies.items()}
    alone = {"cues": {"A": "<A>"}}
    for changes, says in (
        ({"policies": silent}, "announce nothing"),
        (alone, "no cue but the trained one"),
        ({"objectives": {"A": "refuse"}}, "pays 'refuse'"),
    ):
        with pytest.raises(InputError, match=says):
            forecast_records(RlStart(tmp_path, spec.model_copy(update=changes)), ["A"])
    untrained = tmp_path / "untrained"
    tokenizer = build_tokenizer(spec)
    build_model(spec, tokenizer).save_pretrained(untrained)
    tokenizer.save_pretrained(untrained)
    with pytest.raises(InputError, match=r"known policies have 0\.\d\d of the completions under cue 'A'"):
        forecast_records(RlStart(untrained, spec), ["A"])
    runs.start_run(spec, tmp_path / "run")
    with pytest.raises(InputError, match="no SFT checkpoint yet"):
        runs.forecast(tmp_path / "run")
