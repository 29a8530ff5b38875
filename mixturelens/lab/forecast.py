"""What RL will do, from S and the reward alone: each cue's accuracy as a function of the trained cue's, and in time.

Policies gain on one another by softmax drift (`theory`), which reaches the network through the tangent kernel of S. RL
is never looked at, only compared with once it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.lab import theory
from mixturelens.lab.organism import Spec, build_suite, frozen_parameters
from mixturelens.lab.theory import Drift, Sampling, curve, exact_path, group_pace, sampled_paths, shifted, velocity
from mixturelens.models import end_tokens, load_model, load_tokenizer
from mixturelens.records import Record
from mixturelens.stats import interval, resample_counts, resampled_mean, too_few
from mixturelens.types import ANSWER, Frozen, InputError, Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNS = 200
"""Sampled runs behind every interval; each starts from questions drawn anew."""
LONGER = 3
"""Times as many steps as RL has, so that the slow ones of these runs come near the ceiling, too."""
GRID = 101
"""Places between the trained cue's accuracy in S and its ceiling."""
UNSATURATED = 0.05
"""A step is compared where the trained cue's accuracy is at least so far from where it began and from its ceiling:
before, every curve is right; behind, every curve is at its end."""
COVERED = 0.9
"""Least weight of the known policies in S: the theory has none for the others."""
MOMENTUM = 0.9
"""Adam's beta1, where the trainer sets none."""
AHEAD = 0.75
"""Where on the way from S to the ceiling the kernel is looked at again: the theory takes it for constant."""

DRIFTS: tuple[Drift, ...] = ("softmax", "replicator")
ANSWERS = ("forecast", "softmax", "replicator", "constant", "renormalised")
"""The forecast, the two drifts without a kernel, and two nulls."""

Say = Callable[[str], None]


class Start(Frozen):
    """S under one cue."""

    weights: dict[str, Interval]
    """Of the known policies among themselves."""
    right: dict[str, Interval]
    """How often each is rewarded: its forced accuracy, less what completions of no known policy take."""


class Curves(Frozen):
    """Accuracy under another cue where the trained cue's is `ForecastRecord.on`."""

    forecast: tuple[Interval, ...]
    """Softmax drift through the tangent kernel of S. The interval is of runs that sample groups as RL does, from
    questions drawn anew, with kernels from none at all (log-weights move alike everywhere) over S's to that of S moved
    along the forecast itself (AHEAD), and with completions of no known policy from none to twice as many as in S."""
    softmax: tuple[float, ...]
    """Plain policy gradient on weights that cues share: no kernel."""
    replicator: tuple[float, ...]
    """The natural policy gradient on them, which plain training does not follow."""
    constant: tuple[float, ...]
    """A null: RL on one cue leaves the others alone."""
    renormalised: tuple[float, ...]
    """A null: RL removes what earns less than the mean under the trained cue and keeps the rest of S in proportion,
    at the same pace everywhere: a straight line."""


class Point(Frozen):
    """What was measured at a step of RL."""

    step: int
    accuracy: dict[str, Interval]
    forced: dict[str, dict[str, Interval]]


class ForecastScore(Frozen):
    """Forecasts of another cue against what RL did, over the steps that are compared."""

    errors: dict[str, float | None]
    """Mean absolute error of each of ANSWERS at the trained cue's measured accuracy; null where no step is compared."""
    covered: float | None
    """Share of the compared steps that lie in the forecast's interval."""


class Happened(Frozen):
    """What RL did, step by step, and how far the forecasts were from it."""

    points: tuple[Point, ...]
    compared: tuple[int, ...]
    """Steps away from both ends (UNSATURATED)."""
    scores: dict[str, ForecastScore]
    clock: ForecastScore
    """The trained cue in time: the forecast and, as a null, the accuracy in S; over the same steps."""
    specialists: float
    """Largest change of any forced accuracy along RL; the theory has none."""


