"""Interchange subspaces (DAS): the few directions at one site that carry a concept from one prompt to another.

Geiger et al. 2023 (arXiv 2303.02536): an orthonormal [dimension, d] is learnt such that giving a base prompt the
coordinates of a source prompt makes the model do to the base's question what the source's concept asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.contrasts import Contrasts, aligned
from mixturelens.hooks.batches import Sides, sides
from mixturelens.hooks.columns import Columns
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import Lens, Tokens
from mixturelens.hooks.metrics import LogOdds
from mixturelens.probing.record import Concept, Subspace
from mixturelens.stats import PROPORTION, interval, mean_interval, resample_counts, resampled_mean
from mixturelens.types import Component, InputError, RunError, Side, Site

DIMENSIONS = (1, 2, 4, 8)
"""Sizes that are tried, smallest first."""
ENOUGH = 0.95
"""Interchange accuracy on the questions that teach, from which a subspace is large enough."""
CARRIES = 0.9
"""Share of the contrast from which a site carries the concept."""
APART = 0.5
"""Nats by which the sides of a contrast must differ in S, for there to be something to carry."""
STEPS, BATCH, RATE = 60, 128, 0.05
"""Of Adam, on random pairs."""
SOURCES = 1
"""Source prompts under each of the two concepts, for every base prompt and round."""
RANDOM = 16
"""Random subspaces of the null."""
SHUFFLES = 4
"""Subspaces learnt on shuffled labels."""
QUESTIONS = 160
"""Questions of each half, at most."""

Directions = Float[Tensor, "dimension d"]


@dataclass(frozen=True)
class Pairs:
    """Base and source prompts, by row, and what the source asks for (True: what the clean side does)."""

    base: Int[Tensor, " pair"]
    source: Int[Tensor, " pair"]
    asks: Bool[Tensor, " pair"]

    def __len__(self) -> int:
        return len(self.base)


class Interchange:
    """One model and the prompts of both sides of contrasts at one site: rows are clean prompts, then corrupt ones."""

    def __init__(self, lens: Lens, contrasts: Contrasts, site: Site) -> None:
        """Raises InputError if the model's blocks cannot be run alone, or prompts have the site at several widths."""
        both = sides(lens, contrasts)
        self.site, self.questions = site, len(both)
        self.engine, spans = _engine(lens, both)
        batch = self.engine.base
        key = (site.layer, site.component)
        columns = Columns(batch, spans)
        places = [columns.of(site.position, row) for row in range(len(batch))]
        if len({len(place) for place in places}) > 1:
            raise InputError(f"{site}: prompts differ in their number of tokens there, so they cannot be interchanged")
        acts = lens.capture(batch, [key])[0][key]
        self.values: Float[Tensor, "row column d"] = acts[
            torch.arange(len(batch), device=acts.device)[:, None], torch.tensor(places, device=acts.device)
        ]
        self.metric = LogOdds(both.metric.target.repeat(2, 1), both.metric.foil.repeat(2, 1))
        self.own: Float[Tensor, " row"] = self.metric(self.engine.logits)
        """The metric (log-odds, nats) of every prompt as it is."""

    @property
    def clean(self) -> Bool[Tensor, " row"]:
        """Which of the rows are clean prompts."""
        return torch.arange(2 * self.questions, device=self.values.device) < self.questions

    def midpoint(self) -> float:
        """Halfway between the mean log-odds of the two sides, in nats."""
        return float((self.own[self.clean].mean() + self.own[~self.clean].mean()) / 2)

    def swapped(self, pairs: Pairs, directions: Directions) -> Float[Tensor, " pair"]:
        """The metric of every base prompt, with its coordinates in the subspace those of its source."""
        base, source = self.values[pairs.base], self.values[pairs.source]
        directions = directions.to(base.dtype)
        mixed = base + (source - base) @ directions.T @ directions
        return self.metric(self.engine.logits_with(self.site, mixed, pairs.base), pairs.base)

    @torch.no_grad()
    def right(self, pairs: Pairs, directions: Directions, threshold: float = 0.0) -> Float[np.ndarray, " question"]:
        """Interchange accuracy of every base question: how often its metric is on the side that the source asks for."""
        agrees = (self.swapped(pairs, directions) > threshold) == pairs.asks
        return self._by_question(pairs.base, agrees)

    def plain(self, threshold: float = 0.0) -> Float[np.ndarray, " question"]:
        """How often the prompts of each question, as they are, do what their own concept asks for."""
        rows = torch.arange(2 * self.questions, device=self.own.device)
        return self._by_question(rows, (self.own > threshold) == self.clean)

    def _by_question(self, rows: Tensor, values: Tensor) -> Float[np.ndarray, " question"]:
        question = (rows % self.questions).cpu().numpy()
        total = np.bincount(question, values.double().cpu().numpy(), self.questions)
        return total / np.bincount(question, minlength=self.questions)


