"""What RL will do, from S and the reward alone: each cue's accuracy as a function of the trained cue's, and in time.

Policies gain on one another by softmax drift (`theory`), which reaches the network through the tangent kernel of S. RL
is never looked at, only compared with once it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.lab.forecast.kernel import Bootstrapped, Kernels, Network, kernels_of
from mixturelens.lab.forecast.record import Curves, ForecastRecord, Start
from mixturelens.lab.organism import Spec, build_suite, frozen_parameters
from mixturelens.lab.stage import lora_of, trainable
from mixturelens.lab.theory import Drift, Sampling, curve, exact_path, group_pace, sampled_paths, shifted, velocity
from mixturelens.models import end_tokens, find_source, load_tokenizer
from mixturelens.stats import interval, resample_counts, resampled_mean, too_few
from mixturelens.types import ANSWER, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNS = 200
"""Sampled runs behind every interval; each starts from questions drawn anew."""
LONGER = 3
"""Times as many steps as RL has, so that the slow ones of these runs come near the ceiling, too."""
GRID = 101
"""Places between the trained cue's accuracy in S and its ceiling."""
COVERED = 0.9
"""Least weight of the known policies in S: the theory has none for the others."""
MOMENTUM = 0.9
"""Adam's beta1, where the trainer sets none."""
DRIFTS: tuple[Drift, ...] = ("softmax", "replicator")
Say = Callable[[str], None]


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
    tokenizer, model = load_tokenizer(start.checkpoint), trainable(spec, find_source(start.checkpoint), device).eval()
    prompts = prepare(suite, suite.neutral, tokenizer)
    scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size, device)
    frozen = set() if lora_of(spec) else set(frozen_parameters(model, spec.rl.freeze))
    network = Network(model, prompts, cues, frozen, device)
    state, gradients = _measured(scorer, model, prompts, cues, seed), network.gradients()
    records = {}
    for cue in trained:
        say(f"RL on cue {cue}, {RUNS} sampled runs")
        records[cue] = _forecast(spec, state, network, gradients, cue, seed)
    return records


def _measured(scorer: Scorer, model: PreTrainedModel, prompts: Prompts, cues: Sequence[str], seed: int) -> Bootstrapped:
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
    return Bootstrapped(*(np.stack(each, 1) for each in (weights, right, other)))


def _forecast(
    spec: Spec,
    state: Bootstrapped,
    network: Network,
    gradients: Float[np.ndarray, "cue policy parameter"],
    trained_cue: str,
    seed: int,
) -> ForecastRecord:
    cues = list(spec.cues)
    trained = cues.index(trained_cue)
    weights, right = state.weights[0], state.right[0]
    plain = {name: exact_path(weights[trained], right[trained], name) for name in DRIFTS}
    kernels = kernels_of(spec, state, network, gradients, trained)
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


def _in_time(spec: Spec, state: Bootstrapped, trained: int, kernels: Kernels) -> Float[np.ndarray, "step cue"]:
    """Expected accuracy under every cue after each step: a unit of drift takes as many as the groups' pace says."""
    weights, right, path = state.weights[0], state.right[0], kernels.path
    slowness = [1 / group_pace(float(reached), spec.rl.group) for reached in path.weights @ right[trained]]
    taken = np.concatenate([[0.0], np.cumsum(np.diff(path.time) * (slowness[:-1] + np.diff(slowness) / 2))])
    shift = np.stack([np.interp(np.arange(spec.rl.steps + 1), taken, each) for each in path.shift.T], -1)
    return np.einsum("sci,ci->sc", shifted(weights, np.einsum("cij,sj->sci", kernels.start, shift)), right)


def _sampled(
    spec: Spec, state: Bootstrapped, trained: int, by: Kernels, seed: int
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
    on: Float[np.ndarray, " place"], here: Float[np.ndarray, " point"], there: Float[np.ndarray, " point"]
) -> Float[np.ndarray, " place"]:
    """What is there when the trained cue first reaches each place; its last where it never does."""
    return np.interp(on, np.maximum.accumulate(here), there)