class ForecastRecord(Record):
    """What RL on one cue will do to every cue, and, once it is done, how right that was."""

    KIND = "forecast"

    trained_cue: str
    cues: tuple[str, ...]
    policies: tuple[str, ...]
    questions: int
    start: dict[str, Start]
    kernel: dict[str, tuple[tuple[float, ...], ...]]
    """cue -> tangent kernel of its log-weights with the trained cue's, times the rate: log-weights a step."""
    reach: dict[str, float]
    """How far a first step moves a cue along the drift, relative to the trained cue: 1 if the kernel is the same."""
    rescaled: float
    """Share of the squared gradient that Adam divides by itself more than by epsilon: 0 is plain gradient descent."""
    on: tuple[float, ...]
    """Accuracy under the trained cue: evenly spaced, from S's to the best policy's."""
    off: dict[str, Curves]
    steps: dict[str, tuple[Interval, ...]]
    """The second answer: accuracy under every cue after each step, the first being S."""
    happened: Happened | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Bootstrapped:
    """S on bootstrap samples of the questions; the first is the sample itself."""

    weights: Float[np.ndarray, "draw cue policy"]
    right: Float[np.ndarray, "draw cue policy"]
    other: Float[np.ndarray, "draw cue"]
    """Weight of completions of no known policy."""


@dataclass(frozen=True)
class RlStart:
    """What RL begins with: the checkpoint S, the spec that it follows, and the device that S is loaded on."""

    checkpoint: Path
    spec: Spec
    device: str = "cpu"


def forecast_records(
    start: RlStart, trained: Sequence[str], seed: int = 0, say: Say | None = None
) -> dict[str, ForecastRecord]:
    """Forecasts by cue that RL is to train on (`trained`), from S and the reward alone; `say` is told each step.

    Raises InputError where the theory says nothing: policies that are not announced, completions of no known policy, a
    single cue, a reward that prefers no policy.
    """
    spec, device = start.spec, start.device
    suite, cues = build_suite(spec), list(spec.cues)
    if spec.announcement == "none":
        raise InputError(
            "forecast: the policies announce nothing, so no single prompt tells their weights; give a "
            "recipe with announcements"
        )
    if len(cues) < 2:
        raise InputError("forecast: there is no cue but the trained one to forecast")
    for cue in trained:
        if spec.objectives.get(cue, ANSWER) != ANSWER:
            raise InputError(
                f"forecast: RL on cue {cue!r} pays {spec.objectives[cue]!r}, and the theory is of right answers"
            )
    say = say or (lambda _: None)
    say("S under every cue, and its tangent kernel")
    tokenizer, model = load_tokenizer(start.checkpoint), load_model(start.checkpoint, device)
    prompts = prepare(suite, suite.neutral, tokenizer)
    scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size, device)
    network = _Network(model, prompts, cues, set(frozen_parameters(model, spec.rl.freeze)), device)
    state, gradients = _measured(scorer, model, prompts, cues, seed), network.gradients()
    records = {}
    for cue in trained:
        say(f"RL on cue {cue}, {RUNS} sampled runs")
        records[cue] = _forecast(spec, state, network, gradients, cue, seed)
    return records


def _measured(
    scorer: Scorer, model: PreTrainedModel, prompts: Prompts, cues: Sequence[str], seed: int
) -> _Bootstrapped:
    behaviour = literal_behaviour(scorer, model, prompts)
    weights, right, other = [], [], []
    for cue in cues:
        at = [i for i, row in enumerate(prompts.rows) if row.cue == cue]
        counts = resample_counts(len(at), seed, RUNS)
        known = resampled_mean(behaviour.weights[at, :-1], counts)
        mass = known.sum(-1, keepdims=True)
        if mass[0, 0] < COVERED:
            raise InputError(
                f"forecast: known policies have {mass[0, 0]:.2f} of the completions under cue {cue!r}, and the theory "
                f"needs {COVERED:g}; train SFT for longer"
            )
        weights.append(known / mass)
        right.append(resampled_mean(behaviour.forced_accuracy[at], counts) * mass)
        other.append(1 - mass[:, 0])
    return _Bootstrapped(*(np.stack(each, 1) for each in (weights, right, other)))


