"""The graft instrument: a pair and a suite to one record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from torch import nn

from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.harmed import gained_and_lost
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import Prompts, prepare, without_behaviours
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.grafting.announced import as_announced
from mixturelens.grafting.cells import Cells
from mixturelens.grafting.components import State, parts, weights_of
from mixturelens.grafting.effects import Judge
from mixturelens.grafting.graft import (
    PLAYERS,
    GraftTrial,
    WorkingModel,
    groups,
    halves,
    needed,
    null,
    players,
    save_with,
    shapley,
    specialist_part,
    two_by_two,
    written,
)
from mixturelens.grafting.path import FEW_NODES, Attribution, attribute
from mixturelens.grafting.plan import JUDGED, QUESTIONS, plan
from mixturelens.grafting.positions import placed
from mixturelens.grafting.readings import Readings, metric_names, metrics, readings_of
from mixturelens.grafting.record import (
    UNMEASURED,
    Component,
    Graft,
    GraftRecord,
    PathAttribution,
    PlacedGraft,
    Rollback,
    Search,
)
from mixturelens.grafting.search import pieces, search, unsound
from mixturelens.grafting.starts import starts_of
from mixturelens.grafting.usual import make_cells, method_of
from mixturelens.hooks.weights import components_of
from mixturelens.models import Pair
from mixturelens.models.cost import announced, check_memory, size_of
from mixturelens.shown import wordings
from mixturelens.stats import PROPORTION, half_of, interval, mean_interval, resample_counts, resampled_mean, too_few
from mixturelens.suite import PromptRow
from mixturelens.types import NOT_MEASURED, Interval
from mixturelens.unfinished import NOTHING_KEPT, Unfinished, attempt

SHARED = 64
"""Questions, at most, of Shapley shares, which try every set of components."""

SETTLED = 0.01
"""Share of a change (of at least 0.05 nats) by which its attribution may miss it."""

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class GraftSettings:
    """How much is grafted, and where the rollback goes."""

    exhaustive: bool = False
    """On a model of many components groups of layers are grafted first, and opened where they matter: this opens all,
    whatever time it takes."""
    save_to: Path | None = None
    """Folder of the rollback, R with S's selector, as a plain checkpoint; None: it is not kept."""
    parts: Unfinished = NOTHING_KEPT
    """Where what was measured is kept until the record is whole."""


