"""Repair of transfer: bring the harmed cue back without training, by what the cue reader says, and score it."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.averages import policy_table
from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.prompts import Prompts
from mixturelens.behaviour.record import BehaviourRecord, TableCell
from mixturelens.behaviour.repair_questions import WORTH, Ground, make_ground, scale_of
from mixturelens.contrasts import cue_contrasts, policy_tokens
from mixturelens.grafting.components import State
from mixturelens.grafting.graft import save_with
from mixturelens.hooks.batches import as_begun, sides
from mixturelens.hooks.engine import no_gradient_for
from mixturelens.hooks.kept import KeptBeginnings
from mixturelens.hooks.lens import Lens, lens_of, tokens
from mixturelens.hooks.weights import rewritten
from mixturelens.models import Pair
from mixturelens.models.adapter import save_adapter
from mixturelens.models.cost import announced, check_memory
from mixturelens.patching.record import PatchingRecord
from mixturelens.patching.sweep import Bench, find_reader, head_sites
from mixturelens.records import Record
from mixturelens.routing.edit import edited, fit_edit, shrunk
from mixturelens.routing.tries import brief, make_plan
from mixturelens.stats import PROPORTION, interval, too_few
from mixturelens.types import Frozen, InputError, Interval, Intervention, Site
from mixturelens.unfinished import NOTHING_KEPT, Unfinished, attempt

RepairKind = Literal["interchange", "zero", "mean", "steer", "edit", "reroute"]
"""`interchange`: the cue reader's output is that of the trained cue; `zero`, `mean` (over all cues equally): it is
ablated; `steer`: the mean difference between cues is added behind its layer; `edit`: its weights are changed so that it
reads the harmed cue as the trained one. These make the policy that RL chose answer. `reroute` makes the selector read
the cue instead, and hands the harmed one to the silent specialist."""


class Random(Frozen):
    """The same repair at random places of equal size: the distribution that a repair has to leave behind."""

    places: tuple[str, ...]
    harmed: tuple[float, ...]
    """Accuracy under the harmed cue."""
    trained: tuple[float, ...]
    median: float | None
    """Of `harmed`."""
    above: float | None
    """Share of random repairs that reach at least what the repair itself reaches."""
    p: float | None
    """(k + 1) / (n + 1) for k such among n random repairs: few places cannot give a small one."""


class Repair(Frozen):
    """One way to repair, judged on questions that chose neither heads nor strength."""

    kind: RepairKind
    what: tuple[str, ...]
    """The interventions, in words."""
    interventions: tuple[Intervention, ...] = ()
    """As values; empty for an edit of the weights."""
    accuracy: dict[str, Interval]
    """cue -> expected accuracy."""
    gap_closed: Interval
    """(repaired - R) / (best forced accuracy of S - R) under the harmed cue."""
    trained_change: Interval
    """Change of the expected accuracy under the trained cue."""
    cells: tuple[TableCell, ...]
    """The policy table: R (before) and repaired (after)."""
    random: Random


class RepairRecord(Record):
    """Repairs of one pair's harmed cue."""

    KIND = "repair"

    trained_cue: str
    harmed_cue: str
    policy: str
    heads: tuple[Site, ...]
    """The cue reader, found by patching on the other half of the questions."""
    questions: int
    policies: tuple[str, ...]
    cues: tuple[str, ...]
    before: dict[str, Interval]
    """cue -> expected accuracy of S."""
    after: dict[str, Interval]
    """cue -> expected accuracy of R."""
    ceiling: Interval
    """Best forced accuracy of S under the harmed cue: what a repair could reach."""
    repairs: tuple[Repair, ...]
    missing: tuple[str, ...] = ()
    """Ways to repair that this suite does not allow, and why."""
    checkpoint: str | None = None
    """Folder of the repaired checkpoint, an adapter where R is one; null where the edit closes no gap for sure: none is
    kept."""

    @property
    def best(self) -> Repair | None:
        """The repair that closes most of the gap, of those whose share is known; None if there is none."""
        known = [each for each in self.repairs if each.gap_closed.measured]
        return max(known, key=lambda each: each.gap_closed.known, default=None)


