"""Probing of a pair: what can be read where, what erasing it does, and the subspaces that carry it, to one record."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mixturelens.behaviour.harmed import Harm, find_harm, gained_and_lost
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import Contrasts, cue_contrasts, hint_contrasts
from mixturelens.hooks.batches import as_begun
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.models import Pair
from mixturelens.models.cost import Work, announced, check_memory, estimate, said_time
from mixturelens.probing.erase import RANDOM, SCANNED, Erasing
from mixturelens.probing.plan import make_plan
from mixturelens.probing.prompts import Own, ProbedSuite, own_policies
from mixturelens.probing.reader import reading_site
from mixturelens.probing.reading import Reading, read
from mixturelens.probing.readouts import Network, Sites, first, readouts, sites_of, to_probe, untrained_lens
from mixturelens.probing.record import Concept, ErasedSite, Erasure, ProbingRecord, Shift, Subspace
from mixturelens.probing.shift import shifts
from mixturelens.probing.subspace import find_subspace, subspace_tokens
from mixturelens.stats import too_few
from mixturelens.types import NOT_MEASURED, InputError, Interval, Side, Site
from mixturelens.unfinished import NOTHING_KEPT, Unfinished, attempt

Say = Callable[[str], None]

READABLE = 0.95
"""AUROC of the cue probe in R from which the cue counts as readable at a site."""
SCANNING = 0.5
"""Of what erasing and subspaces may take, what erasing site by site may."""
FEW = 3
"""Random erasers, at least, that an erasure is compared with; as many at each site of a large model."""
DIFFERS = 0.1
"""Difference between what is left of the cue's effect at two layers, for a layer between them to be looked at."""
SIDES: Mapping[str, str] = {"before": "S", "after": "R"}
UNUSED = 0.9
"""Share of the difference between cues that must be left, for sure, for a site to count as unused."""


class ProbingSettings(NamedTuple):
    """How a pair is probed: everything, or on a large model the residual stream first; and the seed of all draws."""

    exhaustive: bool = False
    """Every site is probed and the cue is erased at each, whatever that takes; else the rest of a large model is looked
    at where the residual stream changes."""
    seed: int = 0
    parts: Unfinished = NOTHING_KEPT
    """Where activations that memory cannot hold lie for a while."""


SETTINGS = ProbingSettings()


