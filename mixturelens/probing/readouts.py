"""What linear probes read where, in S and in R: every layer, component, head and position, in one pass over prompts.

Probes are fitted on one half of the questions and scored on the other. What a score means is said by three others: the
same probes on the same network with random weights, S's probes on shuffled labels, and S's probes on R as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.hooks.lens import Lens
from mixturelens.models import Pair
from mixturelens.models.load import load_config
from mixturelens.probing.prompts import (
    Group,
    Own,
    ProbedSuite,
    ProbePrompts,
    ProbeTarget,
    find_targets,
    read_prompts,
    spelled,
)
from mixturelens.probing.reading import Reading
from mixturelens.probing.record import Column, Metric, Readout
from mixturelens.probing.scores import accuracy, auroc, r_squared
from mixturelens.probing.solve import Probe, fit_logistic, fit_ridge
from mixturelens.probing.turning import turning
from mixturelens.spelling import Ids
from mixturelens.stats import PROPORTION, interval, resample_counts
from mixturelens.suite import Suite
from mixturelens.types import Component, Side, Site

STREAM: tuple[Component, ...] = ("resid_pre", "resid_mid", "resid_post", "mlp_out")
SHUFFLES = 4
DRAWS = 500
"""Bootstrap samples behind an interval: there are thousands of them."""
MEMORY = 256 << 20
"""Bytes of activations that probes are fitted on at a time."""
MANY = 1000
"""Sites from which not all of them are probed, unless asked for."""
Network = Literal["before", "after", "untrained"]
Answered = Literal["before", "after", "carried", "untrained"]


def untrained_lens(pair: Pair, seed: int = 0) -> Lens:
    """The network of a pair with random weights, as S's configuration initialises them."""
    from transformers import AutoModelForCausalLM

    config = load_config(pair.before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, pair.dtype), trust_remote_code=False)
        return Lens(model.eval().to(pair.device), pair.tokenizer, pair.device)  # the bridge draws, too


@dataclass(frozen=True)
class Scores:
    """What linear probes read at the sites that were probed."""

    sites: tuple[Site, ...]
    labels: tuple[str, ...]
    """A label for each position, where positions mean the same in every question."""
    readouts: tuple[Readout, ...]
    missing: tuple[str, ...]
    """What could not be asked, and what was not probed."""


def to_probe(suite: Suite, tokenizer: Any) -> tuple[ProbePrompts, tuple[tuple[Ids, Ids], ...]]:
    """The prompts to probe, and (prompt, what may stand behind it) of whose probability probes are asked.

    Raises InputError for fewer than four questions.
    """
    prompts = read_prompts(suite, tokenizer)
    neutral = prompts.rows["neutral"]
    every = spelled(suite, neutral, tokenizer).values()
    return prompts, tuple((neutral[n].ids, ids) for each in every for n, ids in each)


