"""The features of a pair: SAEs of S where patching points, what their features do, and what RL changed of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from mixturelens.behaviour.ground import make_ground, scale_of
from mixturelens.behaviour.harm import Harm, find_harm
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import checkpoint_contrasts, hint_contrasts
from mixturelens.features.activations import collect, texts
from mixturelens.features.cards import card, interesting
from mixturelens.features.change import site_change
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.exclusive import fit_crosscoder
from mixturelens.features.record import Card, Concept, CrosscoderFit, FeatureRecord, Sae, SiteChange, Table
from mixturelens.features.sae import load_sae, quality, train_sae
from mixturelens.features.sites import arrived_at, named_site
from mixturelens.features.table import find_table
from mixturelens.features.units import make_trial
from mixturelens.hooks.lens import NAMES, Lens, lens_of
from mixturelens.models import Pair
from mixturelens.models.source import fingerprint
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.record import ProbingRecord, Subspace
from mixturelens.spelling import encode_prompts
from mixturelens.stats import half_of
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import Component, InputError, Side, Site

Say = Callable[[str], None]
T = TypeVar("T")
Place = tuple[int, Component]

WIDTH = 2
"""Features an SAE has for each dimension of its site."""
PROMPTS = 4096
"""Prompts that features are learnt from, at most."""
HELD_OUT = 512
"""Prompts that they are judged on, at most."""
SEEDS = 3
"""Crosscoders of one pair: what they count depends on where they began."""


def feature_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    patching: PatchingRecord | None,
    *,
    folder: Path,
    no_patching: str = "",
    probing: ProbingRecord | None = None,
    more: Sequence[PromptRow] = (),
    seed: int = 0,
    say: Say | None = None,
) -> FeatureRecord:
    """SAEs of S at the sites that patching named; the best feature, neuron, head and direction for cue, hint and
    selector; what RL changed of the features, by the terms of the split; and crosscoders over S and R.

    `patching` names the sites; without it, `no_patching` says why, and what RL changed is still looked at where it has
    arrived. `probing` gives the directions found by interchange. `folder` keeps the SAEs, by checkpoint and site, in
    SAELens' format. `more`: prompts beside the suite's to learn features from, so that all of the suite is held out;
    without them the suite's first half of questions serves. What this pair does not allow is left out, and said in
    `missing`. Raises InputError for fewer than two questions.
    """
    pair = pair.spelled(behaviour.spelling)
    suite = pair.suite
    teach, held_out = _split(suite, more, seed)
    s, r = (lens_of(pair, side) for side in pair.sides)
    names = tuple(fingerprint(source) for source in pair.sides.values())
    study = _Study(s, r, suite, (names[0], names[1]), teach, held_out, folder, seed, say)
    concepts: tuple[Concept, ...] = ("cue", "hint", "selector") if suite.hinted else ("cue", "selector")

    def named(concept: Concept) -> Site:
        if patching is None:
            raise InputError(no_patching or "nothing was patched")
        return named_site(patching, concept)

    sites: dict[Concept, Site] = {}
    for concept in concepts:
        site = study.attempt(f"site of the {concept}", lambda concept=concept: named(concept))
        if site is not None:
            sites[concept] = site
    arrived = study.attempt("where RL's change has arrived", lambda: arrived_at(s, r, suite, seed))
    saes = study.learn([*sites.values(), *([arrived] if arrived else [])])
    harm = study.attempt("what RL harmed", lambda: find_harm(behaviour))
    tables: list[Table] = []
    if harm is not None and sites:
        tables = study.attempt("units", lambda: study.tables(sites, harm, probing.subspaces if probing else ())) or []
    changes = study.changes([site for site in (sites.get("selector"), arrived) if site is not None])
    fits: list[CrosscoderFit] = []
    if arrived is not None:
        fits = study.attempt("activations of S and R", lambda: study.crosscoders(arrived)) or []
    return FeatureRecord(
        probed=probing is not None,
        trained_cue=behaviour.trained_cue,
        harmed_cue=harm and harm.harmed_cue,
        saes=tuple(saes),
        tables=tuple(tables),
        changes=tuple(changes),
        cards=tuple(study.cards(tables, changes)),
        crosscoders=tuple(fits),
        missing=tuple(study.missing),
    )


def _split(suite: Suite, more: Sequence[PromptRow], seed: int) -> tuple[list[PromptRow], list[PromptRow]]:
    """Prompts to learn from, and prompts of other questions to judge on; in random order."""
    ids = list(dict.fromkeys(row.id for row in suite.prompts))
    if len(ids) < 2:
        raise InputError("features are learnt on one half of the questions and judged on the other: give at least two")
    judging = {ids[i] for i in half_of(len(ids), 1)}
    known = set(ids)
    teach = [row for row in more if row.id not in known] or [row for row in suite.prompts if row.id not in judging]
    held_out = [row for row in suite.prompts if row.id in judging]
    rng = np.random.default_rng(seed)
    first, second = (
        [rows[i] for i in rng.permutation(len(rows))[:most]] for rows, most in ((teach, PROMPTS), (held_out, HELD_OUT))
    )
    return first, second


@dataclass
class _Study:
    """S and R, the prompts, and what has been learnt so far."""

    s: Lens
    r: Lens
    suite: Suite
    names: tuple[str, str]
    teach: Sequence[PromptRow]
    held_out: Sequence[PromptRow]
    folder: Path
    seed: int
    say: Say | None
    dictionaries: dict[Place, Dictionary] = field(default_factory=dict)
    judged: dict[Side, list[list[int]]] = field(default_factory=dict)
    """Held-out prompts, each with a completion of that checkpoint."""
    missing: list[str] = field(default_factory=list)

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What this pair does not allow must not cost the rest."""
        if self.say:
            self.say(what)
        try:
            return work()
        except InputError as error:
            self.missing.append(f"{what}: {error}")
            return None

    def store(self, some: Sequence[Sequence[int]], site: Site, weights: Sequence[str]) -> Path:
        """Where activations go that do not fit into memory: a folder named by all that they follow from."""
        made = json.dumps([*weights, str(site), self.seed, [list(ids) for ids in some]])
        return self.folder / ".activations" / hashlib.sha256(made.encode()).hexdigest()[:16]

    def learn(self, sites: Sequence[Site]) -> list[Sae]:
        """An SAE of S at each site, judged on S and on R, each on its own completions of held-out prompts."""
        sides: tuple[tuple[Side, Lens], ...] = (("before", self.s), ("after", self.r))
        own = texts([self.s], self.suite, self.teach, self.seed)
        self.judged = {side: texts([lens], self.suite, self.held_out, self.seed) for side, lens in sides}
        lengths = [len(ids) for ids in encode_prompts(self.suite, self.held_out, self.s.tokenizer)]

        def sae(place: Place) -> Sae:
            layer, component = place
            site = Site(layer=layer, component=component)
            # another seed, suite or S is another SAE, and does not find this one in its place
            store = self.store(own, site, self.names[:1])
            name = f"{self.names[0].partition('@')[0]}/{site}-{store.name[:8]}"
            train_sae(
                collect([self.s], own, place, store),
                self.folder / name,
                site_name=f"blocks.{layer}.{NAMES[component]}",
                model_name=self.names[0],
                width=WIDTH * self.s.d_model,
                seed=self.seed,
            )
            shutil.rmtree(store, ignore_errors=True)
            found = load_sae(self.folder / name).to(self.s.device)
            self.dictionaries[place] = found
            return Sae(
                site=site,
                folder=name,
                trained=WIDTH * found.read.shape[1],
                width=len(found),
                quality={
                    side: quality(lens, found, place, self.judged[side], lengths, self.seed) for side, lens in sides
                },
            )

        made = [self.attempt(f"SAE of L{p[0]}.{p[1]}", lambda p=p: sae(p)) for p in dict.fromkeys(map(_place, sites))]
        return [each for each in made if each is not None]

    def tables(self, sites: dict[Concept, Site], harm: Harm, subspaces: Sequence[Subspace]) -> list[Table]:
        """Units that carry each concept, clamped in R where that is the model that is patched."""
        ground = make_ground(self.r, self.suite, harm, self.seed)
        behaviour = (ground, scale_of(ground, self.s.model))

        def table(concept: Concept) -> Table:
            site = sites[concept]
            about = "cue" if concept == "cue" else "selector"
            subspace = next((each for each in subspaces if each.concept == about), None)
            if concept == "cue":
                trial = make_trial(self.r, ground.contrasts, site, None, behaviour, self.seed)
            elif concept == "hint":
                hint = hint_contrasts(self.suite, self.s.tokenizer, harm.trained_cue, harm.policy, harm.other)
                trial = make_trial(self.s, hint, site, None, None, self.seed)
            else:
                same = checkpoint_contrasts(self.suite, self.s.tokenizer, harm.harmed_cue, harm.other, harm.policy)
                trial = make_trial(self.r, same, site, self.s, behaviour, self.seed)
            return find_table(concept, trial, self.dictionaries[_place(site)], subspace, self.missing)

        found = [
            self.attempt(f"units that carry the {concept}", lambda concept=concept: table(concept))
            for concept, site in sites.items()
            if _place(site) in self.dictionaries
        ]
        return [each for each in found if each is not None]

    def changes(self, sites: Sequence[Site]) -> list[SiteChange]:
        """What RL changed of the features of these sites."""
        found = [
            self.attempt(
                f"features of L{place[0]}.{place[1]} that RL changed",
                lambda place=place: site_change(self.s, self.r, self.dictionaries[place], place, self.suite, self.seed),
            )
            for place in dict.fromkeys(map(_place, sites))
            if place in self.dictionaries
        ]
        return [each for each in found if each is not None]

    def crosscoders(self, site: Site) -> list[CrosscoderFit]:
        """Crosscoders over S and R at one site, on completions of both."""
        at, lenses = _place(site), [self.s, self.r]
        both = [texts(lenses, self.suite, rows, self.seed) for rows in (self.teach, self.held_out)]
        stores = [self.store(some, site, self.names) for some in both]
        learnt, kept = (collect(lenses, some, at, store) for some, store in zip(both, stores, strict=True))
        found = [
            self.attempt(
                f"crosscoder {number + 1} of {SEEDS} at {site}",
                lambda number=number: fit_crosscoder(self.s, self.r, learnt, kept, at, self.suite, self.seed + number),
            )
            for number in range(SEEDS)
        ]
        for store in stores:
            shutil.rmtree(store, ignore_errors=True)
        return [each for each in found if each is not None]

    def cards(self, tables: Sequence[Table], changes: Sequence[SiteChange]) -> list[Card]:
        shown = {
            cue: [ids for ids, row in zip(self.judged["before"], self.held_out, strict=True) if row.cue == cue]
            for cue in self.suite.cues
        }
        found = [
            self.attempt(
                f"card of {unit}",
                lambda unit=unit, why=why: card(
                    self.s, self.r, self.dictionaries[_place(unit.site)], unit, why, self.suite, shown
                ),
            )
            for unit, why in interesting(tables, changes)
        ]
        return [each for each in found if each is not None]


def _place(site: Site) -> Place:
    return site.layer, site.component