def probing_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    reader: Sequence[Site] | InputError = (),
    settings: ProbingSettings = SETTINGS,
    say: Say | None = None,
) -> ProbingRecord:
    """Probe S and R at every site, erase the cue in R, learn the subspaces of cue and selector in S and test them in R.

    `reader`: the heads of R that read the cue, as patching found them, or the error that says why none is known: where
    the cue is used is then not asked. Activations that memory does not hold go to a file in the pair's folder for a
    while. Whatever this pair does not allow is left out, and said in `missing`. Raises InputError for fewer than two
    policies or four questions, or if --memory is not enough.
    """
    say, exhaustive, seed = say or (lambda _: None), settings.exhaustive, settings.seed
    policies = gained_and_lost(behaviour)
    pair = pair.spelled(behaviour.spelling)
    suite, tokenizer = pair.suite, pair.tokenizer
    prompts, announcements = to_probe(suite, tokenizer)
    plan = make_plan(pair, prompts, announcements, exhaustive)
    say(announced("probes", plan.estimate))
    check_memory(pair, plan.estimate, "probing")
    prompts = first(plan.questions, prompts)
    lenses: dict[Side, Lens] = {}
    with contextlib.ExitStack() as stack:
        shelf = None
        if plan.on_disk:
            shelf = stack.enter_context(settings.parts.shelf())

        def network(name: Network, lens: Lens) -> Reading:
            say(f"reading {'the untrained network' if name == 'untrained' else SIDES[name]}")
            return read(lens, prompts, where.keys, announcements if name != "untrained" else (), shelf and shelf / name)

        lens = untrained_lens(pair, seed)
        where = sites_of(lens, prompts, exhaustive)
        networks: dict[Network, Reading] = {"untrained": network("untrained", lens)}
        del lens
        gc.collect()  # of a network that is held by its own hooks
        own: dict[Side, Own] = {}
        for side in pair.sides:
            lenses[side] = lens_of(pair, side)
            networks[side] = network(side, lenses[side])
            own[side] = own_policies(lenses[side], suite, prompts.rows["neutral"], networks[side].logs, seed)
        say("linear probes")
        scores = readouts(networks, own, where, ProbedSuite(suite, tokenizer, prompts, behaviour, policies), seed)
        del networks
    problems = [*plan.missing, *scores.missing]
    erased: list[ErasedSite] = []
    erasures: dict[str, Erasure] = {}
    subspaces: list[Subspace] = []
    moved: list[Shift] = []
    judged: list[int] = []
    """Questions that erasers are judged on."""
    left = [plan.tokens]
    """Tokens that erasing and subspaces may still take."""

    def part(what: str, work: Callable[[], object]) -> None:
        say(what)
        attempt(what, work, problems)

    def erase(cue: Contrasts) -> None:
        erasing = eraser_of(cue)
        readout = next((each for each in scores.readouts if each.target == "cue"), None)
        if readout is not None:
            shared = set.intersection(*(set(row.spans) for row in cue.rows))
            values = readout.after.value
            readable = {
                site: readout.after.at(i)
                for i, (site, value) in enumerate(zip(scores.sites, values, strict=True))
                if (isinstance(site.position, int) or site.position in shared)
                and value is not None
                and value >= READABLE
            }
            found, spent, unseen = scan(erasing, readable, where, math.inf if exhaustive else left[0] * SCANNING)
            erased.extend(found)
            left[0] -= spent
            problems.extend((*unseen, *erasing.thin([each.site for each in found])))
        inner = [each for each in erased if each.site.layer < erasing.lens.layers - 1]
        unused = least_used(inner)
        if unused is not None:
            erasures["unused"] = in_full("unused", erasing, unused.site, unused.readable)
        elif doubtful := [each for each in inner if leaves(each)]:
            gaps = [abs(each.gap.value) for each in doubtful if each.gap.value is not None]
            problems.append(
                f"a site where the cue is readable and unused: at {len(doubtful)} erasing it changes nothing, but on "
                "questions that did not fit the eraser the cue is not erased there for sure (of its gap "
                f"{f'up to {max(gaps):.2f}' if gaps else 'nobody knows how much'} is left)"
            )

    def erase_used(cue: Contrasts) -> None:
        if isinstance(reader, InputError):
            raise reader
        if not reader:
            raise InputError("no cue reader is known")
        site = reading_site(lenses["after"], reader, cue)
        erasures["used"] = in_full("used", eraser_of(cue), site, NOT_MEASURED)

    def in_full(what: str, erasing: Erasing, site: Site, readable: Interval) -> Erasure:
        """Erased in behaviour, beside as many random erasers as there is time for."""
        each = erasing.tokens_in_behaviour(suite, site)
        number = RANDOM if exhaustive else max(FEW, min(RANDOM, int(left[0] / 2 / max(1.0, each))))
        if number < RANDOM:
            problems.append(f"erasing where the cue is {what}: {number} random directions beside it, not {RANDOM}")
        left[0] -= (2 + number) * each
        return erasing.in_behaviour(suite, site, readable, number)

    made: list[Erasing] = []

    def eraser_of(cue: Contrasts) -> Erasing:
        if not made:
            ahead = () if where.all_of_them else sorted(where.stream, key=lambda site: site.layer)
            shared = set.intersection(*(set(row.spans) for row in cue.rows))
            ahead = [site for site in ahead if site.position in shared]
            made.append(Erasing(lenses["after"], cue, seed, SCANNED if where.all_of_them else FEW, ahead))
            judged.append(len(made[0].judge))
        return made[0]

    def subspace(concept: Concept, contrasts: Contrasts) -> None:
        needed = subspace_tokens(contrasts)
        if needed > left[0] and not exhaustive:
            took = estimate(pair, Work(tokens=needed)).seconds
            raise InputError(f"takes {said_time(took)} more; give --minutes, or --exhaustive")
        subspaces.append(find_subspace(lenses["before"], lenses["after"], contrasts, concept, seed))

    def of_cue(harm: Harm) -> None:
        cue = cue_contrasts(suite, tokenizer, harm.policy, harm.cues, harm.shows)
        problems.extend(f"probes: {line}" for line in cue.left_out)
        cue = as_begun(lenses["before"], suite, cue)
        part("erasing the cue", lambda: erase(cue))
        part("erasing the cue where it is used", lambda: erase_used(cue))
        made.clear()
        part("subspace of the cue", lambda: subspace("cue", cue))

    def of_selector() -> None:
        cue = behaviour.trained_cue or suite.cues[0]
        subspace("selector", hint_contrasts(suite, tokenizer, cue, *policies))

    part("the cue contrast", lambda: of_cue(find_harm(behaviour)))
    if suite.hinted:
        part("subspace of the selector", of_selector)
        part(
            "shift of neutral prompts",
            lambda: moved.extend(shifts(lenses["before"], lenses["after"], suite, policies, seed)),
        )
    return ProbingRecord(
        trained_cue=behaviour.trained_cue,
        policies=policies,
        sites=scores.sites,
        labels=scores.labels,
        readouts=scores.readouts,
        erased=tuple(erased),
        used=erasures.get("used"),
        unused=erasures.get("unused"),
        subspaces=tuple(subspaces),
        shifts=tuple(moved),
        exhaustive=where.all_of_them and not plan.missing,
        missing=(
            *problems,
            *too_few("probes", *(each.questions for each in (*scores.readouts, *subspaces)), *judged),
        ),
    )


