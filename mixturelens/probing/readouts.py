"""What linear probes read where, in S and in R: every layer, component, head and position, in one pass over prompts.

Probes are fitted on one half of the questions and scored on the other. What a score means is said by three others: the
same probes on the same network with random weights, S's probes on shuffled labels, and S's probes on R as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.hooks.lens import Lens, tokens
from mixturelens.models import Pair
from mixturelens.models.load import load_config
from mixturelens.probing.prompts import Group, Prompts, Target, find_targets, read_prompts
from mixturelens.probing.record import Column, Metric, Readout
from mixturelens.probing.scores import accuracy, auroc, r_squared
from mixturelens.probing.solve import Probe, fit_logistic, fit_ridge
from mixturelens.stats import interval, resample_counts
from mixturelens.suite import Suite
from mixturelens.types import Component, Side, Site

STREAM: tuple[Component, ...] = ("resid_pre", "resid_mid", "resid_post", "mlp_out")
SHUFFLES = 4
DRAWS = 500
"""Bootstrap samples behind an interval: there are thousands of them."""
MEMORY = 2 << 30
"""Bytes of activations that are held at a time; with more, layers are read in turn."""
BATCH = 512

Network = Literal["before", "after", "untrained"]
Answered = Literal["before", "after", "carried", "untrained"]


def untrained_lens(pair: Pair, seed: int = 0) -> Lens:
    """The network of a pair with random weights, as S's configuration initialises them."""
    from transformers import AutoModelForCausalLM

    config = load_config(pair.before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return Lens(model.eval().to(pair.device), pair.tokenizer, pair.device)  # the bridge draws, too


def readouts(
    lenses: Mapping[Side, Lens],
    untrained: Lens,
    suite: Suite,
    behaviour: BehaviourRecord,
    *,
    policies: tuple[str, str],
    seed: int = 0,
) -> tuple[tuple[Site, ...], tuple[str, ...], tuple[Readout, ...], tuple[str, ...]]:
    """(sites, a label for each position, what can be read there, what could not be asked and why).

    `policies` are those of the log-odds. Positions are token indices where prompts of all questions (and all
    announcements) are aligned: the prompt's tokens, then the announcement's, with each policy put in place. Else they
    are named spans, each read at its last token, `last` and `policy` (last token of the announcement).

    A score is null where the target cannot be asked (hints behind an announcement), where no feature varies over the
    rows, and where a side knows one class alone. Raises InputError for fewer than four questions.

    >>> sites, labels, found, missing = readouts(lenses, untrained, suite, behaviour, policies=("a", "b"))
    ... # doctest: +SKIP
    """
    lens = lenses["before"]
    prompts = read_prompts(suite, lens.tokenizer)
    targets, missing = find_targets(prompts, suite, lenses, behaviour, policies, seed)
    networks: dict[Network, Lens] = {**lenses, "untrained": untrained}
    components: list[Component] = [component for component in STREAM if lens.has(component)]
    positions = list(dict.fromkeys(itertools.chain.from_iterable(prompts.positions.values())))
    sites = [
        Site(layer=layer, component=component, head=head, position=position)
        for layer in range(lens.layers)
        for component in _every(components)
        for head in (range(lens.heads) if component == "z" else (None,))
        for position in positions
    ]
    number = {site: i for i, site in enumerate(sites)}
    tables = {target.name: _Table(len(sites)) for target in targets}
    counts = resample_counts(len(prompts.halves[1]), seed, DRAWS)
    for layers in _in_turn(lens, prompts, len(components)):
        captured: dict[Network, Captured] = {
            name: activations(each, prompts, layers, components) for name, each in networks.items()
        }
        for group in prompts.rows:
            for heads in (False, True):
                keys = [key for key in captured["before"][group] if (key[1] == "z") == heads]
                if not keys:
                    continue
                features: dict[Network, Tensor] = {name: stacked(each[group], keys) for name, each in captured.items()}
                at = [
                    number[Site(layer=layer, component=component, head=head, position=position)]
                    for layer, component in keys
                    for head in (range(lens.heads) if heads else (None,))
                    for position in prompts.positions[group]
                ]
                for target in targets:
                    if group in target.rows:
                        silent = _ask(tables[target.name], at, target, group, features, prompts, counts, seed)
                        missing += [
                            f"probes for {target.name}, {side}, {group} prompts: one label alone to fit on"
                            for side in silent
                        ]
    return (
        tuple(sites),
        prompts.labels,
        tuple(_readout(target, tables[target.name], prompts) for target in targets),
        tuple(dict.fromkeys(missing)),
    )


# --- activations ------------------------------------------------------------------------------------------------------


def _every(components: Sequence[Component]) -> tuple[Component, ...]:
    return (*components, "z")


Captured = dict[Group, dict[tuple[int, Component], Tensor]]


def _in_turn(lens: Lens, prompts: Prompts, streams: int) -> list[list[int]]:
    """Layers in parts whose activations, of three networks, fit into memory."""
    places = sum(len(prompts.rows[group]) * len(prompts.positions[group]) for group in prompts.rows)
    layer = 3 * 4 * places * (streams * lens.d_model + lens.heads * lens.d_head)
    step = max(1, MEMORY // max(1, layer))
    return [list(range(lens.layers))[start : start + step] for start in range(0, lens.layers, step)]


def activations(lens: Lens, prompts: Prompts, layers: Sequence[int], components: Sequence[Component]) -> Captured:
    """Activations of every group at its positions: [row, position, d_model], and z as [row, position, head, d_head].

    Each distinct prompt is run once. A prompt's own tokens are read in the run with the first policy put in place.
    """
    keys: list[tuple[int, Component]] = [(layer, part) for layer in layers for part in _every(components)]
    runs: dict[tuple[int, ...], int] = {}
    where: dict[Group, list[tuple[int, list[int]]]] = {
        group: [(runs.setdefault(row.run, len(runs)), [row.at[p] for p in prompts.positions[group]]) for row in rows]
        for group, rows in prompts.rows.items()
    }
    every = sorted(runs, key=len)  # little padding
    place = {runs[ids]: i for i, ids in enumerate(every)}
    result: Captured = {group: {} for group in prompts.rows}
    for start in range(0, len(every), BATCH):
        batch = tokens(every[start : start + BATCH], lens.device)
        found, _ = lens.capture(batch, keys)
        skip = (~batch.real).sum(1).tolist()
        for group, entries in where.items():
            mine = [(i, place[run] - start, at) for i, (run, at) in enumerate(entries)]
            mine = [entry for entry in mine if 0 <= entry[1] < len(batch)]
            if not mine or not prompts.positions[group]:
                continue
            rows = torch.tensor([i for i, _, _ in mine], device=lens.device)
            local = torch.tensor([run for _, run, _ in mine], device=lens.device)
            columns = torch.tensor([[skip[run] + i for i in at] for _, run, at in mine], device=lens.device)
            for key, value in found.items():
                kept = value[local[:, None], columns]
                whole = result[group].setdefault(key, kept.new_zeros(len(entries), *kept.shape[1:]))
                whole[rows] = kept
    return result


def stacked(
    of: Mapping[tuple[int, Component], Tensor], keys: Sequence[tuple[int, Component]]
) -> Float[Tensor, "site row feature"]:
    """Layer and component, head, position as one axis of sites."""
    parts = []
    for key in keys:
        value = of[key]
        by_site = value.permute(2, 1, 0, 3).flatten(0, 1) if value.ndim == 4 else value.transpose(0, 1)
        parts.append(by_site)
    return torch.cat(parts)


# --- one target at many sites -----------------------------------------------------------------------------------------


class _Table:
    """Scores of one target, filled in site by site. Draws are [draw, site]; NaN where nothing was measured."""

    def __init__(self, sites: int) -> None:
        names: tuple[Answered, ...] = ("before", "after", "carried", "untrained")
        self.draws = {name: np.full((DRAWS + 1, sites), np.nan) for name in names}
        self.shuffled = np.full((SHUFFLES, sites), np.nan)
        self.chance: float | None = None


@dataclass(frozen=True)
class _Half:
    """Rows of one half of the questions that a side has labels for."""

    rows: Int[np.ndarray, " row"]
    """Numbers of the activations."""
    labels: np.ndarray
    question: Int[np.ndarray, " row"]
    unit: Int[np.ndarray, " row"]
    """Rows of one prompt, whatever is put behind it."""


def _halves(target: Target, group: Group, side: Side, prompts: Prompts) -> tuple[_Half, _Half]:
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
    target: Target,
    group: Group,
    features: Mapping[Network, Float[Tensor, "site row feature"]],
    prompts: Prompts,
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


def _chance(metric: Metric, fit: _Half, test: _Half) -> float:
    """Score of always saying the most frequent class of the rows that were fitted."""
    if metric != "accuracy":
        return 0.5 if metric == "AUROC" else 0.0
    classes, sizes = np.unique(fit.labels, return_counts=True)
    return float((test.labels == classes[sizes.argmax()]).mean()) if len(test.labels) else 0.0


@dataclass(frozen=True)
class _Fitted:
    """Probes of one target, and the classes that they know."""

    metric: Metric
    probe: Probe
    classes: np.ndarray

    def score(
        self,
        features: Float[Tensor, "site row feature"],
        test: _Half,
        counts: Int[np.ndarray, "draw question"],
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
    metric: Metric, features: Float[Tensor, "site row feature"], rows: Int[np.ndarray, " row"], labels: np.ndarray
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


def _column(draws: Float[np.ndarray, "draw site"]) -> Column:
    found = [interval(each, digits=4) for each in draws.T]
    return Column(
        value=tuple(each.value for each in found),
        low=tuple(each.low for each in found),
        high=tuple(each.high for each in found),
    )


def _numbers(values: Float[np.ndarray, " site"]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else round(float(value), 4) for value in values)


def _readout(target: Target, table: _Table, prompts: Prompts) -> Readout:
    singles = table.shuffled[~np.isnan(table.shuffled)]
    # a site is shuffled in every order or in none
    means = table.shuffled.mean(0)
    return Readout(
        target=target.name,
        metric=target.metric,
        classes=target.classes,
        rows=target.said,
        questions=len(prompts.halves[1]),
        chance=table.chance or 0.0,
        before=_column(table.draws["before"]),
        after=_column(table.draws["after"]),
        carried=_column(table.draws["carried"]),
        untrained=_numbers(table.draws["untrained"][0]),
        shuffled=_numbers(means),
        shuffled_high=round(float(np.percentile(singles, 95)), 4) if len(singles) else None,
    )
