"""Probing of a pair: what can be read where, what erasing it does, and the subspaces that carry it, to one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixturelens.behaviour.harm import Harm, find_harm, gained_and_lost
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import Contrasts, cue_contrasts, hint_contrasts
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.models import Pair
from mixturelens.probing.erase import erase_sites, erasure, reading_site
from mixturelens.probing.readouts import readouts, untrained_lens
from mixturelens.probing.record import ErasedSite, Erasure, ProbingRecord, Shift, Subspace
from mixturelens.probing.shift import shifts
from mixturelens.probing.subspace import find_subspace
from mixturelens.types import InputError, Side, Site

Say = Callable[[str], None]

READABLE = 0.95
"""AUROC of the cue probe in R from which the cue counts as readable at a site."""
UNUSED = 0.9
"""Share of the difference between cues that must be left, for sure, for a site to count as unused."""


def probing_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    *,
    reader: Sequence[Site] = (),
    no_reader: str = "",
    seed: int = 0,
    say: Say | None = None,
) -> ProbingRecord:
    """Probe S and R at every site, erase the cue in R, learn the subspaces of cue and selector in S and test them in R.

    `reader`: the heads of R that read the cue, as patching found them; without them, `no_reader` says why, and where
    the cue is used is not asked. Whatever this pair does not allow is left out, and said in `missing`. Raises
    InputError for fewer than two policies or four questions.
    """
    say = say or (lambda _: None)
    policies = gained_and_lost(behaviour)
    pair = pair.spelled(behaviour.spelling)
    suite = pair.suite
    lenses: dict[Side, Lens] = {side: lens_of(pair, side) for side in pair.sides}
    say("linear probes at every site")
    sites, labels, found, missing = readouts(
        lenses, untrained_lens(pair, seed), suite, behaviour, policies=policies, seed=seed
    )
    erased: list[ErasedSite] = []
    erasures: dict[str, Erasure] = {}
    subspaces: list[Subspace] = []
    moved: list[Shift] = []
    problems = list(missing)

    def attempt(what: str, work: Callable[[], object]) -> None:
        say(what)
        try:
            work()
        except InputError as error:
            problems.append(f"{what}: {error}")

    def erase(cue: Contrasts) -> None:
        lens = lenses["after"]
        readout = next((each for each in found if each.target == "cue"), None)
        if readout is not None:
            shared = set.intersection(*(set(row.spans) for row in cue.rows))
            placed = [isinstance(site.position, int) or site.position in shared for site in sites]
            values = readout.after.value
            readable = [i for i, value in enumerate(values) if placed[i] and value is not None and value >= READABLE]
            if readable:
                columns = [readout.after.at(i) for i in readable]
                erased.extend(erase_sites(lens, cue, [sites[i] for i in readable], columns, seed))
        unused = least_used([each for each in erased if each.site.layer < lens.layers - 1])
        if unused is not None:
            erasures["unused"] = erasure(lens, suite, cue, unused.site, unused.readable, seed)

    def erase_used(cue: Contrasts) -> None:
        if not reader:
            raise InputError(no_reader or "no cue reader is known")
        lens = lenses["after"]
        erasures["used"] = erasure(lens, suite, cue, reading_site(lens, reader, cue), seed=seed)

    def of_cue(harm: Harm) -> None:
        tokenizer = lenses["after"].tokenizer
        cue = cue_contrasts(suite, tokenizer, harm.policy, harm.trained_cue, harm.harmed_cue, harm.shows)
        attempt("erasing the cue", lambda: erase(cue))
        attempt("erasing the cue where it is used", lambda: erase_used(cue))
        attempt(
            "subspace of the cue",
            lambda: subspaces.append(find_subspace(lenses["before"], lenses["after"], cue, "cue", seed)),
        )

    def of_selector() -> None:
        cue = behaviour.trained_cue or suite.cues[0]
        hint = hint_contrasts(suite, lenses["before"].tokenizer, cue, *policies)
        subspaces.append(find_subspace(lenses["before"], lenses["after"], hint, "selector", seed))

    attempt("the cue contrast", lambda: of_cue(find_harm(behaviour)))
    if suite.hinted:
        attempt("subspace of the selector", of_selector)
        attempt(
            "shift of neutral prompts",
            lambda: moved.extend(
                shifts(lenses["before"], lenses["after"], suite, policies, behaviour.trained_cue, seed)
            ),
        )
    return ProbingRecord(
        trained_cue=behaviour.trained_cue,
        policies=policies,
        sites=sites,
        labels=labels,
        readouts=found,
        erased=tuple(erased),
        used=erasures.get("used"),
        unused=erasures.get("unused"),
        subspaces=tuple(subspaces),
        shifts=tuple(moved),
        missing=tuple(problems),
    )


def least_used(erased: Sequence[ErasedSite]) -> ErasedSite | None:
    """Among sites whose erasure surely leaves the effect as it is, within 1 - UNUSED: where the cue reads best; None if
    none. (Sites of the last layer that nothing reads any more should be left out: they are unused by construction.)

    >>> least_used([]) is None
    True
    """
    unused = [each for each in erased if each.left.above(UNUSED) and each.left.below(2 - UNUSED)]
    return max(unused, key=lambda each: (each.readable.value or 0.0, -abs(1 - (each.left.value or 0.0))), default=None)
