"""The behaviour instrument: a checkpoint or a pair, and a suite, to one record with intervals and controls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, BitTerms, Change
from mixturelens.behaviour.bits import bit_terms, never_drawn
from mixturelens.behaviour.forced import label_completions, texts_of
from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.literal import literal_behaviour, measured_again
from mixturelens.behaviour.measure import measure, measure_change
from mixturelens.behaviour.plan import first_questions, make_plan
from mixturelens.behaviour.prompts import ASIDE, Prompts, check_texts, prepare
from mixturelens.behaviour.record import (
    AccuracyChange,
    BehaviourRecord,
    Bits,
    Controls,
    CueBehaviour,
    CueSide,
    Nats,
    TableCell,
    Text,
)
from mixturelens.behaviour.sampled import Nulls, nulls
from mixturelens.behaviour.settle import SampleCheck, check_by_samples, settle
from mixturelens.behaviour.split import accuracy_split
from mixturelens.behaviour.unannounced import Explained, attributed, explain, identify
from mixturelens.models import Pair
from mixturelens.models.cost import check_memory
from mixturelens.models.noise import noised
from mixturelens.stats import PROPORTION, interval, map_draws, mean_interval
from mixturelens.suite import Rule, Suite, wordings
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
    say(f"behaviour: {plan.takes}")
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
        side = _sides(behaviour, suite, grid)
        return BehaviourRecord(
            method="literal" if suite.literal else "sampled",
            coverage={"before": _coverage(behaviour, grid)},
            per_cue={cue: CueBehaviour(before=side[c]) for c, cue in enumerate(suite.cues)},
            table=policy_table(behaviour, None, prompts, grid),
            hinted=_hinted(scorer, models, suite, tokenizer, seed),
            identified=identify(suite, _shown(behaviour, grid)) if suite.table else None,
            check=_own_check(scorer, models[0], behaviour, prompts, seed),
            notes=_silent(suite, [behaviour]),
            **common,
        )
    before, after = models
    change = measure_change(scorer, before, after, prompts, seed)
    notes = _silent(suite, [change.before, change.after])
    explained = _explained(change, grid, suite)
    bits, per_cue_bits, shares = bits_of(change.bits, grid, suite, explained)
    nats, per_cue_nats, text = nats_of(change, grid, suite, explained)
    if explained:
        change = replace(change, after=attributed(prompts, change.after, explained.after))
    sides = [_sides(b, suite, grid) for b in (change.before, change.after)]
    accuracy = _accuracy_change(change, grid, told=explained is None or explained.identified.explanation is not None)
    say("controls")
    drawn = nulls(scorer, before, after, prompts, seed + 11)
    measured: dict[Side, Behaviour] = {"before": change.before, "after": change.after}
    check = check_by_samples(prompts, {side: (measured[side], *drawn.drawn[side]) for side in measured})
    say("hinted prompts")
    hinted = _hinted(scorer, models, suite, tokenizer, seed)
    controls = _controls(
        _nulls_of_bits(scorer, models, noise, prompts, change, seed), grid, nats, drawn, told=not suite.table
    )
    return BehaviourRecord(
        method=change.method,
        overlap=change.overlap,
        coverage={"before": _coverage(change.before, grid), "after": _coverage(change.after, grid)},
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


def _coverage(behaviour: Behaviour, grid: Grid) -> Interval:
    return interval(grid.draws(1 - behaviour.weights[:, -1]).min(-1), grid.counts)


def _sides(behaviour: Behaviour, suite: Suite, grid: Grid) -> list[CueSide]:
    names = (*suite.policies, OTHER)
    weights, forced = grid.draws(behaviour.weights), grid.draws(behaviour.forced_accuracy)
    overall = grid.draws(behaviour.correct.sum(-1))
    sides = []
    for c in range(len(suite.cues)):
        w = {name: interval(weights[:, c, m], grid.counts, bounds=PROPORTION) for m, name in enumerate(names)}
        a = {name: interval(forced[:, c, m], grid.counts, bounds=PROPORTION) for m, name in enumerate(suite.policies)}
        whole = interval(overall[:, c], grid.counts, bounds=PROPORTION)
        sides.append(
            CueSide(
                weights={name: value.known for name, value in w.items()},
                accuracy={name: value.value for name, value in a.items()},
                overall=whole.known,
                intervals={
                    **{f"weights.{name}": value for name, value in w.items()},
                    **{f"accuracy.{name}": value for name, value in a.items()},
                    "overall": whole,
                },
            )
        )
    return sides


def bits_of(
    found: BitTerms, grid: Grid, suite: Suite, explained: Explained | None
) -> tuple[Bits, list[Bits], dict[str, Interval]]:
    """The terms in bits, averaged over cues and per cue, with intervals over questions, and the record's shares of
    them.
    """
    routing, conditioning, specialist, dormant = (
        grid.draws(getattr(found, name)) for name in ("routing", "conditioning", "specialist", "dormant")
    )
    if explained:
        # no prompt alone tells policies apart: so far, conditioning is what tells behaviours
        skill = specialist - conditioning
        routing, conditioning = explained.bits
        specialist, dormant = conditioning + skill, np.full_like(skill, np.nan)
    drawn = {"routing": routing, "specialist": specialist, "conditioning": conditioning, "dormant": dormant}
    # averaged first and bounded then: what chance puts under one cue it takes from another
    terms, means = (
        _bounded(each, bool(suite.behaviour_names))
        for each in (drawn, {name: values.mean(-1) for name, values in drawn.items()})
    )
    routing, specialist, conditioning = means["routing"], means["specialist"], means["conditioning"]
    moved = interval(routing + specialist, grid.counts)
    shares = {
        "routing_share": map_draws(lambda r, s: r / (r + s), routing, specialist, counts=grid.counts),
        "router_share": map_draws(
            lambda r, s, c: (r + c) / (r + s), routing, specialist, conditioning, counts=grid.counts
        ),
    }
    asked = (grid.index >= 0).sum(0)  # prompts under each cue

    def unseen(prompts: int) -> float:
        return 0.0 if suite.literal else never_drawn(suite.samples * max(1, prompts))

    def bits(values: Mapping[str, np.ndarray], prompts: int) -> Bits:
        there = {name: interval(each, grid.counts) for name, each in values.items()}
        return Bits(**{name: _more(each, unseen(prompts)).within(0.0, 1.0) for name, each in there.items()})

    per_cue = [bits({name: values[:, c] for name, values in terms.items()}, int(asked[c])) for c in range(len(asked))]
    every = unseen(int(asked.sum()))
    shares = {name: _less_sure(share, every, moved).within(0.0, 1.0) for name, share in shares.items()}
    return bits(means, int(asked.sum())), per_cue, {"moved": _more(moved, every).within(0.0, 2.0), **shares}


def _more(of: Interval, unseen: float) -> Interval:
    """With room for what was never drawn: without any spread between questions, an interval has none."""
    if of.value is None or of.high is None:
        return of
    return of.model_copy(update={"high": max(of.high, of.value + unseen)})


def _less_sure(share: Interval, unseen: float, moved: Interval) -> Interval:
    """The same for a share of what moved: `unseen` may be missing from either side of it."""
    if share.value is None or share.low is None or share.high is None or not moved.value or moved.value <= 0:
        return share
    part, whole = share.value * moved.value, moved.value + unseen
    return share.model_copy(
        update={"low": min(share.low, part / whole), "high": max(share.high, (part + unseen) / whole)}
    )


def _bounded(found: Mapping[str, np.ndarray], told: bool) -> dict[str, np.ndarray]:
    """All terms, within what there can be, from which estimates from samples may lie a little away.

    Not `told` which behaviour is which: the specialist's term can only be measured, not told apart.
    """
    routing, specialist, dormant = (found[name].clip(0.0, 1.0) for name in ("routing", "specialist", "dormant"))
    conditioning = found["conditioning"].clip(0.0, specialist) if told else np.full_like(specialist, np.nan)
    return {
        "routing": routing,
        "specialist": specialist,
        "conditioning": conditioning,
        "skill": specialist - conditioning,
        "dormant": dormant,
    }


def nats_of(change: Change, grid: Grid, suite: Suite, explained: Explained | None) -> tuple[Nats, list[Nats], Text]:
    """The terms in nats, averaged over cues and per cue, with intervals over questions, and those of text per token."""
    terms = {field.name: grid.draws(getattr(change.nats, field.name)) for field in fields(change.nats)}
    length = terms.pop("length")
    if explained:
        # no prompt alone tells policies apart: so far, conditioning is all of KL(behaviours)
        terms["other"] = terms["conditioning"] - explained.nats[0] - explained.nats[1]
        terms["total"] = terms["conditioning"] + terms["skill"] + terms["text"]
        terms["routing"], terms["conditioning"] = explained.nats
        terms["wording"] = np.full_like(length, np.nan)
    else:
        terms["total"] = sum(terms.values(), np.zeros_like(length))
    terms["specialist"] = terms["conditioning"] + terms["skill"]
    if not suite.behaviour_names:
        terms["conditioning"] = terms["skill"] = np.full_like(length, np.nan)
    means = {name: values.mean(-1) for name, values in terms.items()}
    # text, and what it is part of, may have been asked of some questions alone
    some = grid.counts_where(change.nats.text)
    counts = {name: some if name in ("text", "other", "total") else grid.counts for name in terms}
    per_cue = [
        Nats(**{name: interval(values[:, c], counts[name]) for name, values in terms.items()})
        for c in range(grid.index.shape[1])
    ]
    per_token = map_draws(lambda text, tokens: text / tokens, means["text"], length.mean(-1), counts=some)
    whole = Nats(**{name: interval(values, counts[name]) for name, values in means.items()})
    return whole, per_cue, Text(nats_per_token=per_token)


def _accuracy_change(change: Change, grid: Grid, *, told: bool) -> list[AccuracyChange]:
    """Prompt by prompt where each policy's accuracy is known on each prompt, else from the means under a cue.

    Not `told` which policy did what: the total alone.
    """
    pairs = [(b.weights, b.correct) for b in (change.before, change.after)]
    with np.errstate(divide="ignore", invalid="ignore"):
        if change.method == "sampled":
            (w_s, j_s), (w_r, j_r) = [(grid.draws(w), grid.draws(j)) for w, j in pairs]
            selector, specialists = accuracy_split(w_s, j_s / w_s, w_r, j_r / w_r)
        else:
            (w_s, j_s), (w_r, j_r) = pairs
            split = accuracy_split(w_s, j_s / w_s, w_r, j_r / w_r)
            selector, specialists = (grid.draws(values) for values in split)
    return [
        AccuracyChange(
            selector=interval(selector[:, c], grid.counts) if told else NOT_MEASURED,
            specialists=interval(specialists[:, c], grid.counts) if told else NOT_MEASURED,
            total=interval(selector[:, c] + specialists[:, c], grid.counts),
        )
        for c in range(grid.index.shape[1])
    ]


def policy_table(before: Behaviour, after: Behaviour | None, prompts: Prompts, grid: Grid) -> tuple[TableCell, ...]:
    """The cells of the policy table: what happens with every policy put in place under every cue, and what changed
    there.
    """
    suite = prompts.suite
    names = suite.behaviour_names
    cells = []
    for c, cue in enumerate(suite.cues):
        at = grid.index[:, c]
        known = at >= 0
        counts = grid.counts[:, known]
        rows = at[known]
        for a in prompts.announcements:
            cell = rows, a.policy, a.wording
            shown = [b.forced_behaviour[cell] for b in (before, after) if b is not None]
            right = [b.forced_correct[cell] for b in (before, after) if b is not None]
            means = [{name: float(np.nanmean(s[:, b])) for b, name in enumerate(names)} for s in shown]
            usual = max(means[0], key=lambda name: means[0][name]) if names else None
            changes = {}
            if after is not None:
                changes["accuracy_change"] = mean_interval(right[1] - right[0], counts)
                if usual is not None:
                    b = names.index(usual)
                    changes["behaviour_change"] = mean_interval(shown[1][:, b] - shown[0][:, b], counts)
            cells.append(
                TableCell(
                    cue=cue,
                    policy=list(suite.policies)[a.policy],
                    announcement=a.text,
                    behaviour=usual,
                    shown_before=means[0],
                    shown_after=means[1] if after is not None else None,
                    accuracy_before=float(np.nanmean(right[0])),
                    accuracy_after=float(np.nanmean(right[1])) if after is not None else None,
                    **changes,
                )
            )
    return tuple(cells)


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