class _Network:
    """The parameters that RL trains, and how the policies' log-weights depend on them."""

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, cues: Sequence[str], frozen: set[str], device: str
    ) -> None:
        self.model, self.device = model, device
        self.prompts = [prompts.part([i for i, row in enumerate(prompts.rows) if row.cue == cue]) for cue in cues]
        self.trained = [p for name, p in model.named_parameters() if name not in frozen]

    def gradients(self) -> Float[np.ndarray, "cue policy parameter"]:
        """Gradient of the mean over prompts of each policy's log-weight."""
        found = []
        for prompts in self.prompts:
            means = log_weights(self.model, prompts, self.device).mean(0)
            rows = [torch.autograd.grad(mean, self.trained, retain_graph=True) for mean in means]
            found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        return torch.stack(found).double().cpu().numpy()

    @contextlib.contextmanager
    def moved(self, by: Float[np.ndarray, " parameter"]) -> Iterator[None]:
        """The network with other parameters, for as long as the block lasts."""
        kept = [p.detach().clone() for p in self.trained]
        pieces = torch.as_tensor(by).split([p.numel() for p in self.trained])
        with torch.no_grad():
            for parameter, piece in zip(self.trained, pieces, strict=True):
                parameter += piece.view_as(parameter).to(parameter)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.trained, kept, strict=True):
                    parameter.copy_(old)