def graft_record(
    pair: Pair, behaviour: BehaviourRecord, settings: GraftSettings | None = None, seed: int = 0, say: Say | None = None
) -> GraftRecord:
    """Which components carry what RL changed: alone (do they suffice?), missing (are they needed?), and in between.

    `behaviour` is what was measured of the pair; `say` is told each step. Raises InputError for folders that are no
    pair, and where a policy cannot be put in place or has no other beside it.
    """
    settings, say = settings or GraftSettings(), say or (lambda _: None)
    policies = gained_and_lost(behaviour)
    pair.check_one_function("a graft")
    pair = pair.spelled(behaviour.spelling)
    suite, tokenizer = pair.suite, pair.tokenizer
    rows = some_questions(suite.neutral)
    prompts = prepare(suite, rows, tokenizer)
    about = 3 * size_of(pair).layers + 3  # components: three a layer, and what is before and behind
    planned, needed_here = plan(pair, prompts, about, settings.exhaustive)
    say(announced("grafts", needed_here))
    check_memory(pair, needed_here, "grafts")
    s, r = (pair.model(side) for side in pair.sides)
    scorer = Scorer(pair.ends, pair.vocabulary, pair.device)
    told = as_announced(prompts, (s, r), scorer, seed)
    cells = make_cells(told, s, scorer, seed)
    say("components")
    components = components_of(s, tokenizer)
    state_s, state_r = weights_of(s), weights_of(r)
    found = parts(components, state_s, state_r)
    changed = {part.name: components[part.name] for part in found if part.change > 0}
    bench = WorkingModel(s, state_s, state_r, changed, cells, parts=settings.parts)
    judge = Judge(cells, policies, bench.readings(()), bench.readings(changed), cells.grid)
    missing: list[str] = list(planned.missing)

    trial, searched = GraftTrial(bench, judge), planned.searched is not None and bool(changed)
    if searched:
        trial = _few(trial, planned.searched or 0)
        trial.bench.begin()
    path = None
    if planned.path and changed:
        say("attribution along the path")
        path = attempt("path attribution", lambda: _path(trial, policies, searched, settings.parts), missing)
    unsettled = [line.metric for line in _sums(path) if not settled(line)]
    if unsettled:
        missing.append(f"path attribution: its parts do not add up to the change of {', '.join(unsettled)}")
    looked = None
    if searched:
        say("grafts of groups of layers, and of what they are made of where they matter")
        looked = search(trial, planned.grafts, path, planned.everything)
        missing += _unseen(looked)
        bench = replace(bench, pieces=pieces(looked))
        trial = GraftTrial(replace(trial.bench, pieces=bench.pieces), trial.judge)
    else:
        say("grafts of every component and group")
    bench_groups = {
        name: Graft(components=members, effects=trial.effects(members))
        for name, members in groups(tuple(changed)).items()
        if not searched or not name.startswith("layer")
    }
    shares = {}
    if searched:
        missing.append("Shapley shares: they try every set of components, and a search does not")
    else:
        shares = _shapley(bench, judge, missing)
    alone = {name for name in changed if looked is None or (name,) in {each.components for each in looked.blocks}}
    every = tuple(_component(name, trial, shares, path, name in alone) for name in changed)
    choosing, judging = (trial, _other_half(bench, judge) or trial) if searched else halves(bench, judge)
    factorial = None
    if not judge.moved_cues.any():
        missing.append(f"factorial, rollback: log c({policies[0]}) / c({policies[1]}) does not surely change")
    elif len(cells.grid.index) < 2:
        missing.append("factorial, rollback: one question cannot both choose the selector and judge it")
    else:
        say("selector and rest")
        if searched and len(judging.judge.grid.index) < len(cells.grid.index) // 2:
            missing.append(f"selector, rest and rollback are judged on {len(judging.judge.grid.index)} questions")
        factorial = two_by_two(choosing, judging, seed, noise=trial if searched else None)
    specialists = None
    if judge.moved_cells.any() and len(cells.grid.index) > 1:
        specialists = specialist_part(choosing, judging)
    else:
        missing.append("specialist part: what policies do does not surely differ")
    say("noise of the size of R's change")
    noise = null(trial, seed)
    at: dict[tuple[str, ...], Readings] = {}
    if planned.positions and changed:
        what = "grafts at some positions"
        say(what)
        at = attempt(what, lambda: _placed(s, r, trial.bench.cells, settings.parts), missing) or {}
    rollback = None
    if factorial is not None:
        say("rollback")
        back, also, enough = needed(choosing, judging)
        weights = {name: state_s[name] for each in bench.key(back) for name in changed[each]}
        few = planned.searched if searched else None
        ids = [cells.questions[i] for i in half_of(len(cells.questions), 1, few)]
        rows = tuple(row for row in suite.neutral if row.id in set(ids))
        accuracy = _rolled_back((s, r), weights, prepare(suite, rows, tokenizer), scorer, seed)
        if settings.save_to is not None:
            save_with(r, weights, tokenizer, settings.save_to)
        rollback = Rollback(
            components=back,
            also=also,
            enough=enough,
            accuracy=accuracy,
            checkpoint=settings.save_to.name if settings.save_to else None,
        )
    return GraftRecord(
        provenance=pair.provenance(seed),
        policies=policies,
        method=method_of(suite),
        texts={} if told is prompts else {name: wordings(shown) for name, shown in told.suite.policies.items()},
        cues=suite.cues,
        questions=len(cells.grid.index),
        coverage=round(judge.coverage, 6),
        usual=round(judge.usual, 6),
        shown=round(judge.shown, 6),
        change=_changes(judge),
        after=judge.effects(judge.after),
        parts=found,
        components=every,
        groups=bench_groups,
        search=looked,
        path=_sums(path),
        factorial=factorial,
        specialist_part=specialists,
        placed=tuple(PlacedGraft(positions=names, effects=trial.judge.effects(each)) for names, each in at.items()),
        rollback=rollback,
        null=noise,
        missing=(*missing, *too_few("grafts", len(cells.grid.index), *([factorial.questions] if factorial else ()))),
    )


