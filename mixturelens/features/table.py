"""The units that carry a concept, kind by kind: features beside neurons, heads and directions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixturelens.features.dictionary import Dictionary
from mixturelens.features.record import Concept, Several, Table, Unit, UnitScore
from mixturelens.features.together import fewest_features, fewest_heads, fewest_neurons
from mixturelens.features.units import Place, Trial, best_direction, best_head, best_of, pool_of, pool_of_neurons
from mixturelens.features.vectors import directed, directions
from mixturelens.probing.record import Subspace
from mixturelens.stats import mean_interval
from mixturelens.types import InputError


def find_table(
    concept: Concept,
    trial: Trial,
    features: Dictionary,
    subspace: Subspace | None = None,
    missing: list[str] | None = None,
) -> Table:
    """The best feature, neuron, head and direction for one concept, chosen on one half of the questions by patching,
    and judged on the other; and how many features, neurons and heads it takes.

    Features and directions are looked for at the site of the trial, neurons and heads at its position, in the layers
    that it looks at. `subspace`: a direction found by interchange, at its own site; one of several dimensions is no
    unit, and is left out. Where the trial has a ground, every best unit is clamped in behaviour, to its mean clean
    activation.

    What cannot be found of one kind is said in `missing`, if that is given; else InputError is raised.
    """
    lens, site = trial.lens, trial.judge.site
    scores: list[UnitScore] = []
    several: list[Several] = []

    def attempt(what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except InputError as error:
            if missing is None:
                raise
            missing.append(f"{concept}, {what}: {error}")

    def feature(index: int) -> Unit:
        return Unit(kind="feature", site=site, index=index)

    def of_features() -> None:
        pool = pool_of(Place(trial, features), feature)
        scores.append(best_of(pool))
        several.append(fewest_features(pool))

    def of_neurons() -> None:
        looked_at = trial.settings.layers
        seen = [layer for layer in range(lens.layers) if (layer, "neurons") in trial.choose.corrupt.seen]
        pool = pool_of_neurons(trial, [layer for layer in seen if looked_at is None or layer in looked_at])
        scores.append(best_of(pool))
        several.append(fewest_neurons(trial, pool))

    def of_heads() -> None:
        scores.append(best_head(trial))
        several.append(fewest_heads(trial))

    def of_directions() -> None:
        found, names = directions(trial.choose)
        unit = [Unit(kind="direction", site=site, name=name) for name in names]
        scores.append(best_direction(Place(trial, found), lambda index: unit[index]))

    def interchange(subspace: Subspace) -> None:
        there = trial.at(subspace.site)
        vectors = torch.tensor(subspace.directions, device=lens.device)
        unit = Unit(kind="subspace", site=subspace.site, name="interchange")
        scores.append(best_direction(Place(there, directed(vectors, there.choose)), lambda _: unit))

    attempt("features", of_features)
    attempt("neurons", of_neurons)
    attempt("heads", of_heads)
    attempt("directions", of_directions)
    if subspace is not None and subspace.dimensions == 1:
        attempt("interchange direction", lambda: interchange(subspace))
    return Table(
        concept=concept,
        checkpoint="before" if trial.contrasts.kind == "hint" else "after",
        clean=trial.contrasts.clean,
        corrupt=trial.contrasts.corrupt,
        questions=len(trial.judge),
        base=mean_interval(trial.judge.base, trial.counts),
        goal=mean_interval(trial.judge.goal, trial.counts),
        site=site,
        scores=tuple(scores),
        several=tuple(several),
    )
