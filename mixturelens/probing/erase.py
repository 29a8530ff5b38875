"""Concept erasure: make the cue unreadable at one site (LEACE), and see what is left of its use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import Prompts, prepare, without_answers
from mixturelens.contrasts import Contrasts
from mixturelens.hooks.batches import Sides, sides
from mixturelens.hooks.columns import Columns, Spans
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.kept import KeptBeginnings
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.hooks.metrics import to_numpy
from mixturelens.hooks.placed import known_prompts
from mixturelens.models import end_tokens
from mixturelens.probing.leace import Eraser, behaviour_left, gap_left, leace, random_erasers
from mixturelens.probing.record import ErasedSite, Erasure
from mixturelens.probing.scores import auroc
from mixturelens.stats import PROPORTION, apart, interval, resample_counts, resampled_mean, share
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
Place = tuple[int, Component, str | int | None]
"""Layer, component and position of a site."""
Acts = Mapping[Place, Tensor]
"""Place -> its activations, token by token over the rows."""


class Erasing:
    """One model, and the contrasts that the cue is erased on: `half(0)` of the questions fits, `half(1)` judges.

    Prompts go through the model once for all sites that `ahead` names, and once for what else is asked for; the patch
    engine's own runs are made once.
    """

    def __init__(
        self, lens: Lens, contrasts: Contrasts, seed: int = 0, random: int = SCANNED, ahead: Sequence[Site] = ()
    ) -> None:
        """`random`: erasers of random directions that each site is compared with.

        Raises InputError for fewer than two questions.
        """
        if len(contrasts.rows) < 2:
            raise InputError("one half of the questions fits erasers and the other judges them: give at least two")
        self.lens, self.contrasts, self.seed, self.random = lens, contrasts, seed, random
        self.fit, self.judge = (sides(lens, contrasts.half(half)) for half in (0, 1))
        self.kept = KeptBeginnings(lens)
        self._ahead = list(ahead)
        self._acts: dict[str, tuple[dict[Place, Tensor], dict[Place, Tensor]]] = {}
        self._engines: dict[int, tuple[Engine, Engine]] = {}

    # --- activations --------------------------------------------------------------------------------------------------

    def _check(self, site: Site) -> None:
        self.lens.check(site)
        if site.component == "pattern":
            raise InputError(f"{site}: attention patterns are no activations to erase a concept from")

    def _note(self, which: Literal["fit", "judge"], sites: Sequence[Site]) -> tuple[Acts, Acts]:
        """Activations of one half at sites, under both cues; those that are known are not computed again."""
        both = self.fit if which == "fit" else self.judge
        found = self._acts.setdefault(which, ({}, {}))
        places = [_place(site) for site in sites]
        if any(place not in found[0] for place in places):
            new = dict.fromkeys([*places, *map(_place, self._ahead)])
            for acts, (batch, spans) in zip(found, _batches(both), strict=True):
                wanted: dict[tuple[int, Component], list[str | int | None]] = {}
                for layer, component, position in new:
                    if (layer, component, position) not in acts:
                        wanted.setdefault((layer, component), []).append(position)
                masks = {at: Columns(batch, spans).mask(at) for at in {at for some in wanted.values() for at in some}}

                def noter(key: tuple[int, Component], acts=acts, wanted=wanted, masks=masks) -> Edit:
                    def note(activation: Tensor) -> None:
                        for at in wanted[key]:
                            kept = activation.detach()[masks[at]]
                            acts[*key, at] = kept.float() if kept.element_size() < 4 else kept

                    return note

                with torch.no_grad():
                    self.lens.run(batch, [(self.lens.point(*key), noter(key)) for key in wanted])
        return found

    def _fitted(self, site: Site) -> tuple[Float[Tensor, "row d"], Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Activations at a site under both cues, token by token; which cue it was (1 the clean one); whose question."""
        rows = [_unit(acts[_place(site)], site) for acts in self._note("fit", [site])]
        labels = [torch.full((len(x),), 1 - side, device=x.device) for side, x in enumerate(rows)]
        owners = [Columns(*of).mask(site.position).nonzero()[:, 0] for of in _batches(self.fit)]
        return torch.cat(rows), torch.cat(labels), torch.cat(owners)

    def thin(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """Sentences for `missing`: where erasers are fitted on fewer rows than there are dimensions, if anywhere."""
        shapes = [self._fitted(site)[0].shape for site in sites]
        few = [(rows, size) for rows, size in shapes if rows < size]
        if not few:
            return ()
        rows, size = min(few)
        return (
            f"whether the cue is erased for sure: at {len(few)} of {len(sites)} sites erasers are fitted on fewer rows "
            f"({rows} or more) than there are dimensions ({size}); `gap` says what is left of it on other questions",
        )

    def _readable(self, eraser: Eraser, site: Site) -> Interval:
        """AUROC of the direction that is erased, on the questions that judge; the tokens of a span are averaged."""
        if not eraser.rank:
            return Interval(value=0.5, low=0.5, high=0.5)
        scores = [to_numpy(eraser.found(each)[:, 0]) for each in self._judged(site)]
        question = torch.arange(len(self.judge)).repeat(2)
        positive = (torch.arange(2 * len(self.judge)) < len(self.judge)).long()
        read = torch.from_numpy(np.concatenate(scores))[None]
        counts = resample_counts(len(self.judge), self.seed, AUROC_DRAWS)
        return interval(auroc(read, positive, question, counts)[:, 0], counts, bounds=PROPORTION, digits=6)

    def _judged(self, site: Site) -> list[Float[Tensor, "question d"]]:
        """Activations at a site under both cues on the questions that judge; the tokens of a span are averaged."""
        found = []
        for acts, (batch, spans) in zip(self._note("judge", [site]), _batches(self.judge), strict=True):
            mask = Columns(batch, spans).mask(site.position)
            rows = _unit(acts[_place(site)], site).double()
            total = rows.new_zeros(len(batch), rows.shape[1]).index_add(0, mask.nonzero()[:, 0], rows)
            found.append(total / mask.sum(1, keepdim=True))
        return found

    def _gap(self, eraser: Eraser, site: Site, counts: Int[np.ndarray, "draw question"]) -> Float[np.ndarray, " draw"]:
        """The manipulation check: what of the gap between the cues the eraser leaves on the questions that judge."""
        one, other = self._judged(site)
        return gap_left(eraser, one, other, counts)

    # --- site by site, by exact patching ------------------------------------------------------------------------------

    def sites(self, sites: Sequence[Site], readable: Sequence[Interval] | None = None) -> tuple[ErasedSite, ...]:
        """What is left of the difference between two cues once the cue is erased at each site in turn.

        The contrasts have a policy in place. Erasers are fitted on the activations of both prompts (of all tokens of
        the site's position), and judged by the difference of the log-odds between the two prompts, both erased, as a
        share of the plain difference (a ratio of means). Random erasers of equal rank are the null. `readable`: AUROC
        of probes at these sites; without it, that of the eraser's own direction (Fisher's discriminant). `gap` says
        whether the cue is erased where it is judged.

        Raises InputError for sites that do not exist, cues that do not differ in behaviour, or a model that cannot be
        patched exactly.
        """
        for site in sites:
            self._check(site)
        counts = resample_counts(len(self.judge), self.seed)
        self._note("fit", sites)
        erasers, random = [], []
        for site in sites:
            x, labels, question = self._fitted(site)
            erasers.append(leace(x, labels, question))
            some = self.random if erasers[-1].rank else 0
            random.append(random_erasers(x, erasers[-1].rank, some, self.seed) if some else [])
        if readable is None:
            readable = [self._readable(eraser, site) for eraser, site in zip(erasers, sites, strict=True)]
        plain, erased = self._differences(len(self.judge), sites, [[eraser] for eraser in erasers])
        few_plain, null = self._differences(min(SOME, len(self.judge)), sites, random)
        whole = resampled_mean(plain, counts)
        if not apart(whole, APART):
            raise InputError(f"the two cues differ by {whole[0]:.2f} nats ({APART} are needed): nothing to erase")
        self._note("judge", sites)
        found = []
        for site, eraser, read, (own,), others in zip(sites, erasers, readable, erased, null, strict=True):
            gap = self._gap(eraser, site, counts)
            found.append(
                ErasedSite(
                    site=site,
                    readable=read,
                    gap=interval(gap, counts, digits=6),
                    left=behaviour_left(share(resampled_mean(own, counts), whole, APART), gap, counts, digits=6),
                    random=tuple(round(float(each.mean() / few_plain.mean()), 6) for each in others),
                )
            )
        return tuple(found)

    def tokens(self, site: Site) -> float:
        """Tokens, as passed through all layers, that erasing at a site takes, about."""
        judged = 0
        for batch, spans in _batches(self.judge):
            columns = Columns(batch, spans)
            judged += sum(columns.width - columns.of(site.position, row)[0] for row in range(len(batch)))
        return judged * (1 - site.layer / self.lens.layers) * (1 + self.random * min(1.0, SOME / len(self.judge)))

    def _engines_of(self, rows: int) -> tuple[Engine, Engine]:
        """Clean and corrupt prompts of the first rows that judge."""
        if rows not in self._engines:
            try:
                clean, corrupt = (Engine(self.lens, *each) for each in _batches(self.judge.part(slice(0, rows))))
            except RunError as error:
                raise InputError(f"erasing at many sites needs the patch engine: {error}") from None
            self._engines[rows] = clean, corrupt
        return self._engines[rows]

    def _differences(
        self, rows: int, sites: Sequence[Site], erasers: Sequence[Sequence[Eraser]]
    ) -> tuple[Float[np.ndarray, " question"], list[list[Float[np.ndarray, " question"]]]]:
        """Metric of the clean prompt less that of the corrupt one: plain, and [site][eraser] with both erased there.

        Of the first rows that judge. An eraser of rank 0 changes nothing and is not run.
        """
        both = self.judge.part(slice(0, rows))
        plain = np.zeros(rows)
        found = [[np.zeros(rows) for _ in each] for each in erasers]
        noted, engines = self._note("judge", sites), self._engines_of(rows)
        for sign, (batch, spans), acts, engine in zip((1.0, -1.0), _batches(both), noted, engines, strict=True):
            base = sign * to_numpy(both.metric(engine.logits))
            plain += base
            columns = Columns(batch, spans)
            for position, numbers in _by_position(sites):
                mask = columns.mask(position)
                some_rows = int(mask.sum())  # rows come first, and their tokens in order
                before = {n: acts[_place(sites[n])][:some_rows] for n in numbers}
                for which in range(max((len(erasers[n]) for n in numbers), default=0)):
                    some = [n for n in numbers if which < len(erasers[n]) and erasers[n][which].rank]
                    for n in numbers:
                        if which < len(erasers[n]) and n not in some:
                            found[n][which] += base
                    source: dict[tuple[int, Component], Tensor] = {}
                    for n in some:
                        key: tuple[int, Component] = (sites[n].layer, sites[n].component)
                        now = before[n].clone()
                        if key not in source:
                            source[key] = now.new_zeros(*mask.shape, *now.shape[1:])
                            source[key][mask] = now
                        new = source[key][mask]
                        unit = _unit(new, sites[n])
                        unit[:] = erasers[n][which].apply(_unit(now, sites[n]))
                        source[key][mask] = new
                    values = to_numpy(engine.sweep([sites[n] for n in some], source, both.metric)) if some else []
                    for n, value in zip(some, values, strict=True):
                        found[n][which] += sign * value
        return plain, found

    # --- in behaviour -------------------------------------------------------------------------------------------------

    def in_behaviour(
        self, suite: Suite, site: Site, readable: Interval = NOT_MEASURED, random: int | None = None
    ) -> Erasure:
        """What is left of the difference between cues in P(answer given policy), with the cue erased at one site.

        The policy is that of the contrasts, in its first wording. The eraser is the same for all tokens of the site's
        position; behaviour is measured on the questions that judge, as the suite says (exactly or by samples), with
        `random` (RANDOM) random erasers of equal rank as the null. At the position `policy` the eraser is put at the
        announcement and all that follows (`completion`).

        Raises InputError if the suite names no behaviours, there is nothing to erase, or the cues do not differ in what
        they bring about.
        """
        self._check(site)
        contrasts, seed, policy = self.contrasts, self.seed, self.contrasts.policy
        if contrasts.kind != "cue" or policy is None:
            raise InputError("erasing the cue needs contrasts of two cues with a policy in place")
        if ANSWER not in suite.behaviour_names:
            raise InputError("P(answer given policy) needs a suite that names behaviours")
        x, labels, question = self._fitted(site)
        eraser = leace(x, labels, question)
        if not eraser.rank:
            raise InputError(f"{site}: the cue cannot be read there, so there is nothing to erase")
        if not readable.measured:
            readable = self._readable(eraser, site)
        ground = self.ground(suite)
        some = ground if len(self.judge) <= SOME else self.ground(suite, SOME)
        where = in_behaviour(site, contrasts)
        plain = ground.answers(())
        erased = ground.answers(eraser.interventions(where))
        number = RANDOM if random is None else random
        null = [some.answers(each.interventions(where)) for each in random_erasers(x, eraser.rank, number, seed)]
        few_plain = (plain if some is ground else some.answers(()))[0]

        whole = plain[:, 0] - plain[:, 1]
        if not apart(whole, APART_P):
            between = whole[0]
            raise InputError(
                f"P(answer given {policy!r}) differs by {between:.3f} between {contrasts.clean!r} and "
                f"{contrasts.corrupt!r} ({APART_P} is needed): nothing to erase"
            )
        cues, counts = (contrasts.clean, contrasts.corrupt), ground.grid.counts
        gap = self._gap(eraser, site, counts)
        return Erasure(
            site=where,
            readable=readable,
            policy=policy,
            plain={cue: interval(plain[:, c], counts, bounds=PROPORTION) for c, cue in enumerate(cues)},
            erased={cue: interval(erased[:, c], counts, bounds=PROPORTION) for c, cue in enumerate(cues)},
            gap=interval(gap, counts),
            left=behaviour_left(share(erased[:, 0] - erased[:, 1], whole, APART_P), gap, counts),
            random=tuple(round(float(np.subtract(*each[0]) / np.subtract(*few_plain)), 6) for each in null),
        )

    def tokens_in_behaviour(self, suite: Suite, site: Site) -> float:
        """Tokens, about, through all layers, that measuring behaviour once with the cue erased at a site takes."""
        prompts = self.ground(suite, SOME).prompts
        behind = [ids for placed in prompts.placed for each in placed for _, ids in each.behaviours]
        where = in_behaviour(site, self.contrasts).position
        total = float(sum(map(len, behind)) + 3 * len(prompts.contexts))
        for batch, spans in _batches(self.judge.part(slice(0, SOME))) if where not in ("last", "completion") else ():
            columns = Columns(batch, spans)
            total += sum(columns.width - columns.of(where, row)[0] for row in range(len(batch)))
        return total

    def ground(self, suite: Suite, questions: int | None = None) -> JudgingQuestions:
        """The questions that judge (or the first of them), and how behaviour is measured on them."""
        lens, contrasts, tokenizer = self.lens, self.contrasts, self.lens.tokenizer
        cues = (contrasts.clean, contrasts.corrupt)
        judging = {row.question for row in contrasts.half(1).rows[:questions]}
        rows = [row for row in suite.neutral if row.id in judging and row.cue in cues]
        policy = list(suite.policies).index(str(contrasts.policy))
        prompts = prepare(suite, rows, tokenizer)
        # nothing else is asked about
        kept = [k for k, a in enumerate(prompts.announcements) if (a.policy, a.wording) == (policy, 0)]
        vocabulary = lens.model.config.get_text_config().vocab_size
        return JudgingQuestions(
            lens=lens,
            scorer=Scorer(end_tokens(lens.model, tokenizer), vocabulary, lens.device),
            prompts=without_answers(prompts.only(kept)) if suite.literal else prompts.only(kept),
            known=known_prompts(suite, rows, tokenizer),
            kept=self.kept,
            grid=grid_of(prompts, self.seed),
            columns=(suite.cues.index(cues[0]), suite.cues.index(cues[1])),
            policy=policy,
            seed=self.seed,
        )


def _place(site: Site) -> Place:
    return site.layer, site.component, site.position


def _batches(both: Sides) -> tuple[tuple[Tokens, Sequence[Spans]], tuple[Tokens, Sequence[Spans]]]:
    """Clean and corrupt prompts, and the spans of each."""
    return (both.clean, both.spans), (both.corrupt, both.corrupt_spans)


def _unit(activation: Tensor, site: Site) -> Tensor:
    """The numbers of a site at some tokens, as a view: [token, d]."""
    if site.component in PER_HEAD:
        return activation.flatten(1) if site.head is None else activation[:, site.head]
    return activation if site.neuron is None else activation[:, site.neuron : site.neuron + 1]


def _by_position(sites: Sequence[Site]) -> Iterator[tuple[str | int | None, list[int]]]:
    """Sites of one position are patched together; sites that would overlap in it are not."""
    groups: dict[tuple[str | int | None, bool], list[int]] = {}
    for number, site in enumerate(sites):
        whole = site.head is None and site.neuron is None
        groups.setdefault((site.position, whole), []).append(number)
    for (position, _), numbers in groups.items():
        yield position, numbers


AUROC_DRAWS = 500


@dataclass(frozen=True)
class JudgingQuestions:
    """The questions that judge, and how behaviour is measured on them."""

    lens: Lens
    scorer: Scorer
    prompts: Prompts
    known: Mapping
    kept: KeptBeginnings
    grid: Grid
    columns: tuple[int, int]
    """Of the clean and of the corrupt cue."""
    policy: int
    seed: int

    def answers(self, interventions: Sequence[Intervention]) -> Float[np.ndarray, "draw cue"]:
        """P(answer given policy) under the clean and the corrupt cue, in every bootstrap sample."""
        model = Intervened(self.lens, interventions, self.known, self.kept)
        found = measure(self.scorer, model, self.prompts, self.seed).forced_behaviour
        answer = self.prompts.suite.behaviour_names.index(ANSWER)
        return self.grid.draws(found[:, self.policy, 0, answer])[:, list(self.columns)]


def in_behaviour(site: Site, contrasts: Contrasts) -> Site:
    """The site as an intervened model calls it: `completion` where it lies behind the prompt."""
    first = contrasts.rows[0].spans.get("policy", (len(contrasts.rows[0].clean),))[0]
    behind = site.position == "policy" or (isinstance(site.position, int) and site.position >= first)
    return site.model_copy(update={"position": "completion"}) if behind else site