# --- measuring --------------------------------------------------------------------------------------------------------

A_READER = 0.5
"""Of the cue's effect: heads that carry less are not called its reader."""
RANDOM = 24
"""Random places, at most, that each repair is compared with."""
DIRECTIONS = 12
"""Random directions that steering is compared with, each at the amount that is best for it."""
AMOUNTS = (0.5, 1.0, 2.0, 4.0)
"""Steering strengths to choose from, in mean differences between the cues."""
NATS = (8.0, 16.0, 24.0, 32.0)
"""Strengths of a reroute to choose from: what it adds to the log-odds of the policies, to first order."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class RepairSettings:
    """What a repair starts from, and where its result goes."""

    patching: PatchingRecord | None = None
    """The cue reader that it found is taken, and only questions are asked that it asked, in the same halves; None: the
    reader is looked for."""
    save_to: Path | None = None
    """Folder of the repaired checkpoint; None: it is not kept."""
    parts: Unfinished = NOTHING_KEPT
    """Repairs that were measured before the work was stopped."""


def repair_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    settings: RepairSettings | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> RepairRecord:
    """Find the cue reader of R on half of the questions, and repair through it; judge on the other half.

    `behaviour` is what was measured of the pair; `say` is told each step. Raises InputError if the trained cue is not
    known or nothing is to be repaired: R does under the other cue what the best policy of S could.
    """
    settings, say = settings or RepairSettings(), say or (lambda _: None)
    patching, save_to = settings.patching, settings.save_to
    missing: list[str] = []
    harm = find_harm(behaviour)
    if harm.change.value is None:
        raise InputError(f"nothing to repair: how accuracy under {harm.harmed_cue!r} changed was not measured")
    if harm.change.low is None or harm.change.high is None:
        raise InputError("one question is not enough: one half chooses what to repair, the other half judges it")
    if harm.change.high > -WORTH:
        raise InputError(
            f"nothing to repair: accuracy under {harm.harmed_cue!r} changed by {harm.change.value:+.3f} "
            f"[{harm.change.low:+.3f}, {harm.change.high:+.3f}], and a loss of {WORTH} or more is needed"
        )
    pair = pair.spelled(behaviour.spelling)
    reader = patching.reader("cue", "after") if patching is not None else None
    if patching is not None and reader is not None:
        every = cue_contrasts(pair.suite, pair.tokenizer, harm.policy, harm.cues, harm.shows)
        some = every.first(patching.questions("cue", "after"))
        if len(some.rows) < len(every.rows):
            missing.append(f"repair: {len(some.rows)} of {len(every.rows)} questions, those of patching")
            pair = pair.asked({row.question for row in some.rows})
    plan = make_plan(pair, harm, RANDOM, DIRECTIONS)
    say(announced("repair", plan.estimate))
    check_memory(pair, plan.estimate, "repair")
    lens = lens_of(pair, "after")
    ground = make_ground(lens, pair.suite, harm, seed)
    began = time.monotonic()
    scale = scale_of(ground, pair.model("before"))
    say(announced("repair", plan.behind(time.monotonic() - began)))
    few, few_choose = brief(ground.judge), brief(ground.choose)
    if reader is not None:
        found_heads, carried = reader.heads, reader.effect
    else:
        say("finding the cue reader")
        told = as_begun(lens_of(pair, "before"), pair.suite, ground.contrasts)
        bench = Bench(lens, told, ["policy"], [(layer, "z") for layer in range(lens.layers)])
        every = bench.patch(head_sites(lens, "policy"))
        found = find_reader(lens, told, "policy", seed, (bench, every))
        found_heads, carried = found.heads, interval(found.effect)
    if carried.high is not None and carried.high < A_READER:
        strongest, ranged = " + ".join(map(str, found_heads)), f"[{carried.low:.2f}, {carried.high:.2f}]"
        missing.append(
            f"a cue reader of one or two heads: the strongest in R, {strongest}, carry {carried.value:.2f} {ranged} of "
            "the cue, and the rest is read elsewhere; where repairs at heads fail, that is why"
        )
    heads = tuple(head.model_copy(update={"position": "completion"}) for head in found_heads)
    others = _other_groups(lens, heads, plan.places, seed)
    places = ["+".join(str(head) for head in group) for group in others]

    def scored(
        kind: RepairKind,
        what: Sequence[str],
        interventions: Sequence[Intervention],
        found: Behaviour,
        names: Sequence[str],
        null: Sequence[Behaviour],
    ) -> Repair:
        tried = [ground.both(each, few) for each in null]
        return Repair(
            kind=kind,
            what=tuple(what),
            interventions=tuple(interventions),
            accuracy=ground.accuracies(found, ground.judge),
            gap_closed=scale.gap_closed(found),
            trained_change=scale.trained_change(found),
            cells=policy_table(scale.after, found, ground.judge, scale.grid),
            random=_random(names, tried, ground.both(found, ground.judge)[0]),
        )

    def at_heads(kind: RepairKind) -> Repair:
        values, *null = ([_at_head(kind, head, harm.trained_cue) for head in group] for group in (heads, *others))
        found = ground.behaviour(values, ground.judge)
        tried = [ground.behaviour(each, few) for each in null]
        return scored(kind, [str(value) for value in values], values, found, places, tried)

    def steered() -> Repair:
        direction = _cue_direction(ground, heads)
        each = (direction, *_random_directions(direction, plan.directions, seed))
        values, *null = ([_steer(ground, heads, vector, few_choose)] for vector in each)
        found = ground.behaviour(values, ground.judge)
        tried = [ground.behaviour(each, few) for each in null]
        names = [f"random direction {number}" for number in range(len(null))]
        return scored("steer", [str(value) for value in values], values, found, names, tried)

    def by_edit() -> Repair:
        def with_edit(group: Sequence[Site], prompts: Prompts) -> Behaviour:
            with rewritten(lens, edited(lens, fit_edit(ground, group))):
                # other weights leave other keys and values behind
                return replace(ground, kept=KeptBeginnings(lens)).behaviour((), prompts)

        some = others[: plan.edits]
        what = [
            f"L{head.layer}: head {head.head} reads the cue {harm.harmed_cue} as {harm.trained_cue}" for head in heads
        ]
        tried = [with_edit(group, few) for group in some]
        return scored("edit", what, (), with_edit(heads, ground.judge), places[: plan.edits], tried)

    def rerouted() -> Repair:
        able = behaviour.per_cue[harm.harmed_cue].before.accuracy
        known = {name: value for name, value in able.items() if name != harm.policy and value is not None}
        if not known:
            raise InputError(f"no policy but {harm.policy} could be put in place in S, so that none is known to answer")
        best = max(known, key=lambda name: known[name])
        read, offset, towards = _cue_and_choice(ground, best)

        def by(vector: np.ndarray, nats: float) -> Intervention:
            return _reroute(ground, read, offset, nats * vector)

        nats = max(NATS, key=lambda n: min(ground.both(ground.behaviour([by(towards, n)], few_choose), few_choose)))
        value, *null = (by(each, nats) for each in (towards, *_random_directions(towards, plan.directions, seed)))
        found = ground.behaviour([value], ground.judge)
        tried = [ground.behaviour([each], few) for each in null]
        names = [f"random direction {number}" for number in range(len(null))]
        what = f"{value.site} <- {nats:g} nats towards policy {best}, where the cue is read as {harm.harmed_cue}"
        return scored("reroute", [what], [value], found, names, tried)

    ways: dict[RepairKind, Callable[[], Repair]] = {
        "interchange": lambda: at_heads("interchange"),
        "zero": lambda: at_heads("zero"),
        "mean": lambda: at_heads("mean"),
        "steer": steered,
        "edit": by_edit,
        "reroute": rerouted,
    }
    repairs: list[Repair] = []
    missing += plan.missing
    asked = len({row.id for row in pair.suite.neutral})
    at = f"{', '.join(map(str, heads))}; {asked} questions; {plan.places}, {plan.directions}, {plan.edits} random"
    for kind, way in ways.items():
        say(f"repair: {kind}")
        done = attempt(kind, functools.partial(settings.parts.value, f"{kind} at {at}", Repair, way), missing)
        repairs += [] if done is None else [done]
    works = [
        each for each in repairs if each.kind == "edit" and each.gap_closed.low is not None and each.gap_closed.low > 0
    ]
    if save_to is not None and works:
        missing += _save(pair, edited(lens, fit_edit(ground, heads)), save_to)
    return RepairRecord(
        trained_cue=harm.trained_cue,
        harmed_cue=harm.harmed_cue,
        policy=harm.policy,
        heads=heads,
        questions=len(scale.grid.index),
        policies=tuple(pair.suite.policies),
        cues=pair.suite.cues,
        before=ground.accuracies(scale.before, ground.judge),
        after=ground.accuracies(scale.after, ground.judge),
        ceiling=interval(scale.ceiling, scale.grid.counts, bounds=PROPORTION),
        repairs=tuple(repairs),
        missing=(*missing, *too_few("repairs", len(scale.grid.index))),
        checkpoint=save_to.name if save_to is not None and works else None,
    )


def _save(pair: Pair, weights: State, folder: Path) -> list[str]:
    """Write R with edited weights: as an adapter where R is one and the edit can join it, and why not otherwise."""
    missing, after = [], pair.after
    if after is not None and after.is_adapter:
        try:
            save_adapter(after, weights, pair.tokenizer, folder)
            return []
        except InputError as error:
            missing.append(f"repaired adapter: {error}; a checkpoint with all weights was written instead")
    save_with(pair.model("after"), weights, pair.tokenizer, folder)
    return missing


def _at_head(kind: str, head: Site, trained_cue: str) -> Intervention:
    if kind == "interchange":
        return Intervention(site=head, do="replace", source=trained_cue)
    return Intervention(site=head, do="scale", amount=0.0) if kind == "zero" else Intervention(site=head, do="mean")


def _other_groups(lens: Lens, heads: Sequence[Site], most: int, seed: int) -> list[tuple[Site, ...]]:
    """Groups of as many heads, none of them of the reader: all of them, or so many drawn ones."""
    known = {(head.layer, head.head) for head in heads}
    rest = [site for site in head_sites(lens, "completion") if (site.layer, site.head) not in known]
    groups = list(itertools.combinations(rest, len(heads)))
    if len(groups) > most:
        drawn = np.random.default_rng(seed).choice(len(groups), most, replace=False)
        groups = [groups[i] for i in sorted(drawn)]
    return groups


def _random(names: Sequence[str], tried: Sequence[tuple[float, float]], reached: float) -> Random:
    harmed = tuple(round(harmed, 6) for harmed, _ in tried)
    return Random(
        places=tuple(names),
        harmed=harmed,
        trained=tuple(round(trained, 6) for _, trained in tried),
        median=float(np.median(harmed)) if harmed else None,
        above=float(np.mean([value >= reached for value in harmed])) if harmed else None,
        p=(sum(value >= reached for value in harmed) + 1) / (len(harmed) + 1) if harmed else None,
    )


# --- steering ---------------------------------------------------------------------------------------------------------


def _cue_direction(ground: Ground, heads: Sequence[Site]) -> np.ndarray:
    """Mean difference between the cues behind the reader's last layer, at the policy word."""
    key = (max(head.layer for head in heads), "resid_post")
    both = sides(ground.lens, ground.contrasts.half(0))
    clean, corrupt = (ground.lens.capture(batch, [key])[0][key][:, -1] for batch in (both.clean, both.corrupt))
    return (clean - corrupt).mean(0).double().cpu().numpy()


