"""The graft instrument: a pair and a suite to one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mixturelens.behaviour.harm import gained_and_lost
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.record import BehaviourRecord, grid_of
from mixturelens.grafting.components import State, parts, weights_of
from mixturelens.grafting.effects import Judge, null
from mixturelens.grafting.graft import (
    PLAYERS,
    Bench,
    groups,
    needed,
    players,
    save_with,
    shapley,
    specialist_part,
    two_by_two,
    written,
)
from mixturelens.grafting.path import Attribution, attribute
from mixturelens.grafting.positions import placed
from mixturelens.grafting.readings import make_cells, method_of, metric_names, metrics
from mixturelens.grafting.record import Component, Graft, GraftRecord, Placed, Rollback
from mixturelens.grafting.record import Path as PathSum
from mixturelens.hooks.lens import lens_of
from mixturelens.models import Pair
from mixturelens.stats import half_of, interval, mean_interval, resample_counts, resampled_mean
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import NOT_MEASURED, InputError, Interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = 256
"""Of more questions, so many are drawn."""
SHARED = 64
"""Questions, at most, of Shapley shares, which try every set of components."""

SETTLED = 0.01
"""Share of a change (of at least 0.05 nats) by which its attribution may miss it."""

Say = Callable[[str], None]
T = TypeVar("T")


def graft_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    *,
    save_to: Path | None = None,
    suite_name: str | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> GraftRecord:
    """Which components carry what RL changed: alone (do they suffice?), missing (are they needed?), and in between.

    `save_to` takes the rollback, R with S's selector, as a plain checkpoint. Raises InputError for folders that are no
    pair, and where a policy cannot be put in place or has no other beside it.
    """
    say = say or (lambda _: None)
    policies = gained_and_lost(behaviour)
    pair.check_one_function("a graft")
    pair = pair.spelled(behaviour.spelling)
    suite, tokenizer = pair.suite, pair.tokenizer
    s, r = (pair.model(side) for side in pair.sides)
    scorer = Scorer(pair.ends, pair.vocabulary, pair.device)
    cells = make_cells(suite, some_questions(suite.neutral), tokenizer, s, scorer, seed)
    say("components")
    components = lens_of(pair, "before").components()
    state_s, state_r = weights_of(s), weights_of(r)
    found = parts(components, state_s, state_r)
    changed = {part.name: components[part.name] for part in found if part.change > 0}
    bench = Bench(s, state_s, state_r, changed, cells)
    judge = Judge(cells, policies, bench.readings(()), bench.readings(changed), cells.grid)
    missing: list[str] = []

    def attempt(what: str, work: Callable[[], T]) -> T | None:
        """What this model does not allow must not cost the rest."""
        try:
            return work() if changed else None
        except InputError as error:
            missing.append(f"{what}: {error}")
            return None

    say("grafts of every component and group")
    bench_groups = {
        name: Graft(components=members, effects=judge.effects(bench.readings(members)))
        for name, members in groups(bench.names).items()
    }
    shares = _shapley(bench, judge, missing)
    say("attribution along the path")
    path = attempt("path attribution", lambda: attribute(s, state_s, state_r, changed, cells, policies))
    unsettled = [line.metric for line in _sums(path) if not settled(line)]
    if unsettled:
        missing.append(f"path attribution: its parts do not add up to the change of {', '.join(unsettled)}")
    every = tuple(_component(name, bench, judge, shares, path) for name in changed)
    factorial = None
    if not judge.moved_cues.any():
        missing.append(f"factorial, rollback: log c({policies[0]}) / c({policies[1]}) does not surely change")
    elif len(cells.grid.index) < 2:
        missing.append("factorial, rollback: one question cannot both choose the selector and judge it")
    else:
        say("selector and rest")
        factorial = two_by_two(bench, judge, seed)
    specialists = None
    if judge.moved_cells.any() and len(cells.grid.index) > 1:
        specialists = specialist_part(bench, judge)
    else:
        missing.append("specialist part: what policies do does not surely differ")
    say("grafts at some positions")
    at = attempt("grafts at some positions", lambda: placed(s, r, cells)) or {}
    rollback = None
    if factorial is not None:
        say("rollback")
        back, also, enough = needed(bench, judge)
        weights = {name: state_s[name] for each in back for name in changed[each]}
        ids = [cells.questions[i] for i in half_of(len(cells.questions), 1)]
        rows = tuple(row for row in suite.neutral if row.id in set(ids))
        accuracy = rolled_back(s, r, weights, suite, rows, tokenizer, scorer, seed)
        if save_to is not None:
            save_with(r, weights, tokenizer, save_to)
        rollback = Rollback(
            components=back, also=also, enough=enough, accuracy=accuracy, checkpoint=save_to.name if save_to else None
        )
    return GraftRecord(
        provenance=pair.provenance(seed, suite_name),
        policies=policies,
        method=method_of(suite),
        cues=suite.cues,
        questions=len(cells.grid.index),
        coverage=round(judge.coverage, 6),
        usual=round(judge.usual, 6),
        change=_changes(judge),
        after=judge.effects(judge.after),
        parts=found,
        components=every,
        groups=bench_groups,
        path=_sums(path),
        factorial=factorial,
        specialist_part=specialists,
        placed=tuple(Placed(positions=names, effects=judge.effects(each)) for names, each in at.items()),
        rollback=rollback,
        null=null(judge, seed),
        missing=tuple(missing),
    )


def some_questions(rows: tuple[PromptRow, ...], number: int = QUESTIONS) -> tuple[PromptRow, ...]:
    """Prompts of at most so many questions, drawn once and for all, each with all its cues."""
    ids = list(dict.fromkeys(row.id for row in rows))
    if len(ids) <= number:
        return rows
    kept = {ids[i] for i in np.random.default_rng(0).permutation(len(ids))[:number]}
    return tuple(row for row in rows if row.id in kept)


def _shapley(bench: Bench, judge: Judge, missing: list[str]) -> dict[str, Interval]:
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
    prompts = sorted(int(i) for i in judge.grid.index[few].ravel() if i >= 0)
    cells = bench.cells.part(prompts)
    some = Bench(bench.model, bench.before, bench.after, bench.components, cells)
    jury = Judge(cells, judge.policies, judge.before.part(prompts), judge.after.part(prompts), cells.grid, judge)
    values = shapley(who, lambda names: jury.odds(some.log_c(names)))
    return {name: jury.shares(odds) for name, odds in values.items()}


def _component(
    name: str, bench: Bench, judge: Judge, shares: dict[str, Interval], path: Attribution | None
) -> Component:
    routing, specialists = NOT_MEASURED, {}
    if path is not None:
        values = path.values[..., bench.names.index(name)]  # [question, metric]
        counts = resample_counts(len(values), bench.cells.seed)
        is_routing = np.array([metric.startswith("routing@") for metric in path.names])
        routing = interval(np.nanmean(resampled_mean(values[:, is_routing], counts), -1))
        specialists = {
            metric: mean_interval(values[:, k], counts) for k, metric in enumerate(path.names) if not is_routing[k]
        }
    return Component(
        name=name,
        suffices=judge.effects(bench.readings([name])),
        without=judge.effects(bench.readings(bench.rest([name]))),
        routing=routing,
        specialists=specialists,
        shapley=shares.get(name, NOT_MEASURED),
    )


def _changes(judge: Judge) -> dict[str, Interval]:
    tables = [metrics(each, judge.cells, judge.policies)[0].cpu().numpy() for each in (judge.before, judge.after)]
    change = tables[1] - tables[0]
    return {name: mean_interval(change[:, k], judge.grid.counts) for k, name in enumerate(metric_names(judge.cells))}


def _sums(path: Attribution | None) -> tuple[PathSum, ...]:
    if path is None:
        return ()
    return tuple(
        PathSum(
            metric=name,
            change=round(float(np.nanmean(path.change[:, k])), 10),
            sum=round(float(np.nanmean(path.values[:, k].sum(-1))), 10),
            points=path.points,
        )
        for k, name in enumerate(path.names)
    )


def settled(line: PathSum) -> bool:
    return abs(line.sum - line.change) <= SETTLED * max(abs(line.change), 0.05)


# --- rollback ---------------------------------------------------------------------------------------------------------


def rolled_back(
    before: Any,
    after: Any,
    weights: State,
    suite: Suite,
    rows: Sequence[PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    seed: int,
) -> dict[str, dict[str, Interval]]:
    """Expected accuracy under every cue of S, of R, and of R with S's `weights`."""
    prompts = prepare(suite, rows, tokenizer)
    grid = grid_of(prompts, seed)

    def accuracy(model: Any) -> np.ndarray:
        return grid.draws(measure(scorer, model, prompts, seed).correct.sum(-1))

    sides = {"before": accuracy(before), "after": accuracy(after)}
    with written(after, weights):
        sides["rollback"] = accuracy(after)
    return {cue: {side: interval(of[:, c]) for side, of in sides.items()} for c, cue in enumerate(suite.cues)}
