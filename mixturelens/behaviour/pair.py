"""The behaviour instrument: a checkpoint or a pair, and a suite, to one record with intervals and controls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, Change
from mixturelens.behaviour.averages import accuracy_changes, bits_of, coverage, cue_sides, nats_of, policy_table
from mixturelens.behaviour.bits import bit_terms
from mixturelens.behaviour.forced import label_completions, texts_of
from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.literal import literal_behaviour, measured_again
from mixturelens.behaviour.measure import measure, measure_change, measure_given
from mixturelens.behaviour.plan import first_questions, make_plan
from mixturelens.behaviour.prompts import ASIDE, Prompts, check_texts, prepare
from mixturelens.behaviour.record import BehaviourRecord, Bits, Controls, CueBehaviour, Nats
from mixturelens.behaviour.sampled import Nulls, nulls
from mixturelens.behaviour.settle import SampleCheck, check_by_samples, foreign_completions, settle
from mixturelens.behaviour.unannounced import Explained, attributed, explain, identify
from mixturelens.completions import GivenCompletions
from mixturelens.models import Pair
from mixturelens.models.cost import announced, check_memory
from mixturelens.models.noise import noised
from mixturelens.shown import Rule, wordings
from mixturelens.stats import interval, map_draws
from mixturelens.suite import Suite
from mixturelens.types import NOT_MEASURED, OTHER, Interval, Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLACK = 1e-3
"""Nats by which the sum of the terms and the independent mean log-ratio may differ besides their intervals."""
NEVER = 1e-6
"""A policy whose weight stays below this everywhere, before and after, does not occur."""

CHECKED = 16
"""Completions under each cue that check one checkpoint alone."""

Progress = Callable[[str], None]


def behaviour_record(
    pair: Pair, *, suite_name: str | None = None, seed: int = 0, progress: Progress | None = None
) -> BehaviourRecord:
    """Measure a pair, or one checkpoint, on its suite.

    With less time than that takes (`pair.budget`) there are fewer questions, which `notes` say. Raises InputError for
    checkpoints that cannot be loaded, for prompts that the tokenizer cannot spell or that do not fit into the models,
    and where the memory allowed is too little.

    >>> behaviour_record(Pair("sft", "rl", suite)).per_cue["A"].after.weights   # doctest: +SKIP
    {'a': 0.9959, 'b': 0.0032, 'other': 0.0009}
    """
    say = progress or (lambda _: None)
    suite, tokenizer = pair.suite, pair.tokenizer
    for line in pair.differences:
        say(f"note: {line}")
    # refuse a bad suite, and what does not fit, before the weights are read
    plan = make_plan(pair, check_texts(suite, suite.neutral, tokenizer))
    say(announced("behaviour", plan.takes))
    check_memory(pair, plan.takes, "behaviour")
    suite = first_questions(suite, plan.questions)
    models = pair.models()
    scorer = Scorer(pair.ends, pair.vocabulary, pair.device)
    with scorer.once():
        spelling = settle(scorer, models, suite, tokenizer)
        spelled = suite.model_copy(update={"spelling": spelling})
        record = _measured(
            scorer,
            models,
            spelled,
            tokenizer,
            seed,
            noise=functools.partial(noised, models, seed) if len(models) > 1 else None,
            progress=progress,
            given=pair.completions,
        )
    return record.model_copy(
        update={
            "provenance": pair.provenance(seed, suite_name),
            "spelling": spelling,
            "notes": (*_origin(suite), *pair.differences, *plan.missing, *record.notes),
        }
    )


def measure_record(
    scorer: Scorer, models: Sequence[Model], suite: Suite, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> BehaviourRecord:
    """The record of one loaded model, or of two, S and R, that come from no pair: intervened models, say.

    The control with noise is null, which needs a pair. Raises InputError for a suite that the tokenizer cannot spell.
    """
    return _measured(scorer, models, suite, tokenizer, seed)


def _measured(
    scorer: Scorer,
    models: Sequence[Model],
    suite: Suite,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    noise: Callable[[], Model] | None = None,
    progress: Progress | None = None,
    given: GivenCompletions | None = None,
) -> BehaviourRecord:
    """`noise` gives S with noise, for a null; it comes last, since it may be written over the models."""
    say = progress or (lambda _: None)
    prompts = prepare(suite, suite.neutral, tokenizer)
    grid = grid_of(prompts, seed)
    common = {
        "policies": tuple(suite.policies),
        "cues": suite.cues,
        "trained_cue": suite.trained_cue,
        "questions": len(grid.index),
        "samples": None if suite.literal else suite.samples,
    }
    say("weights and policy table")
    if len(models) == 1:
        behaviour = measure(scorer, models[0], prompts, seed)
        say("check by samples")
        side = cue_sides(behaviour, suite, grid)
        return BehaviourRecord(
            method="literal" if suite.literal else "sampled",
            coverage={"before": coverage(behaviour, grid)},
            per_cue={cue: CueBehaviour(before=side[c]) for c, cue in enumerate(suite.cues)},
            table=policy_table(behaviour, None, prompts, grid),
            hinted=_hinted(scorer, models, suite, tokenizer, seed),
            identified=identify(suite, _shown(behaviour, grid)) if suite.table else None,
            check=_own_check(scorer, models[0], behaviour, prompts, seed),
            notes=_silent(suite, [behaviour]),
            **common,
        )
    before, after = models
    if given is None:
        change = measure_change(scorer, before, after, prompts, seed)
    else:
        change = measure_given(scorer, (before, after), prompts, given, seed)
    notes = _silent(suite, [change.before, change.after])
    explained = _explained(change, grid, suite)
    bits, per_cue_bits, shares = bits_of(change.bits, grid, suite, explained)
    nats, per_cue_nats, text = nats_of(change, grid, suite, explained)
    if explained:
        change = replace(change, after=attributed(prompts, change.after, explained.after))
    sides = [cue_sides(b, suite, grid) for b in (change.before, change.after)]
    accuracy = accuracy_changes(change, grid, told=explained is None or explained.identified.explanation is not None)
    say("controls")
    drawn = nulls(scorer, before, after, prompts, seed + 11)
    measured: dict[Side, Behaviour] = {"before": change.before, "after": change.after}
    beside: dict[Side, Any] = {side: (measured[side], *drawn.drawn[side]) for side in measured}
    check = check_by_samples(prompts, beside)
    if given is not None:
        foreign = foreign_completions(prompts, beside)
        check = check.model_copy(update={"foreign": foreign, "agrees": check.agrees and not foreign})
    if suite.hinted:
        say("hinted prompts")
    hinted = _hinted(scorer, models, suite, tokenizer, seed)
    say("S against itself, and against noise")
    controls = _controls(
        _nulls_of_bits(scorer, models, noise, prompts, change, seed), grid, nats, drawn, told=not suite.table
    )
    return BehaviourRecord(
        method=change.method,
        overlap=change.overlap,
        coverage={"before": coverage(change.before, grid), "after": coverage(change.after, grid)},
        per_cue={
            cue: CueBehaviour(
                before=sides[0][c],
                after=sides[1][c],
                bits=per_cue_bits[c],
                nats=per_cue_nats[c],
                accuracy_change=accuracy[c],
            )
            for c, cue in enumerate(suite.cues)
        },
        bits=bits,
        **shares,
        text=text,
        nats=nats,
        table=policy_table(change.before, change.after, prompts, grid),
        hinted=hinted,
        controls=controls,
        check=check,
        notes=notes,
        identified=explained and explained.identified,
        **common,
    )


def _shown(behaviour: Behaviour, grid: Grid) -> Float[np.ndarray, "draw cue behaviour"]:
    return grid.draws(behaviour.classes.sum((1, 2)))


def _explained(change: Change, grid: Grid, suite: Suite) -> Explained | None:
    return explain(suite, _shown(change.before, grid), _shown(change.after, grid)) if suite.table else None


def _origin(suite: Suite) -> tuple[str, ...]:
    """That policies and cue are a proposal, where they are one."""
    said = "policies and cue of the suite are a proposal of `discover`, which chose them on other questions"
    return (said,) if suite.origin == "discovered" else ()


def _silent(suite: Suite, behaviours: list[Behaviour]) -> tuple[str, ...]:
    """Policies that never occur. One that announces nothing may well have no weight: no text of it can be wrong."""
    said = []
    for m, policy in enumerate(suite.policies if suite.table is None else ()):
        most = max(float(b.weights[:, m].max()) for b in behaviours)
        if most < NEVER:
            shown = suite.policies[policy]
            how = f"its rule {shown.regex!r}" if isinstance(shown, Rule) else f"its text {wordings(shown)[0]!r}"
            where = "before or after" if len(behaviours) > 1 else "in this checkpoint"
            said.append(
                f"policy {policy!r} never occurs {where} (weight at most {most:.1g} on every prompt); check {how} "
                f"against what the model writes{'' if suite.literal else ', or raise `samples`'}"
            )
    return tuple(said)


def _own_check(scorer: Scorer, model: Model, behaviour: Behaviour, prompts: Prompts, seed: int) -> SampleCheck:
    """The check by samples of one checkpoint alone: CHECKED completions or so under each cue."""
    rows = {cue: [i for i, row in enumerate(prompts.rows) if row.cue == cue][:CHECKED] for cue in prompts.suite.cues}
    at = [i for some in rows.values() for i in some]
    number = -(-CHECKED // min(len(some) for some in rows.values() if some))
    room = [prompts.suite.max_new_tokens] * len(at)
    drawn = scorer.sample(model, [prompts.contexts[i] for i in at], number, room, seed + 11)
    drawn = Completions(np.array(at)[drawn.context], drawn.tokens)
    label = label_completions(scorer, prompts, drawn)
    return check_by_samples(prompts, {"before": (behaviour, drawn.context, label, texts_of(scorer, prompts, drawn))})


def _hinted(
    scorer: Scorer, models: Sequence[Model], suite: Suite, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Mean weights on hinted prompts: whether the hint still brings its policy out."""
    if not suite.hinted:
        return {}
    prompts = prepare(suite, suite.hinted, tokenizer)
    sides = {
        when: measure(scorer, m, prompts, seed).weights for when, m in zip(("before", "after"), models, strict=False)
    }
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for cue, hint in dict.fromkeys((row.cue, row.hint or "") for row in prompts.rows):
        at = [i for i, row in enumerate(prompts.rows) if (row.cue, row.hint) == (cue, hint)]
        found.setdefault(cue, {})[hint] = {
            when: dict(zip((*suite.policies, OTHER), (round(float(x), 10) for x in weights[at].mean(0)), strict=True))
            for when, weights in sides.items()
        }
    return found