def _few(trial: GraftTrial, questions: int) -> GraftTrial:
    """On some questions of the half that chooses, so that the other half can judge."""
    judge = trial.judge
    index = judge.grid.index[half_of(len(judge.grid.index), 0, questions)]
    some = _on(trial, index)
    starts = starts_of(some.bench.model, some.bench.cells)
    return GraftTrial(replace(some.bench, starts=starts), some.judge)


def _other_half(bench: WorkingModel, judge: Judge) -> GraftTrial | None:
    """Up to JUDGED questions of the half that chooses nothing; None where there is one question alone."""
    rows = half_of(len(judge.grid.index), 1, JUDGED)
    return _on(GraftTrial(bench, judge), judge.grid.index[rows]) if rows else None


def _on(trial: GraftTrial, index: Int[np.ndarray, "question cue"]) -> GraftTrial:
    """The same for the prompts of some questions alone."""
    bench, judge = trial.bench, trial.judge
    prompts = sorted(int(i) for i in index.ravel() if i >= 0)
    cells = bench.cells.part(prompts)
    before, after = judge.before.part(prompts), judge.after.part(prompts)
    return GraftTrial(bench.on(cells, before, after), Judge(cells, judge.policies, before, after, cells.grid, judge))


def _path(trial: GraftTrial, policies: tuple[str, str], large: bool, parts: Unfinished) -> Attribution:
    nodes = (FEW_NODES, 3 * FEW_NODES) if large else ()

    def measure() -> dict[str, np.ndarray]:
        found = attribute(trial.bench, policies, *nodes)
        words = json.dumps([found.names, found.parts, found.questions]).encode()
        arrays = {"values": found.values, "change": found.change, "points": np.array([found.points])}
        return {**arrays, "words": np.frombuffer(words, np.uint8)}

    found = parts.arrays(f"{trial.bench.cells.digest} path {nodes}", measure)
    parts.write()
    names, of, questions = (tuple(words) for words in json.loads(found["words"].tobytes()))
    return Attribution(names, of, questions, found["values"], found["change"], int(found["points"][0]))


def _placed(before: nn.Module, after: nn.Module, cells: Cells, parts: Unfinished) -> dict[tuple[str, ...], Readings]:
    def measure() -> dict[str, np.ndarray]:
        found = placed(before, after, cells)
        return {f"{i:03d} {json.dumps(names)}": each.array for i, (names, each) in enumerate(found.items())}

    found = parts.arrays(f"{cells.digest} positions", measure)
    return {tuple(json.loads(key[4:])): readings_of(found[key], cells) for key in sorted(found)}


def _unseen(found: Search) -> list[str]:
    """What a search left out, and what that may hide."""
    closed = [each for each in found.blocks if not each.opened and len(each.components) > 1]
    said = []
    if closed:
        hidden = sum(len(each.components) for each in closed)
        bounds = [each.bound for each in closed if each.bound is not None]
        most = f"at most {max(bounds):.2f}" if bounds else "an unknown share"
        said.append(
            f"grafts of {hidden} components one by one: they are parts of {len(closed)} groups of layers that move "
            f"{most} of R's change each, which bounds them if the parts of a group do not cancel; --exhaustive grafts "
            "them all"
        )
    for name in unsound(found):
        said.append(f"grafts of the parts of {name}: path attribution says that they cancel; --exhaustive grafts them")
    if found.short:
        said.append(f"grafts of the parts of {', '.join(found.short)}: they matter, and there was no time for them")
    return said


