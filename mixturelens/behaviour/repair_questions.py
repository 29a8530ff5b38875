"""What repairs are tried on: R with interventions, on questions that choose and questions that judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.harmed import Harm
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.hooks.edits import Rewrite
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.kept import KeptBeginnings
from mixturelens.hooks.lens import Lens
from mixturelens.hooks.placed import PlacedPrompt, known_prompts
from mixturelens.models import end_tokens
from mixturelens.stats import PROPORTION, interval, share
from mixturelens.suite import Suite
from mixturelens.types import InputError, Interval, Intervention

WORTH = 0.02
"""Accuracy that must be lost under the harmed cue for a repair to make sense."""


@dataclass(frozen=True)
class Ground:
    """What repairs are tried on: R under its lens, and the questions that choose and those that judge."""

    lens: Lens
    suite: Suite
    harm: Harm
    scorer: Scorer
    choose: Prompts
    judge: Prompts
    known: Mapping[tuple[int, ...], PlacedPrompt]
    kept: KeptBeginnings
    """What R's prompts leave behind, for all interventions that come after it."""
    contrasts: Contrasts
    """Cue contrasts of all questions; their first half chooses."""
    seed: int

    def behaviour(self, interventions: Sequence[Intervention | Rewrite], prompts: Prompts) -> Behaviour:
        """What R does on these prompts with interventions in place; the seed is that of the ground."""
        model = Intervened(self.lens, interventions, self.known, self.kept)
        return measure(self.scorer, model, prompts, self.seed)

    def accuracies(self, behaviour: Behaviour, prompts: Prompts) -> dict[str, Interval]:
        """Expected accuracy under each cue, from what was measured on these prompts, with intervals over questions."""
        grid = grid_of(prompts, self.seed)
        draws = grid.draws(behaviour.correct.sum(-1))
        return {cue: interval(draws[:, c], grid.counts, bounds=PROPORTION) for c, cue in enumerate(self.suite.cues)}

    def both(self, behaviour: Behaviour, prompts: Prompts) -> tuple[float, float]:
        """Accuracy under the harmed and under the trained cue."""
        found = self.accuracies(behaviour, prompts)
        return found[self.harm.harmed_cue].known, found[self.harm.trained_cue].known


def make_ground(lens: Lens, suite: Suite, harm: Harm, seed: int) -> Ground:
    """Split the questions of a suite into those that choose and those that judge, with what repairs of R need at hand.

    `lens` is R's. Raises InputError for one question alone, or where no cue contrast is left.
    """
    tokenizer = lens.tokenizer
    contrasts = cue_contrasts(suite, tokenizer, harm.policy, harm.cues, harm.shows)
    choosing = {row.question for row in contrasts.half(0).rows}
    choose, judge = ([row for row in suite.neutral if (row.id in choosing) == side] for side in (True, False))
    if not judge:
        raise InputError("one question is not enough: one half chooses what to repair, the other half judges it")
    config = lens.model.config.get_text_config()
    return Ground(
        lens=lens,
        suite=suite,
        harm=harm,
        scorer=Scorer(end_tokens(lens.model, tokenizer), config.vocab_size, lens.device),
        choose=prepare(suite, choose, tokenizer),
        judge=prepare(suite, judge, tokenizer),
        known=known_prompts(suite, suite.neutral, tokenizer),
        kept=KeptBeginnings(lens),
        contrasts=contrasts,
        seed=seed,
    )


@dataclass(frozen=True)
class Scale:
    """What S and R do on the questions that judge: how far a repair could go, and where it starts."""

    before: Behaviour
    after: Behaviour
    grid: Grid
    columns: tuple[int, int]
    """Of the harmed and of the trained cue."""
    ceiling: Float[np.ndarray, " draw"]
    """Best forced accuracy of S under the harmed cue."""

    def gap_closed(self, found: Behaviour) -> Interval:
        """How much of the lost accuracy a repair brings back: (repaired - R) / (ceiling - R) under the harmed cue.

        Null where ceiling and R do not surely differ by WORTH.
        """
        reached, broken = (self._accuracy(each, 0) for each in (found, self.after))
        return interval(share(reached - broken, self.ceiling - broken, WORTH), self.grid.counts)

    def trained_change(self, found: Behaviour) -> Interval:
        """Change of the expected accuracy under the trained cue."""
        return interval(self._accuracy(found, 1) - self._accuracy(self.after, 1), self.grid.counts)

    def _accuracy(self, behaviour: Behaviour, which: int) -> Float[np.ndarray, " draw"]:
        return self.grid.draws(behaviour.correct.sum(-1))[:, self.columns[which]]


def scale_of(ground: Ground, before: Any) -> Scale:
    """Measure S (`before`, a model) and R on the questions that judge. The ceiling is the policy that S forces best."""
    grid = grid_of(ground.judge, ground.seed)
    harmed, trained = (ground.suite.cues.index(cue) for cue in (ground.harm.harmed_cue, ground.harm.trained_cue))
    start = measure(ground.scorer, before, ground.judge, ground.seed)
    forced = grid.draws(start.forced_accuracy)[:, harmed]
    return Scale(
        before=start,
        after=ground.behaviour((), ground.judge),
        grid=grid,
        columns=(harmed, trained),
        ceiling=forced[:, int(np.nanargmax(forced[0]))],
    )