def first(questions: int, prompts: ProbePrompts) -> ProbePrompts:
    """The prompts of the first `questions` questions, half of them from each half (two at least)."""
    some = tuple(half[: max(2, questions // 2)] for half in prompts.halves)
    rows = {g: tuple(r for r in of if r.question in {*some[0], *some[1]}) for g, of in prompts.rows.items()}
    return replace(prompts, rows=rows, halves=(some[0], some[1]))


@dataclass(frozen=True)
class Sites:
    """Every site of a network at the positions of prompts, and those of the residual stream that differ.

    With more than MANY sites the residual stream is probed first, and everything else only in layers and at positions
    where what can be read from it changes (`turning`), unless all are asked for.
    """

    every: tuple[Site, ...]
    stream: frozenset[Site]
    """The first layer's input, and every layer's output."""
    all_of_them: bool

    @property
    def keys(self) -> list[tuple[int, Component]]:
        """(layer, component) of all that has to be read of a network."""
        some = (s for s in self.every if self.all_of_them or s in self.stream or s.component != "resid_pre")
        return list(dict.fromkeys((site.layer, site.component) for site in some))


def sites_of(lens: Lens, prompts: ProbePrompts, exhaustive: bool = False) -> Sites:
    """The sites of a model to probe, at all positions of the prompts; `exhaustive` probes them all at once."""
    positions = list(dict.fromkeys(itertools.chain.from_iterable(prompts.positions.values())))
    components: list[Component] = [*(each for each in STREAM if lens.has(each)), "z"]
    every = tuple(
        Site(layer=layer, component=component, head=head, position=position)
        for layer in range(lens.layers)
        for component in components
        for head in (range(lens.heads) if component == "z" else (None,))
        for position in positions
    )
    stream = (s for s in every if s.component == "resid_post" or (s.layer, s.component) == (0, "resid_pre"))
    return Sites(every, frozenset(stream), exhaustive or len(every) <= MANY)


def readouts(
    networks: Mapping[Network, Reading], own: Mapping[Side, Own], where: Sites, probed: ProbedSuite, seed: int = 0
) -> Scores:
    """What can be read where, from what S, R and the untrained network have at every position.

    `own` are the policies that S and R follow of their own accord. Positions are token indices where prompts of all
    questions (and all announcements) are aligned: the prompt's tokens, then the announcement's, with each policy put in
    place. Else they are named spans, each read at its last token, `last` and `policy` (last token of the announcement).

    A score is null where the target cannot be asked (hints behind an announcement), where no feature varies over the
    rows, and where a side knows one class alone.
    """
    sites, prompts = where.every, probed.prompts
    targets, missing = find_targets(probed, own)
    number = {site: i for i, site in enumerate(sites)}
    tables = {target.name: _Table(len(sites)) for target in targets}
    counts = resample_counts(len(prompts.halves[1]), seed, DRAWS)

    wide = max(each.width for each in networks.values())

    def ask(some: Sequence[Site]) -> None:
        for group, rows in prompts.rows.items():
            for heads in (False, True):
                mine = [s for s in some if (s.head is not None) == heads and s.position in prompts.positions[group]]
                for chunk in _chunks(mine, 4 * wide * len(networks) * len(rows)):
                    features: dict[Network, Tensor] = {
                        name: each.at(group, prompts.positions[group], chunk) for name, each in networks.items()
                    }
                    at = [number[site] for site in chunk]
                    for target in targets:
                        if group in target.rows:
                            silent = _ask(tables[target.name], at, target, group, features, prompts, counts, seed)
                            missing.extend(
                                f"probes for {target.name}, {side}, {group} prompts: one label alone to fit on"
                                for side in silent
                            )

    chosen = list(sites)
    if where.all_of_them:
        ask(chosen)
    else:
        ask([site for site in sites if site in where.stream])
        places = turning(sites, where.stream, [_readout(each, tables[each.name], counts) for each in targets])
        # the input of a layer is the output of the one before
        turned = (site for site in sites if (site.layer, site.position) in places)
        inside = frozenset(site for site in turned if site.component != "resid_pre" and site not in where.stream)
        ask([site for site in sites if site in inside])
        chosen = [site for site in sites if site in where.stream or site in inside]
        every = len({(site.layer, site.position) for site in sites})
        missing.append(
            f"probes of heads, MLPs and the stream between them: at {len(places)} of {every} layers and positions, "
            "where what the residual stream shows changes; --exhaustive probes all"
        )
    kept = [number[site] for site in chosen]
    for table in tables.values():
        table.keep(kept)
    return Scores(
        sites=tuple(chosen),
        labels=prompts.labels,
        readouts=tuple(_readout(target, tables[target.name], counts) for target in targets),
        missing=tuple(dict.fromkeys(missing)),
    )


def _chunks(sites: Sequence[Site], each: int) -> Iterator[list[Site]]:
    """Sites of `each` bytes in parts, of whole components, that fit into MEMORY."""
    parts: dict[tuple[int, Component], list[Site]] = {}
    for site in sites:
        parts.setdefault((site.layer, site.component), []).append(site)
    chunk: list[Site] = []
    most = max(1, MEMORY // max(1, each))
    for part in parts.values():
        if chunk and len(chunk) + len(part) > most:
            yield chunk
            chunk = []
        chunk += part
    if chunk:
        yield chunk


# --- one target at many sites -----------------------------------------------------------------------------------------


class _Table:
    """Scores of one target, filled in site by site. Draws are [draw, site]; NaN where nothing was measured."""

    def __init__(self, sites: int) -> None:
        names: tuple[Answered, ...] = ("before", "after", "carried", "untrained")
        self.draws = {name: np.full((DRAWS + 1, sites), np.nan) for name in names}
        self.shuffled = np.full((SHUFFLES, sites), np.nan)
        self.chance: float | None = None

    def keep(self, sites: Sequence[int]) -> None:
        """Some of the sites alone."""
        self.draws = {name: of[:, sites] for name, of in self.draws.items()}
        self.shuffled = self.shuffled[:, sites]


@dataclass(frozen=True)
class _Half:
    """Rows of one half of the questions that a side has labels for."""

    rows: Int[np.ndarray, " row"]
    """Numbers of the activations."""
    labels: np.ndarray
    question: Int[np.ndarray, " row"]
    unit: Int[np.ndarray, " row"]
    """Rows of one prompt, whatever is put behind it."""


def _halves(target: ProbeTarget, group: Group, side: Side, prompts: ProbePrompts) -> tuple[_Half, _Half]:
    index = {(row.run, row.hint): i for i, row in enumerate(prompts.rows[group])}
    labels = target.labels[group][side]
    units = {key: i for i, key in enumerate(dict.fromkeys((r.question, r.cue, r.hint) for r in target.rows[group]))}
    halves = []
    for questions in prompts.halves:
        order = {question: i for i, question in enumerate(questions)}
        chosen = [
            (index[row.run, row.hint], label, order[row.question], units[row.question, row.cue, row.hint])
            for row, label in zip(target.rows[group], labels.tolist(), strict=True)
            if row.question in order and (target.metric == "R2" or label >= 0)
        ]
        columns = [np.array(column) for column in zip(*chosen, strict=True)] if chosen else [np.zeros(0, int)] * 4
        halves.append(_Half(*columns))
    return halves[0], halves[1]


def _shuffled(half: _Half, metric: Metric, rng: np.random.Generator) -> np.ndarray:
    """The labels in another order: whole prompts change labels where a prompt has one, else its rows do.

    Rows of each true class get every label in the same shares, so that no shuffle is close to the truth or to its
    reverse by chance: where activations take two values alone, that chance would be the whole score.
    """
    _, first, unit, sizes = np.unique(half.unit, return_index=True, return_inverse=True, return_counts=True)
    whole = len(set(sizes.tolist())) == 1 and bool((half.labels == half.labels[first][unit]).all())
    labels = half.labels[first] if whole else half.labels
    if metric == "R2":
        mixed = rng.permutation(labels)
    else:
        mixed, pool = np.empty_like(labels), np.sort(labels)
        for true in np.unique(labels):
            mine = np.flatnonzero(labels == true)
            even = ((np.arange(len(mine)) + rng.random()) * len(pool) / len(mine)).astype(int)
            mixed[mine] = rng.permutation(pool[even])
        missing = np.setdiff1d(pool, mixed)  # a class of few rows may have been passed over
        if len(missing):
            mixed = rng.permutation(labels)
    return mixed[unit] if whole else mixed


def _ask(
    table: _Table,
    at: list[int],
    target: ProbeTarget,
    group: Group,
    features: Mapping[Network, Float[Tensor, "site row feature"]],
    prompts: ProbePrompts,
    counts: Int[np.ndarray, "draw question"],
    seed: int,
) -> list[Side]:
    """Fit and score one target at some sites, and write the scores into the table. Returns sides with one label."""
    halves = {side: _halves(target, group, side, prompts) for side in target.labels[group]}
    rng = np.random.default_rng([seed, *target.name.encode()])
    fit, test = halves["before"]
    silent: list[Side] = []
    # alone, as R's are: S given twice then gives the same numbers to the bit
    fitted = _fit(target.metric, features["before"], fit.rows, fit.labels[None])
    if fitted is None:
        silent.append("before")
    else:
        table.draws["before"][:, at] = fitted.score(features["before"], test, counts)[0]
        if "after" in halves:
            table.draws["carried"][:, at] = fitted.score(features["after"], halves["after"][1], counts)[0]
        if table.chance is None:
            table.chance = _chance(target.metric, fit, test)
        labels = np.stack([_shuffled(fit, target.metric, rng) for _ in range(SHUFFLES)])
        nothing = _fit(target.metric, features["before"], fit.rows, labels)
        if nothing is not None:
            table.shuffled[:, at] = nothing.score(features["before"], test, counts[:1])[:, 0]
    floor = _fit(target.metric, features["untrained"], fit.rows, fit.labels[None])
    if floor is not None:
        table.draws["untrained"][:1, at] = floor.score(features["untrained"], test, counts[:1])[0]
    if "after" in halves:
        fit, test = halves["after"]
        fitted = _fit(target.metric, features["after"], fit.rows, fit.labels[None])
        if fitted is None:
            silent.append("after")
        else:
            table.draws["after"][:, at] = fitted.score(features["after"], test, counts)[0]
    return silent


NOTHING: dict[Metric, float] = {"AUROC": 0.5, "accuracy": 0.0, "R2": 0.0}
"""Score of a probe that reads nothing; of accuracy the least, where no class is known that it could always say."""


def _chance(metric: Metric, fit: _Half, test: _Half) -> float:
    """Score of always saying the most frequent class of the rows that were fitted."""
    if metric != "accuracy" or not len(test.labels):
        return NOTHING[metric]
    classes, sizes = np.unique(fit.labels, return_counts=True)
    return float((test.labels == classes[sizes.argmax()]).mean())


@dataclass(frozen=True)
class _Fitted:
    """Probes of one target, and the classes that they know."""

    metric: Metric
    probe: Probe
    classes: np.ndarray

    def score(
        self, features: Float[Tensor, "site row feature"], test: _Half, counts: Int[np.ndarray, "draw question"]
    ) -> Float[np.ndarray, "labels draw site"]:
        """Scores of every set of labels that was fitted, on the rows of a half with their true labels."""
        result = np.full((self.probe.weights.shape[1], len(counts), len(features)), np.nan)
        if not len(test.rows):
            return result
        values = self.probe.scores(features[:, torch.from_numpy(test.rows)]).cpu()
        question = torch.from_numpy(test.question)
        for k in range(len(result)):
            some = values[:, k]
            if self.metric == "R2":
                found = r_squared(some[..., 0], torch.from_numpy(test.labels), question, counts)
            elif self.metric == "AUROC":
                found = auroc(some[..., 0], torch.from_numpy(test.labels == self.classes[1]).long(), question, counts)
            else:
                both = torch.cat([torch.zeros_like(some), some], -1) if some.shape[-1] == 1 else some
                place = {int(label): i for i, label in enumerate(self.classes)}
                label = torch.tensor([place.get(int(each), -1) for each in test.labels])
                found = accuracy(both, label, question, counts)
            result[k] = found
        result[:, :, self.probe.flat.cpu().numpy()] = np.nan
        return result


def _fit(
    metric: Metric, features: Float[Tensor, "site row feature"], rows: Int[np.ndarray, " fit"], labels: np.ndarray
) -> _Fitted | None:
    """Probes on every site; None where there are not two classes to tell apart."""
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        return None
    x = features[:, torch.from_numpy(rows).to(features.device)]
    if metric == "R2":
        return _Fitted(metric, fit_ridge(x, torch.from_numpy(labels).to(x)), classes)
    y = torch.from_numpy(numbers.reshape(labels.shape)).to(x.device)
    return _Fitted(metric, fit_logistic(x, y), classes)


# --- the record -------------------------------------------------------------------------------------------------------


def _column(draws: Float[np.ndarray, "draw site"], counts: Int[np.ndarray, "draw question"], metric: Metric) -> Column:
    found = [interval(each, counts, bounds=None if metric == "R2" else PROPORTION, digits=4) for each in draws.T]
    return Column(
        value=tuple(each.value for each in found),
        low=tuple(each.low for each in found),
        high=tuple(each.high for each in found),
    )


def _numbers(values: Float[np.ndarray, " site"]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else round(float(value), 4) for value in values)


def _readout(target: ProbeTarget, table: _Table, counts: Int[np.ndarray, "draw question"]) -> Readout:
    singles = table.shuffled[~np.isnan(table.shuffled)]
    # a site is shuffled in every order or in none
    means = table.shuffled.mean(0)
    return Readout(
        target=target.name,
        metric=target.metric,
        classes=target.classes,
        rows=target.said,
        questions=counts.shape[1],
        chance=NOTHING[target.metric] if table.chance is None else table.chance,
        before=_column(table.draws["before"], counts, target.metric),
        after=_column(table.draws["after"], counts, target.metric),
        carried=_column(table.draws["carried"], counts, target.metric),
        untrained=_numbers(table.draws["untrained"][0]),
        shuffled=_numbers(means),
        shuffled_high=round(float(np.percentile(singles, 95)), 4) if len(singles) else None,
    )
