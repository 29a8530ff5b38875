"""Concept erasure: make the cue unreadable at one site (LEACE), and see what is left of its use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.behaviour.record import Grid, grid_of
from mixturelens.contrasts import Contrasts
from mixturelens.hooks.engine import Columns, Engine
from mixturelens.hooks.intervened import Intervened, known_prompts
from mixturelens.hooks.lens import Lens
from mixturelens.hooks.sides import Sides, sides
from mixturelens.models import end_tokens
from mixturelens.probing.leace import Eraser, leace, random_erasers
from mixturelens.probing.record import ErasedSite, Erasure
from mixturelens.probing.scores import auroc
from mixturelens.stats import interval, resample_counts, resampled_mean, share
from mixturelens.suite import Suite
from mixturelens.types import (
    ANSWER,
    NOT_MEASURED,
    PER_HEAD,
    Component,
    InputError,
    Interval,
    Intervention,
    RunError,
    Site,
)

APART = 0.5
"""Nats by which the two cues must differ, for what is left of the difference to mean anything."""
APART_P = 0.1
"""The same, in probability."""
SCANNED = 8
"""Random erasers that each site of a scan is compared with."""
RANDOM = 16
"""Random erasers that an erasure is compared with, in behaviour."""
SOME = 32
"""Judging questions, at most, that random erasers are tried on: they are many, and say no more than where chance is."""
READER = 0.5
"""Least share of the contrast that keys and values at one span carry, for it to be where heads take the cue from."""

Acts = Mapping[tuple[int, Component], Tensor]


# --- erasing the cue, site by site ------------------------------------------------------------------------------------


def erase_sites(
    lens: Lens,
    contrasts: Contrasts,
    sites: Sequence[Site],
    readable: Sequence[Interval] | None = None,
    seed: int = 0,
) -> tuple[ErasedSite, ...]:
    """What is left of the difference between two cues once the cue is erased at each site in turn, by exact patching.

    The contrasts have a policy in place. Erasers are fitted on `half(0)` of the questions, on the activations of both
    prompts (of all tokens of the site's position), and judged on `half(1)`: the difference of the log-odds between the
    two prompts, both erased, as a share of the plain difference (a ratio of means). Random erasers of equal rank are
    the null. `readable`: AUROC of probes at these sites; without it, that of the eraser's own direction (Fisher's
    discriminant) on the questions that judge.

    Raises InputError for sites that do not exist, cues that do not differ in behaviour, or a model that cannot be
    patched exactly.
    """
    fit, judge = _halves(lens, contrasts, sites)
    counts = resample_counts(len(judge), seed)
    fitted = _activations(lens, fit, sites)
    judged = _activations(lens, judge, sites)
    erasers, random = [], []
    for site in sites:
        x, labels = _rows(fitted, fit, site)
        erasers.append(leace(x, labels))
        random.append(random_erasers(x, erasers[-1].rank, SCANNED, seed) if erasers[-1].rank else [])
    if readable is None:
        few = resample_counts(len(judge), seed, AUROC_DRAWS)
        readable = [_readable(e, judged, judge, site, few) for e, site in zip(erasers, sites, strict=True)]
    plain, erased = _differences(lens, judge, judged, sites, [[eraser] for eraser in erasers])
    some = slice(0, SOME)
    few_acts = tuple({key: acts[some] for key, acts in side.items()} for side in judged)
    few_plain, null = _differences(lens, judge.part(some), (few_acts[0], few_acts[1]), sites, random)
    whole = resampled_mean(plain, counts)
    if not interval(share(whole, whole, APART)).measured:
        raise InputError(f"the two cues differ by {whole[0]:.2f} nats ({APART} are needed): nothing to erase")
    found = []
    for site, read, (own,), others in zip(sites, readable, erased, null, strict=True):
        left = interval(share(resampled_mean(own, counts), whole, APART), digits=6)
        by_chance = tuple(round(float(each.mean() / few_plain.mean()), 6) for each in others)
        found.append(ErasedSite(site=site, readable=read, left=left, random=by_chance))
    return tuple(found)


def _halves(lens: Lens, contrasts: Contrasts, sites: Sequence[Site]) -> tuple[Sides, Sides]:
    if len(contrasts.rows) < 2:
        raise InputError("one half of the questions fits erasers and the other judges them: give at least two")
    for site in sites:
        lens.check(site)
        if site.component == "pattern":
            raise InputError(f"{site}: attention patterns are no activations to erase a concept from")
    fit, judge = (sides(lens, contrasts.half(half)) for half in (0, 1))
    return fit, judge


def _activations(lens: Lens, both: Sides, sites: Sequence[Site]) -> tuple[Acts, Acts]:
    keys: list[tuple[int, Component]] = [(site.layer, site.component) for site in sites]
    clean, corrupt = (lens.capture(batch, keys)[0] for batch in (both.clean, both.corrupt))
    return clean, corrupt


def _places(both: Sides, position: str | int | None) -> tuple[Tensor, Tensor]:
    """True at the columns of a position, in the clean and in the corrupt prompts."""
    return (
        Columns(both.clean, both.spans).mask(position),
        Columns(both.corrupt, both.corrupt_spans).mask(position),
    )


def _unit(activation: Tensor, site: Site) -> Float[Tensor, "row pos d"]:
    """The numbers of a site, as a view."""
    if site.component in PER_HEAD:
        return activation.flatten(2) if site.head is None else activation[:, :, site.head]
    return activation if site.neuron is None else activation[:, :, site.neuron : site.neuron + 1]


def _rows(found: tuple[Acts, Acts], both: Sides, site: Site) -> tuple[Float[Tensor, "row d"], Int[Tensor, " row"]]:
    """Activations at a site under both cues, token by token, and which cue it was (1 the clean one)."""
    key = site.layer, site.component
    sets = [_unit(a[key], site)[at] for a, at in zip(found, _places(both, site.position), strict=True)]
    labels = [torch.full((len(x),), 1 - side, device=x.device) for side, x in enumerate(sets)]
    return torch.cat(sets), torch.cat(labels)


def _differences(
    lens: Lens, both: Sides, own: tuple[Acts, Acts], sites: Sequence[Site], erasers: Sequence[Sequence[Eraser]]
) -> tuple[Float[np.ndarray, " question"], list[list[Float[np.ndarray, " question"]]]]:
    """Metric of the clean prompt less that of the corrupt one: plain, and [site][eraser] with both erased there.

    An eraser of rank 0 changes nothing and is not run.
    """
    plain = np.zeros(len(both))
    found = [[np.zeros(len(both)) for _ in each] for each in erasers]
    for sign, batch, spans, acts in (
        (1.0, both.clean, both.spans, own[0]),
        (-1.0, both.corrupt, both.corrupt_spans, own[1]),
    ):
        try:
            engine = Engine(lens, batch, spans)
        except RunError as error:
            raise InputError(f"erasing at many sites needs the patch engine: {error}") from None
        base = sign * _numpy(both.metric(engine.logits))
        plain += base
        columns = Columns(batch, spans)
        for position, numbers in _by_position(sites):
            mask = columns.mask(position)
            before = {n: _unit(acts[sites[n].layer, sites[n].component], sites[n])[mask] for n in numbers}
            for which in range(max((len(erasers[n]) for n in numbers), default=0)):
                some = [n for n in numbers if which < len(erasers[n]) and erasers[n][which].rank]
                for n in numbers:
                    if which < len(erasers[n]) and n not in some:
                        found[n][which] += base
                keys: set[tuple[int, Component]] = {(sites[n].layer, sites[n].component) for n in some}
                # laid out anew, so that all heads of a token can be written as one
                source = {key: acts[key].clone(memory_format=torch.contiguous_format) for key in keys}
                for n in some:
                    _unit(source[sites[n].layer, sites[n].component], sites[n])[mask] = erasers[n][which].apply(
                        before[n]
                    )
                values = _numpy(engine.sweep([sites[n] for n in some], source, both.metric)) if some else []
                for n, value in zip(some, values, strict=True):
                    found[n][which] += sign * value
    return plain, found


def _by_position(sites: Sequence[Site]) -> Iterator[tuple[str | int | None, list[int]]]:
    """Sites of one position are patched together; sites that would overlap in it are not."""
    groups: dict[tuple[str | int | None, bool], list[int]] = {}
    for number, site in enumerate(sites):
        whole = site.head is None and site.neuron is None
        groups.setdefault((site.position, whole), []).append(number)
    for (position, _), numbers in groups.items():
        yield position, numbers


AUROC_DRAWS = 500


def _readable(
    eraser: Eraser, found: tuple[Acts, Acts], both: Sides, site: Site, counts: Int[np.ndarray, "draw question"]
) -> Interval:
    """AUROC of the direction that is erased, on these questions; the tokens of a span are averaged."""
    if not eraser.rank:
        return Interval(value=0.5, low=0.5, high=0.5)
    scores = []
    for acts, mask in zip(found, _places(both, site.position), strict=True):
        read = eraser.found(_unit(acts[site.layer, site.component], site))[..., 0]
        scores.append(_numpy((read * mask).sum(1) / mask.sum(1)))
    question = torch.arange(len(both)).repeat(2)
    positive = (torch.arange(2 * len(both)) < len(both)).long()
    read = torch.from_numpy(np.concatenate(scores))[None]
    return interval(auroc(read, positive, question, counts)[:, 0], digits=6)


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


# --- erasing the cue, in behaviour ------------------------------------------------------------------------------------


def erasure(
    lens: Lens,
    suite: Suite,
    contrasts: Contrasts,
    site: Site,
    readable: Interval = NOT_MEASURED,
    seed: int = 0,
) -> Erasure:
    """What is left of the difference between cues in P(answer given policy), with the cue erased at one site.

    The policy is that of the contrasts, in its first wording. The eraser is fitted on `half(0)` of the questions, and
    the same for all tokens of the site's position; behaviour is measured on the others, as the suite says (exactly or
    by samples), with RANDOM random erasers of equal rank as the null. At the position `policy` the eraser is put
    at the announcement and all that follows (`completion`).

    Raises InputError if the suite names no behaviours, there is nothing to erase, or the cues do not differ in what
    they bring about.

    >>> erasure(lens, suite, contrasts, Site(layer=0, component="resid_pre", position="cue")).left   # doctest: +SKIP
    Interval(value=0.002, low=-0.004, high=0.009)
    """
    policy = contrasts.policy
    if contrasts.kind != "cue" or policy is None:
        raise InputError("erasing the cue needs contrasts of two cues with a policy in place")
    if ANSWER not in suite.behaviour_names:
        raise InputError("P(answer given policy) needs a suite that names behaviours")
    fit, judge = _halves(lens, contrasts, [site])
    x, labels = _rows(_activations(lens, fit, [site]), fit, site)
    eraser = leace(x, labels)
    if not eraser.rank:
        raise InputError(f"{site}: the cue cannot be read there, so there is nothing to erase")
    if not readable.measured:
        few = resample_counts(len(judge), seed, AUROC_DRAWS)
        readable = _readable(eraser, _activations(lens, judge, [site]), judge, site, few)
    ground = _ground(lens, suite, contrasts, seed)
    where = in_behaviour(site, contrasts)
    plain = ground.answers(())
    erased = ground.answers(eraser.interventions(where))
    some = _ground(lens, suite, contrasts, seed, SOME)
    null = [some.answers(each.interventions(where)) for each in random_erasers(x, eraser.rank, RANDOM, seed)]
    few_plain = some.answers(())[0]

    def left(draws: Float[np.ndarray, "draw cue"]) -> Float[np.ndarray, " draw"]:
        return share(draws[:, 0] - draws[:, 1], plain[:, 0] - plain[:, 1], APART_P)

    if not interval(left(plain)).measured:
        between = plain[0, 0] - plain[0, 1]
        raise InputError(
            f"P(answer given {policy!r}) differs by {between:.3f} between {contrasts.clean!r} and "
            f"{contrasts.corrupt!r} ({APART_P} is needed): nothing to erase"
        )
    cues = (contrasts.clean, contrasts.corrupt)
    return Erasure(
        site=where,
        readable=readable,
        policy=policy,
        plain={cue: interval(plain[:, c]) for c, cue in enumerate(cues)},
        erased={cue: interval(erased[:, c]) for c, cue in enumerate(cues)},
        left=interval(left(erased)),
        random=tuple(round(float(np.subtract(*each[0]) / np.subtract(*few_plain)), 6) for each in null),
    )


@dataclass(frozen=True)
class _Ground:
    """The questions that judge, and how behaviour is measured on them."""

    lens: Lens
    scorer: Scorer
    prompts: Prompts
    known: Mapping
    grid: Grid
    columns: tuple[int, int]
    """Of the clean and of the corrupt cue."""
    policy: int
    seed: int

    def answers(self, interventions: Sequence[Intervention]) -> Float[np.ndarray, "draw cue"]:
        """P(answer given policy) under the clean and the corrupt cue, in every bootstrap sample."""
        model = Intervened(self.lens, interventions, self.known) if interventions else self.lens.model
        found = measure(self.scorer, model, self.prompts, self.seed).forced_behaviour
        answer = self.prompts.suite.behaviour_names.index(ANSWER)
        return self.grid.draws(found[:, self.policy, 0, answer])[:, list(self.columns)]


def _ground(lens: Lens, suite: Suite, contrasts: Contrasts, seed: int, questions: int | None = None) -> _Ground:
    tokenizer = lens.tokenizer
    cues = (contrasts.clean, contrasts.corrupt)
    judging = {row.question for row in contrasts.half(1).rows[:questions]}
    rows = [row for row in suite.neutral if row.id in judging and row.cue in cues]
    policy = list(suite.policies).index(str(contrasts.policy))
    prompts = prepare(suite, rows, tokenizer)
    # nothing else is asked about
    prompts = prompts.only([k for k, a in enumerate(prompts.announcements) if (a.policy, a.wording) == (policy, 0)])
    return _Ground(
        lens=lens,
        scorer=Scorer(end_tokens(lens.model, tokenizer), lens.model.config.get_text_config().vocab_size, lens.device),
        prompts=prompts,
        known=known_prompts(suite, rows, tokenizer),
        grid=grid_of(prompts, seed),
        columns=(suite.cues.index(cues[0]), suite.cues.index(cues[1])),
        policy=policy,
        seed=seed,
    )


def in_behaviour(site: Site, contrasts: Contrasts) -> Site:
    """Behind the prompt stands what was put in place, which an intervened model calls `completion`."""
    first = contrasts.rows[0].spans.get("policy", (len(contrasts.rows[0].clean),))[0]
    behind = site.position == "policy" or (isinstance(site.position, int) and site.position >= first)
    return site.model_copy(update={"position": "completion"}) if behind else site


# --- where the cue reader reads ---------------------------------------------------------------------------------------


def reading_site(lens: Lens, heads: Sequence[Site], contrasts: Contrasts) -> Site:
    """Where the cue reader's heads take the cue from: the residual stream before their layer, at one span.

    It is the span whose keys and values (those that the heads use), taken from the clean run into the corrupt one, move
    the metric most; `cue` if none moves it by READER of the difference. The layer is that of the first head.
    """
    layer = min(int(head.layer) for head in heads)
    both = sides(lens, contrasts.half(0))
    names = set.intersection(*(set(spans) for spans in both.spans)) - {"policy"}
    spans = sorted(names, key=lambda name: tuple(both.spans[0][name]))
    tried = []
    for name in spans:
        for component in ("k", "v"):
            shared = {int(head.head or 0) * lens.kv_heads // lens.heads for head in heads if head.layer == layer}
            tried += [Site(layer=layer, component=component, head=head, position=name) for head in sorted(shared)]
    default = Site(layer=layer, component="resid_pre", position="cue" if "cue" in names else "last")
    if not tried:
        return default
    source, goal = lens.capture(both.clean, [(layer, "k"), (layer, "v")])
    try:
        engine = Engine(lens, both.corrupt, both.corrupt_spans)
    except RunError:
        return default
    base = both.metric(engine.logits)
    moved = engine.sweep(tried, source, both.metric) - base
    whole = float((both.metric(goal) - base).mean())
    effect = dict.fromkeys(spans, 0.0)
    for site, value in zip(tried, moved.mean(1).tolist(), strict=True):
        effect[str(site.position)] += value / whole if whole else 0.0
    best = max(spans, key=lambda name: effect[name])
    return default.model_copy(update={"position": best}) if effect[best] >= READER else default