def _nulls_of_bits(
    scorer: Scorer,
    models: Sequence[Model],
    noise: Callable[[], Model] | None,
    prompts: Prompts,
    change: Change,
    seed: int,
) -> tuple[Bits, Bits | None]:
    """S against S, and against S with noise, on some of the questions. The latter takes the place of R, and is last."""
    aside, before = prompts.of_questions(ASIDE), models[0]
    some, s = prompts.part(aside), change.before.part(aside)
    suite, grid = prompts.suite, grid_of(some, seed)
    exact = change.method == "literal" and not suite.table

    def against(model: Model, again: Callable[[Scorer, Model, Prompts], Behaviour]) -> Bits:
        if exact:
            return bits_of(bit_terms(s, again(scorer, model, some)), grid, suite, None)[0]
        found = measure_change(scorer, before, model, some, seed)
        return bits_of(found.bits, grid, suite, _explained(found, grid, suite))[0]

    same = against(before, measured_again)
    if noise is None:
        return same, None
    scorer.forget()
    return same, against(noise(), literal_behaviour)


def _controls(bits: tuple[Bits, Bits | None], grid: Grid, nats: Nats, drawn: Nulls, *, told: bool) -> Controls:
    routing, total, ratio = (grid.draws(v).mean(-1) for v in (drawn.shuffled, drawn.kl, drawn.ratio))
    counts = grid.counts_where(drawn.ratio)
    shuffled = map_draws(lambda r, t: r / t, routing, total, counts=counts) if told else NOT_MEASURED
    independent = interval(ratio, counts)
    agrees = None
    if independent.measured and nats.total.measured:
        (low, high), (least, most) = map(_ends, (independent, nats.total))
        agrees = low <= most + SLACK and least - SLACK <= high
    return Controls(
        same_checkpoint=bits[0],
        noise=bits[1],
        shuffled_routing_share=shuffled,
        independent_total=independent,
        sum_agrees=agrees,
    )


def _ends(of: Interval) -> tuple[float, float]:
    """The interval, or the value alone where one question has none."""
    return (of.known, of.known) if of.low is None or of.high is None else (of.low, of.high)