def some_questions(rows: tuple[PromptRow, ...], number: int = QUESTIONS) -> tuple[PromptRow, ...]:
    """Prompts of at most so many questions, drawn once and for all, each with all its cues."""
    ids = list(dict.fromkeys(row.id for row in rows))
    if len(ids) <= number:
        return rows
    kept = {ids[i] for i in np.random.default_rng(0).permutation(len(ids))[:number]}
    return tuple(row for row in rows if row.id in kept)


def _shapley(bench: WorkingModel, judge: Judge, missing: list[str]) -> dict[str, Interval]:
    who = players(bench.names)
    if not judge.moved_cues.any():
        return {}
    if len(who) > PLAYERS:
        missing.append(f"Shapley shares: {len(who)} components changed, and at most {PLAYERS} are shared among")
        return {}
    joined = [f"{' and '.join(rest)} with {name}" for name, (_, *rest) in who.items() if rest]
    if joined:
        missing.append(f"Shapley shares of norms alone: they are counted together ({', '.join(joined)})")
    few = np.random.default_rng(0).permutation(len(judge.grid.index))[:SHARED]
    some = _on(GraftTrial(bench, judge), judge.grid.index[few])
    values = shapley(who, lambda names: some.judge.odds(some.bench.log_c(names)))
    return {name: some.judge.shares(odds) for name, odds in values.items()}


def _component(
    name: str, trial: GraftTrial, shares: dict[str, Interval], path: Attribution | None, grafted: bool
) -> Component:
    routing, specialists = NOT_MEASURED, {}
    if path is not None:
        values = path.values[..., path.parts.index(name)]  # [question, metric]
        counts = resample_counts(len(values), trial.bench.cells.seed)
        is_routing = np.array([metric.startswith("routing@") for metric in path.names])
        routing = interval(np.nanmean(resampled_mean(values[:, is_routing], counts), -1), counts)
        specialists = {
            metric: mean_interval(values[:, k], counts) for k, metric in enumerate(path.names) if not is_routing[k]
        }
    return Component(
        name=name,
        suffices=trial.effects([name]) if grafted else UNMEASURED,
        without=trial.effects([c for c in trial.bench.components if c != name]) if grafted else UNMEASURED,
        routing=routing,
        specialists=specialists,
        shapley=shares.get(name, NOT_MEASURED),
    )


def _changes(judge: Judge) -> dict[str, Interval]:
    tables = [metrics(each, judge.cells, judge.policies)[0].cpu().numpy() for each in (judge.before, judge.after)]
    change = tables[1] - tables[0]
    return {name: mean_interval(change[:, k], judge.grid.counts) for k, name in enumerate(metric_names(judge.cells))}


def _sums(path: Attribution | None) -> tuple[PathAttribution, ...]:
    if path is None:
        return ()
    return tuple(
        PathAttribution(
            metric=name,
            change=round(float(np.nanmean(path.change[:, k])), 10),
            sum=round(float(np.nanmean(path.values[:, k].sum(-1))), 10),
            points=path.points,
        )
        for k, name in enumerate(path.names)
    )


def settled(line: PathAttribution) -> bool:
    """Whether path attribution adds up to the change of its metric, within SETTLED of it (or of 0.05 nats)."""
    return abs(line.sum - line.change) <= SETTLED * max(abs(line.change), 0.05)


# --- rollback ---------------------------------------------------------------------------------------------------------


def _rolled_back(
    models: tuple[Any, Any], weights: State, prompts: Prompts, scorer: Scorer, seed: int
) -> dict[str, dict[str, Interval]]:
    """Expected accuracy under every cue of S and R (`models`), and of R with S's `weights`."""
    before, after = models
    if prompts.suite.literal:  # of which rightness alone is asked
        prompts = without_behaviours(prompts)
    grid = grid_of(prompts, seed)

    def accuracy(model: Any) -> np.ndarray:
        return grid.draws(measure(scorer, model, prompts, seed).correct.sum(-1))

    sides = {"before": accuracy(before), "after": accuracy(after)}
    with written(after, weights):
        sides["rollback"] = accuracy(after)
    return {
        cue: {side: interval(of[:, c], grid.counts, bounds=PROPORTION) for side, of in sides.items()}
        for c, cue in enumerate(prompts.suite.cues)
    }