def log_weights(model: PreTrainedModel, prompts: Prompts, device: str = "cpu") -> Float[Tensor, "prompt policy"]:
    """Log-probability that each known policy is announced, in any wording; can be differentiated."""
    found: list[list[Tensor]] = [[] for _ in range(prompts.shape[1] - 1)]
    for number, a in enumerate(prompts.announcements):
        spelled = [placed[number].ids for placed in prompts.placed]
        rows = [[*context, *ids] for context, ids in zip(prompts.contexts, spelled, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        logits = model(input_ids=ids.to(device), use_cache=False).logits.double().log_softmax(-1)
        found[a.policy].append(
            torch.stack(
                [
                    logits[row, torch.arange(len(context) - 1, len(context) - 1 + len(ids)), list(ids)].sum()
                    for row, (context, ids) in enumerate(zip(prompts.contexts, spelled, strict=True))
                ]
            )
        )
    return torch.stack([torch.stack(wordings).logsumexp(0) for wordings in found], -1)


@dataclass(frozen=True)
class _Kernels:
    """Log-weights that a unit of theta under the trained cue moves in a step, as Adam takes it."""

    start: Float[np.ndarray, "cue policy policy"]
    ahead: Float[np.ndarray, "cue policy policy"]
    path: theory.WeightPath
    """Softmax drift through `start`: `time` is in steps, at the pace of one."""
    rescaled: float


def _kernels(
    spec: Spec,
    state: _Bootstrapped,
    network: _Network,
    gradients: Float[np.ndarray, "cue policy parameter"],
    trained: int,
) -> _Kernels:
    """The tangent kernel (Jacot et al. 2018, arXiv 1806.07572) of S, and of S moved along its own forecast.

    Adam's first step is rate x gradient / (|gradient| + epsilon): plain gradient descent where epsilon is far larger,
    steps of one size where it is far smaller. TRL's loss is a mean over tokens, and one of `max_new_tokens` chooses.
    """
    weights, right = state.weights[0, trained], state.right[0, trained]
    drift = group_pace(float(weights @ right), spec.rl.group) * velocity(weights, right)
    gradient = drift @ gradients[trained] / spec.max_new_tokens
    scale = spec.rl.learning_rate / (np.abs(gradient) + spec.rl.adam_epsilon) / spec.max_new_tokens
    start = np.einsum("cip,jp->cij", gradients * scale, gradients[trained])
    path = exact_path(weights, right, kernel=start[trained])
    with network.moved(scale * (path.shift[round(AHEAD * (len(path.shift) - 1))] @ gradients[trained])):
        there = network.gradients()
    ahead = np.einsum("cip,jp->cij", there * scale, there[trained])
    large = np.abs(gradient) > spec.rl.adam_epsilon
    return _Kernels(start, ahead, path, float((gradient[large] ** 2).sum() / (gradient**2).sum()))


def _forecast(
    spec: Spec,
    state: _Bootstrapped,
    network: _Network,
    gradients: Float[np.ndarray, "cue policy parameter"],
    trained_cue: str,
    seed: int,
) -> ForecastRecord:
    cues = list(spec.cues)
    trained = cues.index(trained_cue)
    weights, right = state.weights[0], state.right[0]
    plain = {name: exact_path(weights[trained], right[trained], name) for name in DRIFTS}
    kernels = _kernels(spec, state, network, gradients, trained)
    sampled = _sampled(spec, state, trained, kernels, seed)
    begin = float(weights[trained] @ right[trained])
    on = np.linspace(begin, right[trained].max(), GRID)
    kept = weights * (right[trained] > begin)
    end = np.einsum("cm,cm->c", kept / kept.sum(-1, keepdims=True), right)
    off = {}
    for c, cue in enumerate(cues):
        if c == trained:
            continue
        centre = _at(on, *curve(kernels.path, weights[c], right[trained], right[c], kernels.start[c]))
        runs = np.array([_at(on, a, b) for a, b in zip(sampled[:, :, trained], sampled[:, :, c], strict=True)])
        drifts = {
            name: tuple(_at(on, *curve(path, weights[c], right[trained], right[c])).tolist())
            for name, path in plain.items()
        }
        still = float(weights[c] @ right[c])
        off[cue] = Curves(
            forecast=tuple(interval(draws) for draws in np.vstack([centre, runs]).T),
            **drifts,
            constant=(still,) * GRID,
            renormalised=tuple(np.interp(on, [begin, end[trained]], [still, end[c]]).tolist()),
        )
    along = np.concatenate([_in_time(spec, state, trained, kernels)[None], sampled[:, : spec.rl.steps + 1]])
    drift = velocity(weights[trained], right[trained])
    speed = np.einsum("i,cij,j->c", drift, kernels.start, drift)
    return ForecastRecord(
        trained_cue=trained_cue,
        cues=tuple(cues),
        policies=tuple(spec.policies),
        questions=len(network.prompts[trained].rows),
        start={
            cue: Start(
                weights={name: interval(state.weights[:, c, m]) for m, name in enumerate(spec.policies)},
                right={name: interval(state.right[:, c, m]) for m, name in enumerate(spec.policies)},
            )
            for c, cue in enumerate(cues)
        },
        kernel={cue: tuple(map(tuple, kernels.start[c].tolist())) for c, cue in enumerate(cues)},
        reach={cue: float(speed[c] / speed[trained]) for c, cue in enumerate(cues)},
        rescaled=kernels.rescaled,
        on=tuple(on.tolist()),
        off=off,
        steps={cue: tuple(interval(draws) for draws in along[:, :, c].T) for c, cue in enumerate(cues)},
        missing=too_few("forecast", len(network.prompts[trained].rows)),
    )


def _in_time(spec: Spec, state: _Bootstrapped, trained: int, kernels: _Kernels) -> Float[np.ndarray, "step cue"]:
    """Expected accuracy under every cue after each step: a unit of drift takes as many as the groups' pace says."""
    weights, right, path = state.weights[0], state.right[0], kernels.path
    slowness = [1 / group_pace(float(reached), spec.rl.group) for reached in path.weights @ right[trained]]
    taken = np.concatenate([[0.0], np.cumsum(np.diff(path.time) * (slowness[:-1] + np.diff(slowness) / 2))])
    shift = np.stack([np.interp(np.arange(spec.rl.steps + 1), taken, each) for each in path.shift.T], -1)
    return np.einsum("sci,ci->sc", shifted(weights, np.einsum("cij,sj->sci", kernels.start, shift)), right)


def _sampled(
    spec: Spec,
    state: _Bootstrapped,
    trained: int,
    by: _Kernels,
    seed: int,
) -> Float[np.ndarray, "run step cue"]:
    """Accuracy under every cue in runs that sample, each from other questions and with another kernel."""
    rng = np.random.default_rng(seed)
    other = state.other[1:, :, None]
    known = (1 - rng.uniform(0, 2, (len(other), 1, 1)) * other) / (1 - other)  # RL pays none of them, if it sees them
    weights, right = state.weights[1:], np.clip(state.right[1:] * known, 0, 1)
    drift = velocity(state.weights[0, trained], state.right[0, trained])
    none = (drift @ by.start[trained] @ drift) / (drift @ drift) * np.eye(len(drift))  # as fast, and alike everywhere
    amount = rng.uniform(0, 2, (len(weights), 1, 1, 1))
    kernels = np.where(amount < 1, none + amount * (by.start - none), by.start + (amount - 1) * (by.ahead - by.start))
    moved = sampled_paths(
        weights[:, trained],
        right[:, trained],
        kernels[:, trained],
        Sampling(spec.rl.group, spec.rl.prompts, LONGER * spec.rl.steps, MOMENTUM),
        seed,
    )
    now = shifted(weights[:, None], np.einsum("rcij,rsj->rsci", kernels, moved))
    return np.einsum("rsci,rci->rsc", now, right)


def _at(
    on: Float[np.ndarray, " place"],
    here: Float[np.ndarray, " point"],
    there: Float[np.ndarray, " point"],
) -> Float[np.ndarray, " place"]:
    """What is there when the trained cue first reaches each place; its last where it never does."""
    return np.interp(on, np.maximum.accumulate(here), there)


def compare(record: ForecastRecord, points: Sequence[Point]) -> ForecastRecord:
    """The record with what happened: forecasts at the trained cue's measured accuracy, against what was measured.

    Raises InputError where a point lacks one of the record's cues.
    """
    points = [point for point in points if all(v.measured for v in point.accuracy.values())]
    for point in points:
        if set(point.accuracy) != set(record.cues):
            raise InputError(
                f"forecast: step {point.step} was measured under the cues {sorted(point.accuracy)}, and the "
                f"forecast is about {sorted(record.cues)}; forecast this run's own checkpoint"
            )
    measured = {cue: np.array([p.accuracy[cue].value for p in points], dtype=float) for cue in record.cues}
    on = measured[record.trained_cue]
    chosen = (on >= record.on[0] + UNSATURATED) & (on <= record.on[-1] - UNSATURATED)
    scores = {}
    for cue, curves in record.off.items():
        answers = {name: np.interp(on, record.on, _values(getattr(curves, name))) for name in ANSWERS}
        low, high = (np.interp(on, record.on, [getattr(v, end) for v in curves.forecast]) for end in ("low", "high"))
        scores[cue] = _score(measured[cue], answers, low, high, chosen)
    at = [min(p.step, len(record.steps[record.trained_cue]) - 1) for p in points]
    in_time = [record.steps[record.trained_cue][i] for i in at]
    low, high = (np.array([getattr(v, end) for v in in_time], dtype=float) for end in ("low", "high"))
    clock = {"forecast": np.array(_values(in_time)), "constant": np.full(len(points), record.on[0])}
    changes = [
        abs(value.value - first)
        for point in points
        for cue, forced in point.forced.items()
        for name, value in forced.items()
        if value.value is not None and (first := points[0].forced[cue][name].value) is not None
    ]
    happened = Happened(
        points=tuple(points),
        compared=tuple(p.step for p, yes in zip(points, chosen, strict=True) if yes),
        scores=scores,
        clock=_score(on, clock, low, high, chosen),
        specialists=max(changes, default=0.0),
    )
    return record.model_copy(update={"happened": happened})


def _values(values: Sequence[Interval | float]) -> list[float]:
    return [v.known if isinstance(v, Interval) else v for v in values]


def _score(
    measured: Float[np.ndarray, " point"],
    answers: Mapping[str, Float[np.ndarray, " point"]],
    low: Float[np.ndarray, " point"],
    high: Float[np.ndarray, " point"],
    chosen: np.ndarray,
) -> ForecastScore:
    if not chosen.any():
        return ForecastScore(errors=dict.fromkeys(answers), covered=None)
    inside = (measured >= low) & (measured <= high)
    errors: dict[str, float | None] = {
        name: float(np.abs(measured - answer)[chosen].mean()) for name, answer in answers.items()
    }
    return ForecastScore(errors=errors, covered=float(inside[chosen].mean()))