def _engine(lens: Lens, both: Sides) -> tuple[Engine, list[Mapping[str, Sequence[int]]]]:
    batch = Tokens(torch.cat([both.clean.ids, both.corrupt.ids]), torch.cat([both.clean.real, both.corrupt.real]))
    spans = [*both.spans, *both.corrupt_spans]
    try:
        return Engine(lens, batch, spans), spans
    except RunError as error:
        raise InputError(f"interchange subspaces need the patch engine: {error}") from None


def subspace_tokens(contrasts: Contrasts) -> float:
    """Tokens through all layers that finding a subspace takes, about, where it lies in the middle of the network."""
    rows = contrasts.rows
    length = sum(len(row.clean) for row in rows) / len(rows)
    window = length - min(min(row.spans[name]) for row in rows for name in row.spans if name in ("last", "policy"))
    runs = 6 * 2 * min(len(rows) // 2, QUESTIONS) * length
    return runs + 3 * STEPS * BATCH * max(1.0, window) / 2 * (1 + SHUFFLES)


def find_subspace(before: Lens, after: Lens, contrasts: Contrasts, concept: Concept, seed: int = 0) -> Subspace:
    """The smallest subspace (of 1, 2, 4 or 8 dimensions) through which S takes a concept over from another prompt.

    Contrasts are those of the cue with a policy in place, or of two hints (the selector). Base and source are different
    questions under equal or different concepts, half and half; asked for is the target of the base's question if the
    source is a clean prompt, its foil otherwise. The site is the earliest (residual stream, behind the tokens in which
    the two prompts differ: at those, it is the prompt itself) that carries CARRIES of the contrast in S. Site, size and
    subspace are learnt on `half(0)` of the questions in S, and tested on `half(1)` in S and in R, as they are.

    What is asked for is done where the log-odds have the right sign. A model that does the same under both concepts (as
    R does, if no hint is strong enough any more) has no such sign to follow: then its own midpoint between the mean
    log-odds of the two, on the questions that teach, takes the place of 0. So the accuracy says whether the subspace
    still carries what is left of the concept, and `by_sign` whether behaviour follows.

    Nulls: random subspaces, and subspaces learnt in the same way with the sources' concepts shuffled. `margin` is the
    accuracy less that of the best of both, in every bootstrap sample over base questions. Same seed, same numbers.

    Raises InputError if no site carries the concept (S does the same under both), or with fewer than 4 questions.
    """
    if len(contrasts.rows) < 4:
        raise InputError("interchange needs two questions to learn from and two to be tested on: give at least four")
    teach, test = (contrasts.half(half).first(QUESTIONS) for half in (0, 1))
    site = carrying_site(before, teach)
    learner = Interchange(before, teach, site)
    pairs = _pairs(learner, seed, BATCH * STEPS // (4 * SOURCES * learner.questions) + 1)
    check = _pairs(learner, seed + 1)
    middle = threshold(learner)
    directions, dimensions = torch.zeros(0), 0
    for dimensions in DIMENSIONS:
        if dimensions > learner.values.shape[-1]:
            break
        directions = learn(learner, pairs, dimensions, seed)
        if learner.right(check, directions, middle).mean() >= ENOUGH:
            break
    dimensions = len(directions)
    generator = torch.Generator().manual_seed(seed + 2)
    random = [_random(directions, generator) for _ in range(RANDOM)]
    shuffled = [
        learn(learner, _shuffled(pairs, learner, generator), dimensions, seed + 1 + number)
        for number in range(SHUFFLES)
    ]
    models: dict[Side, tuple[Interchange, float]] = {
        "before": (Interchange(before, test, site), middle),
        "after": (Interchange(after, test, site), threshold(Interchange(after, teach, site))),
    }
    tested = _pairs(models["before"][0], seed + 3)
    counts = resample_counts(len(test.rows), seed)
    before_and_after: tuple[Side, Side] = ("before", "after")

    def draws(side: Side, each: Directions) -> Float[np.ndarray, " draw"]:
        model, middle = models[side]
        return resampled_mean(model.right(tested, each, middle), counts)

    often = partial(mean_interval, counts=counts, bounds=PROPORTION)
    found: dict[Side, Float[np.ndarray, " draw"]] = {side: draws(side, directions) for side in before_and_after}
    chance: dict[Side, np.ndarray] = {
        side: np.stack([draws(side, each) for each in random]) for side in before_and_after
    }
    nothing: dict[Side, np.ndarray] = {
        side: np.stack([draws(side, each) for each in shuffled]) for side in before_and_after
    }
    return Subspace(
        concept=concept,
        site=site,
        dimensions=dimensions,
        directions=tuple(tuple(round(x, 7) for x in row) for row in directions.tolist()),
        questions=len(test.rows),
        pairs=len(tested),
        plain={side: often(model.plain(middle)) for side, (model, middle) in models.items()},
        accuracy={side: interval(each, counts, bounds=PROPORTION) for side, each in found.items()},
        threshold={side: round(middle, 6) for side, (_, middle) in models.items()},
        by_sign={side: often(model.right(tested, directions, 0.0)) for side, (model, _) in models.items()},
        random={side: tuple(chance[side][:, 0].round(6).tolist()) for side in before_and_after},
        shuffled={side: tuple(nothing[side][:, 0].round(6).tolist()) for side in before_and_after},
        margin={
            side: interval(each - np.maximum(chance[side].max(0), nothing[side].max(0)), counts)
            for side, each in found.items()
        },
    )


def threshold(model: Interchange) -> float:
    """The log-odds, in nats, above which a model does what the clean side does.

    It is 0, or the midpoint of the two sides where both lie on one side of 0. Where these differ by less than APART
    nats there is no midpoint to speak of, and it stays 0.
    """
    clean, corrupt = float(model.own[model.clean].mean()), float(model.own[~model.clean].mean())
    return 0.0 if clean > 0 > corrupt or clean - corrupt < APART else model.midpoint()


def carrying_site(lens: Lens, contrasts: Contrasts) -> Site:
    """The earliest site of the residual stream whose patch (clean into corrupt) carries CARRIES of a contrast.

    Token by token where all questions are aligned, else by spans of equal length. Left out are the tokens in which the
    two prompts differ, and the last layer's output at the last token, which is the answer itself. If no site carries as
    much, the one that carries most. Raises InputError if the two sides do not differ enough.
    """
    both = sides(lens, contrasts)
    components: list[Component] = ["resid_mid", "resid_post"] if lens.has("resid_mid") else ["resid_post"]
    source, goal = lens.capture(both.clean, [(n, each) for n in range(lens.layers) for each in components])
    try:
        engine = Engine(lens, both.corrupt, both.corrupt_spans)
    except RunError as error:
        raise InputError(f"interchange subspaces need the patch engine: {error}") from None
    base = both.metric(engine.logits)
    whole = float((both.metric(goal) - base).mean())
    if not whole >= APART:
        raise InputError(
            f"the two sides of the {contrasts.kind} contrast differ by {whole:.2f} nats ({APART} are needed): there is "
            "no concept to find a subspace of"
        )
    end = len(contrasts.rows[0].clean) - 1
    sites = [
        Site(layer=layer, component=component, position=position)
        for layer in range(lens.layers)
        for component in components
        for position in _positions(contrasts)
        if not (
            (layer, component) == (lens.layers - 1, components[-1])
            and (position == end or end in contrasts.rows[0].spans.get(str(position), ()))
        )
    ]
    if not sites:
        raise InputError("no position is shared by the prompts behind the tokens in which they differ")
    effects = ((engine.sweep(sites, source, both.metric) - base).mean(1) / whole).tolist()
    best = max(range(len(sites)), key=lambda i: effects[i])
    enough = next((i for i, effect in enumerate(effects) if effect >= CARRIES), best)
    same = [i for i, s in enumerate(sites) if (s.layer, s.component) == (sites[enough].layer, sites[enough].component)]
    return sites[max(same, key=lambda i: effects[i])]


def _positions(contrasts: Contrasts) -> list[str | int]:
    """Tokens (spans, where questions are not aligned) that all prompts have, and that do not differ themselves."""
    rows = contrasts.rows
    if aligned(contrasts):
        return [at for at in range(len(rows[0].clean)) if all(row.clean[at] == row.corrupt[at] for row in rows)]
    shared = [name for name in rows[0].spans if all(name in row.spans for row in rows)]
    return [
        name
        for name in shared
        if len({len(row.spans[name]) for row in rows}) == 1
        and all(row.clean[at] == row.corrupt[at + row.shift] for row in rows for at in row.spans[name])
    ]


def learn(model: Interchange, pairs: Pairs, dimensions: int, seed: int) -> Directions:
    """Orthonormal directions that minimise the logistic loss of the log-odds, with the sign that the source asks for.

    Adam on a free matrix whose QR decomposition they are. It begins at the difference between the sources' mean
    activations under the two concepts, and random directions.
    """
    size = model.values.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    device = model.values.device
    free = torch.randn(dimensions, size, generator=generator).to(device) / size**0.5
    sources = model.values[pairs.source].mean(1).float()
    apart = sources[pairs.asks].mean(0) - sources[~pairs.asks].mean(0)
    free[0] = apart / apart.norm().clamp(min=1e-12)
    free.requires_grad_(True)
    optimizer = torch.optim.Adam([free], RATE)
    order = torch.randperm(len(pairs), generator=generator).to(device)
    sign, middle = torch.where(pairs.asks, 1.0, -1.0), threshold(model)
    for step in range(STEPS):
        part = order[torch.arange(step * BATCH, (step + 1) * BATCH, device=device) % len(order)]
        some = Pairs(pairs.base[part], pairs.source[part], pairs.asks[part])
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        loss = torch.nn.functional.softplus(-sign[part] * (model.swapped(some, _orthonormal(free)) - middle)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _orthonormal(free.detach())


def _orthonormal(free: Float[Tensor, "dimension d"]) -> Directions:
    return torch.linalg.qr(free.T)[0].T


def _random(like: Directions, generator: torch.Generator) -> Directions:
    return _orthonormal(torch.randn(like.shape, generator=generator).to(like))


def _pairs(model: Interchange, seed: int, rounds: int = 1) -> Pairs:
    """Every prompt as a base, `rounds` times with SOURCES sources of other questions under either concept."""
    rng = np.random.default_rng(seed)
    questions, device = model.questions, model.values.device
    rows = np.arange(2 * questions)
    base, source, asks = [], [], []
    for _ in range(rounds * SOURCES):
        for clean in (True, False):
            other = (rows % questions + rng.integers(1, questions, len(rows))) % questions
            base.append(rows)
            source.append(other + (0 if clean else questions))
            asks.append(np.full(len(rows), clean))
    return Pairs(*(torch.from_numpy(np.concatenate(each)).to(device) for each in (base, source, asks)))


def _shuffled(pairs: Pairs, model: Interchange, generator: torch.Generator) -> Pairs:
    """The same pairs with concepts dealt out anew to the source prompts, so that no prompt asks for two things."""
    dealt = model.clean.cpu()[torch.randperm(2 * model.questions, generator=generator)]
    return Pairs(pairs.base, pairs.source, dealt.to(pairs.asks.device)[pairs.source])