def _steer(ground: Ground, heads: Sequence[Site], direction: np.ndarray, choose: Prompts) -> Intervention:
    """Along a direction, by the amount that repairs best on the questions that choose."""
    site = Site(layer=max(head.layer for head in heads), component="resid_post", position="completion")
    vector = tuple(float(x) for x in direction)
    tried = [Intervention(site=site, do="add", vector=vector, amount=amount) for amount in AMOUNTS]
    return max(tried, key=lambda each: min(ground.both(ground.behaviour([each], choose), choose)))


def _random_directions(direction: np.ndarray, number: int, seed: int) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed).normal(size=(number, len(direction)))
    return list(drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * np.linalg.norm(direction))


# --- a reroute ----------------------------------------------------------------------------------------------------


def _cue_and_choice(ground: Ground, policy: str) -> tuple[np.ndarray, float, np.ndarray]:
    """At the prompt's last token behind the last layer: how to read the cue, and which way the choice of policy lies.

    The reading is 0 in the mean under the trained cue and 1 under the harmed one, along the direction that tells them
    apart best (linear discriminant, shrunk as `_shrunk`). The choice is the gradient of the log-odds of `policy`
    against the one that RL chose, scaled to one nat. Raises InputError where announcements do not tell the two apart.
    """
    lens, harm = ground.lens, ground.harm
    target, foil = policy_tokens(ground.suite, lens.tokenizer, harm.harmed_cue, policy, harm.policy)
    key = (lens.layers - 1, "resid_post")

    def at_last(cue: str) -> tuple[torch.Tensor, torch.Tensor]:
        contexts = [ids for ids, row in zip(ground.choose.contexts, ground.choose.rows, strict=True) if row.cue == cue]
        found: list[torch.Tensor] = []

        def keep(activation: torch.Tensor) -> torch.Tensor:
            found.append(activation.detach().requires_grad_())
            return found[0]

        with torch.enable_grad(), no_gradient_for(lens.model):
            logits = lens.run(tokens(contexts, lens.device), [(lens.point(*key), keep)])[:, -1]
            odds = logits[:, list(target)].logsumexp(-1) - logits[:, list(foil)].logsumexp(-1)
            (gradient,) = torch.autograd.grad(odds.sum(), found)
        return found[0][:, -1].detach().double(), gradient[:, -1].double().mean(0)

    (trained, _), (harmed, gradient) = (at_last(cue) for cue in (harm.trained_cue, harm.harmed_cue))
    if len(trained) < 2 or len(harmed) < 2:
        raise InputError("what reads the cue is learnt on one half of the questions: give at least four")
    apart = harmed.mean(0) - trained.mean(0)
    spread = shrunk((trained.T.cov() + harmed.T.cov()) / 2)
    read = torch.linalg.solve(spread, apart)
    read = read / (read @ apart)
    offset = float(read @ trained.mean(0))
    return read.cpu().numpy(), offset, (gradient / (gradient @ gradient)).cpu().numpy()


def _reroute(ground: Ground, read: np.ndarray, offset: float, vector: np.ndarray) -> Intervention:
    """Add the vector as far as the cue is read as the harmed one: in the mean nothing under the trained cue."""
    site = Site(layer=ground.lens.layers - 1, component="resid_post", position="last")
    numbers = [tuple(float(x) for x in each) for each in (read, -vector)]
    return Intervention(site=site, do="clamp", read=numbers[0], offset=offset, vector=numbers[1], amount=0.0)