def scan(
    erasing: Erasing, readable: Mapping[Site, Interval], where: Sites, most: float
) -> tuple[list[ErasedSite], float, list[str]]:
    """Erase the cue at the sites where it can be read (`readable`: AUROC there), within `most` tokens.

    If all sites would take more, those of the residual stream are erased in a few layers, and then halfway between two
    layers where what is left differs most, until it does not or the tokens are spent. Returns what was found, the
    tokens that it took, and sentences on what was left out.
    """
    if sum(map(erasing.tokens, readable)) <= most:
        sites = list(readable)
        return list(erasing.sites(sites, list(readable.values())) if sites else ()), sum(map(erasing.tokens, sites)), []
    ladders: dict[str | int | None, list[Site]] = {}
    for site in sorted(where.stream, key=lambda site: (site.layer, site.component != "resid_pre")):
        if site in readable:
            ladders.setdefault(site.position, []).append(site)
    stride, rungs = 1, [(p, i) for p, ladder in ladders.items() for i in range(len(ladder))]
    while sum(erasing.tokens(ladders[p][i]) for p, i in rungs) > most / 2 and len(rungs) > 2 * len(ladders):
        stride *= 2
        ends = {p: len(ladder) - 1 for p, ladder in ladders.items()}
        rungs = [(p, i) for p, ladder in ladders.items() for i in sorted({*range(0, len(ladder), stride), ends[p]})]
    found: dict[tuple[str | int | None, int], ErasedSite] = {}
    spent = 0.0
    while rungs:
        sites = [ladders[p][i] for p, i in rungs]
        spent += sum(map(erasing.tokens, sites))
        found |= dict(zip(rungs, erasing.sites(sites, [readable[site] for site in sites]), strict=True))
        gaps = []
        for position in ladders:
            known = sorted(i for p, i in found if p == position)
            for low, high in itertools.pairwise(known):
                ends = (found[position, low].left.value, found[position, high].left.value)
                if ends[0] is None or ends[1] is None:
                    continue
                differ = abs(ends[0] - ends[1])
                if high - low > 1 and differ >= DIFFERS:
                    gaps.append((differ, (position, (low + high) // 2)))
        rungs = []
        room = most - spent
        for _, (position, i) in sorted(gaps, key=lambda gap: -gap[0]):
            room -= erasing.tokens(ladders[position][i])
            if room > 0:
                rungs.append((position, i))
    said = (
        f"erasing the cue site by site: at {len(found)} of the {len(readable)} sites where it can be read, all of them "
        "of the residual stream; --exhaustive erases it at all"
    )
    order = sorted(found, key=lambda rung: (ladders[rung[0]][rung[1]].layer, str(rung[0])))
    return [found[rung] for rung in order], spent, [said]


def least_used(erased: Sequence[ErasedSite]) -> ErasedSite | None:
    """The site where the cue reads best, among those where it is surely erased and the effect surely stays.

    It stays if what is left lies within 1 - UNUSED of all. None if there is no such site. Sites of the last layer that
    nothing reads any more should be left out: they are unused by construction.

    >>> least_used([]) is None
    True
    """
    known = [(each, each.readable.value, each.left.value) for each in erased if each.holds and leaves(each)]
    unused = [(read, -abs(1 - left), each) for each, read, left in known if read is not None and left is not None]
    return max(unused, key=lambda row: row[:2], default=(0, 0, None))[2]


def leaves(each: ErasedSite) -> bool:
    """Whether erasing surely leaves the effect as it is, whether or not the cue is erased there."""
    return each.left.above(UNUSED) and each.left.below(2 - UNUSED)
