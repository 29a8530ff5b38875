"""The features of a pair: SAEs of S where patching points, what their features do, and what RL changed of them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mixturelens.behaviour.harmed import Harm, find_harm
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.behaviour.repair_questions import make_ground, scale_of
from mixturelens.contrasts import checkpoint_contrasts, hint_contrasts
from mixturelens.features import exclusive
from mixturelens.features.activations import MASSIVE, Activations, At, Storage, collect_places, texts
from mixturelens.features.cards import Album, card, interesting
from mixturelens.features.change import Splices, half_prompts, site_change
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import FeaturePlan, Training, make_plan, share_of, texts_of
from mixturelens.features.exclusive import fit_crosscoder
from mixturelens.features.record import Card, Concept, CrosscoderFit, FeatureRecord, Quality, Sae, SiteChange, Table
from mixturelens.features.sae import JudgingTexts, Origin, load_sae, quality, train_sae
from mixturelens.features.saved import Saved, read_sae
from mixturelens.features.sites import SWEEPS, arrived_at, named_site
from mixturelens.features.splice import Crossing
from mixturelens.features.table import find_table
from mixturelens.features.units import TrialSettings, make_trial
from mixturelens.hooks.lens import NAMES, Lens, lens_of
from mixturelens.models import Pair
from mixturelens.models.cost import announced, check_memory, size_of
from mixturelens.models.load import load_config
from mixturelens.models.source import fingerprint
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.record import ProbingRecord, Subspace
from mixturelens.spelling import encode_prompts
from mixturelens.stats import half_of, too_few
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import InputError, Side, Site
from mixturelens.unfinished import attempt

Say = Callable[[str], None]
A = TypeVar("A")
T = TypeVar("T")

WIDTH = 2
"""Features an SAE has for each dimension of its site."""
STEPS, BATCH = 1200, 1024
"""Of a training, at most."""
EPOCHS, FEWEST = 32, 300
"""How often each token is seen, at most; but so many steps are taken."""
PROMPTS = 4096
"""Prompts that features are learnt from, at most."""
HELD_OUT = 512
"""Prompts that they are judged on, at most."""
JUDGED = 256
"""Held-out texts on which losses are measured, at most."""
SEEDS = 3
"""Crosscoders of one pair: what they count depends on where they began."""
CLAMPED = 64
"""Questions on which units are clamped in behaviour, where not on all."""
MOVED = 0.05
"""Share of a contrast from which something of a layer moved it."""
POOR = 0.5
"""Share of the variance, or of the loss, under which a dictionary is called poor."""


@dataclass(frozen=True)
class FeatureSettings:
    """What features are learnt from and looked for with, and where our SAEs are kept."""

    folder: Path
    """Keeps our SAEs, by checkpoint and site."""
    patching: PatchingRecord | None = None
    """Names the sites; without it, what RL changed is still looked at where it has arrived."""
    no_patching: str = ""
    """Why there is no record of patching."""
    probing: ProbingRecord | None = None
    """Gives the directions that interchange found."""
    more: Sequence[PromptRow] = ()
    """Prompts beside the suite's to learn features from, so that all of the suite is held out; without them the suite's
    first half of questions serves."""
    given: Sequence[Path] = ()
    """Folders of pretrained SAEs in SAELens' format, which take the place of our own: the features of every concept are
    looked for where the first of them is at home."""


def feature_record(
    pair: Pair, behaviour: BehaviourRecord, settings: FeatureSettings, seed: int = 0, say: Say | None = None
) -> FeatureRecord:
    """SAEs of S at the sites that patching named; the best feature, neuron, head and direction for cue, hint and
    selector; what RL changed of the features, by the terms of the split; and crosscoders over S and R.

    `behaviour` is what was measured of the pair; `say` is told each step. What this pair or its budget does not allow
    is left out, and said in `missing`. Raises InputError for fewer than two questions, for SAEs that do not fit, and
    where not even the least fits into the memory that is allowed.
    """
    patching, probing = settings.patching, settings.probing
    pair = pair.spelled(behaviour.spelling)
    suite = pair.suite
    saved = pretrained(pair, settings.given)
    teach, held_out = _split(suite, settings.more, seed)
    plan = make_plan(pair, len(teach), len(held_out))
    teach, held_out = (rows[: texts_of(len(rows), plan.share)] for rows in (teach, held_out))
    if say:
        say(announced("features", plan.needs))
        for each in saved:
            for note in each.notes:
                say(f"note: {each.folder}: {note}")
    check_memory(pair, plan.needs, "features")
    s, r = (lens_of(pair, side) for side in pair.sides)
    names = tuple(fingerprint(source) for source in pair.sides.values())
    study = _Study(s, r, suite, (names[0], names[1]), teach, held_out, settings.folder, plan, seed, say)
    study.missing += plan.missing
    concepts: tuple[Concept, ...] = ("cue", "hint", "selector") if suite.hinted else ("cue", "selector")

    def named(concept: Concept) -> Site:
        if patching is None:
            raise InputError(settings.no_patching or "nothing was patched")
        site = named_site(patching, concept)
        if saved:  # the place is the SAE's own, at the tokens where patching finds the contrast
            layer, component = saved[0].at
            return Site(layer=layer, component=component, position=site.position)
        return site

    sites: dict[Concept, Site] = {}
    for concept in concepts:
        site = study.attempt(f"site of the {concept}", lambda concept=concept: named(concept))
        if site is not None:
            sites[concept] = site
    if saved:
        arrived = Site(layer=saved[0].at[0], component=saved[0].at[1])
    else:
        arrived = study.attempt("where RL's change has arrived", lambda: arrived_at(s, r, suite, seed, plan.share))
    places = list(dict.fromkeys(_place(site) for site in [*sites.values(), *([arrived] if arrived else [])]))
    saes = study.learn([*places, *(each.at for each in saved)], saved)
    harm = study.attempt("what RL harmed", lambda: find_harm(behaviour))
    tables: list[Table] = []
    if harm is not None and sites:
        layers: dict[Concept, list[int] | None] = {
            concept: _layers(patching, concept, site) for concept, site in sites.items()
        }
        subspaces = probing.subspaces if probing else ()
        tables = study.attempt("units", lambda: study.tables(sites, harm, subspaces, layers)) or []
    changes = study.changes([_place(site) for site in (sites.get("selector"), arrived) if site is not None])
    fits: list[CrosscoderFit] = []
    if arrived is not None:
        fits = study.attempt("activations of S and R", lambda: study.crosscoders(_place(arrived))) or []
    return FeatureRecord(
        probed=probing is not None,
        trained_cue=behaviour.trained_cue,
        harmed_cue=harm and harm.harmed_cue,
        saes=tuple(saes),
        tables=tuple(tables),
        changes=tuple(changes),
        cards=tuple(study.cards(tables, changes)),
        crosscoders=tuple(fits),
        missing=(*study.missing, *too_few("features", *(each.questions for each in (*tables, *changes)))),
    )


def pretrained(pair: Pair, folders: Sequence[Path]) -> list[Saved]:
    """The pretrained SAEs of these folders, each checked against the pair.

    What an SAE was trained on is compared loosely, for a checkpoint has many names, and a difference is a note. Raises
    InputError for a folder that holds no SAE, a place that the models lack or that is not as wide as the SAE reads, and
    two SAEs of one place.
    """
    found = []
    size = size_of(pair)
    config = load_config(pair.before.base or pair.before).get_text_config()
    widths = {"neurons": int(getattr(config, "intermediate_size", 0) or 4 * size.d_model)}
    for folder in folders:
        each = read_sae(folder)
        layer, component = each.at
        if layer >= size.layers:
            raise InputError(f"{folder}: reads layer {layer}, and the models' layers are 0 to {size.layers - 1}")
        reads, there = each.dictionary.read.shape[1], widths.get(component, size.d_model)
        if reads != there:
            raise InputError(
                f"{folder}: reads {reads} numbers a token, where the models have {there} ({each.hook_name})"
            )
        names = [str(pair.before), pair.before.name, str(getattr(config, "_name_or_path", ""))]
        plain = re.sub(r"[^a-z0-9]", "", (each.model_name or "").split("/")[-1].lower())
        if plain and not any(plain in re.sub(r"[^a-z0-9]", "", name.lower()) for name in names):
            note = f"it was trained on {each.model_name}, and S is {pair.before.name}: its quality says whether it fits"
            each = Saved(each.folder, each.dictionary, each.hook_name, each.model_name, (*each.notes, note))
        other = next((known for known in found if known.at == each.at), None)
        if other is not None:
            raise InputError(f"{folder} and {other.folder} read the same place ({each.hook_name}): give one of them")
        found.append(each)
    return found


def _layers(patching: PatchingRecord | None, concept: Concept, site: Site) -> list[int] | None:
    """The site's layer, and those of which something moved the contrast when it was patched; None: not known."""
    kind, side = SWEEPS[concept]
    found = {site.layer}
    for sweep in patching.sweeps if patching else ():
        if (sweep.kind, sweep.checkpoint) == (kind, side):
            for each in sweep.effects:
                moved = each.effect.value
                if each.site.component in ("mlp_out", "attn_out", "z") and moved is not None and abs(moved) >= MOVED:
                    found.add(each.site.layer)
    return sorted(found) if patching else None


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
    plan: FeaturePlan
    seed: int
    say: Say | None
    dictionaries: dict[At, Dictionary] = field(default_factory=dict)
    taught: dict[At, Activations] = field(default_factory=dict)
    """S and R on prompts that teach, each completed by one of them."""
    judged: dict[Side, list[list[int]]] = field(default_factory=dict)
    """Held-out prompts, each with a completion of that checkpoint."""
    seen: dict[At, Activations] = field(default_factory=dict)
    """S and R on held-out prompts with completions of S."""
    missing: list[str] = field(default_factory=list)

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What this pair does not allow must not cost the rest."""
        if self.say:
            self.say(what)
        return attempt(what, work, self.missing)

    def every(self, things: Iterable[A], what: Callable[[A], str], work: Callable[[A], T]) -> list[T]:
        """The work on each thing, but for those that this pair does not allow."""
        found = [self.attempt(what(thing), functools.partial(work, thing)) for thing in things]
        return [each for each in found if each is not None]

    @property
    def share(self) -> float:
        return self.plan.share

    def digest(self, some: Sequence[Sequence[int]], what: str) -> str:
        """A name for what follows from these texts, both checkpoints and the seed."""
        made = json.dumps([*self.names, what, self.seed, MASSIVE, [list(ids) for ids in some]])
        return hashlib.sha256(made.encode()).hexdigest()[:16]

    def store(self, some: Sequence[Sequence[int]], what: str) -> Storage:
        """Where activations go that do not fit into memory: a folder named by all that they follow from."""
        return Storage(self.folder / ".activations" / self.digest(some, what))

    def learn(self, places: Sequence[At], saved: Sequence[Saved]) -> list[Sae]:
        """An SAE of S at each place, ours or a pretrained one, judged on S and on R, each on its own completions of
        held-out prompts. Every prompt goes through each model once, for all places.
        """
        places = list(dict.fromkeys(places))
        if not places:
            return []
        if self.say:
            self.say("texts of S and R, and what both have there")
        both = [self.s, self.r]
        own = texts(both, self.suite, self.teach, self.seed)
        sides: tuple[tuple[Side, Lens], ...] = (("before", self.s), ("after", self.r))
        self.judged = {side: texts([lens], self.suite, self.held_out, self.seed) for side, lens in sides}
        self.taught = collect_places(both, own, places, self.store(own, "taught"))
        self.seen = collect_places(both, self.judged["before"], places, self.store(self.judged["before"], "seen"))
        after = collect_places([self.r], self.judged["after"], places, self.store(self.judged["after"], "after"))
        lengths = [len(ids) for ids in encode_prompts(self.suite, self.held_out, self.s.tokenizer)]
        tokens = sum(map(len, own))

        def judge(place: At, found: Dictionary, trained: bool) -> Sae:
            self.dictionaries[place] = found.to(self.s.device)
            rows = {"before": _rows(self.seen[place], 0), "after": _rows(after[place], 0)}
            most = share_of(JUDGED, self.share / 4, 16)
            judging = {side: JudgingTexts(self.judged[side][:most], lengths[:most], self.seed) for side, _ in sides}
            said: dict[Side, Quality] = {
                side: quality(lens, found, place, judging[side], rows[side]) for side, lens in sides
            }
            site = Site(layer=place[0], component=place[1])
            explained, recovered = said["before"].explained, said["before"].loss_recovered.value
            if explained < POOR or (recovered is not None and recovered < POOR):
                learnt = f"learnt from {tokens:,} tokens" if trained else "pretrained"
                lost = "" if recovered is None else f" and recovers {recovered:.2f} of the loss"
                self.missing.append(
                    f"SAE of {site}: {learnt}, it explains {explained:.2f} of the variance{lost} on held-out prompts: "
                    "what no feature carries may still be there"
                )
            return Sae(site=site, trained=len(found), width=len(found), quality=said)

        def train(place: At) -> Sae:
            layer, component = place
            site = Site(layer=layer, component=component)
            # another seed, suite or S is another SAE, and does not find this one in its place
            name = f"{self.names[0].partition('@')[0]}/{site}-{self.digest(own, str(site))[:8]}"
            batch = min(BATCH, max(64, 1 << int(tokens // 8).bit_length() - 1))
            activations = self.taught[place]
            train_sae(
                activations,
                self.folder / name,
                Origin(f"blocks.{layer}.{NAMES[component]}", self.names[0]),
                Training(
                    width=WIDTH * activations.dim,
                    steps=min(STEPS, max(FEWEST, EPOCHS * tokens // batch)),
                    batch=batch,
                    seed=self.seed,
                ),
            )
            found = judge(place, load_sae(self.folder / name), True)
            return found.model_copy(update={"folder": name, "trained": WIDTH * activations.dim})

        def take(each: Saved) -> Sae:
            update = {"pretrained": str(each.folder), "notes": each.notes}
            return judge(each.at, each.dictionary, False).model_copy(update=update)

        given = {each.at: each for each in saved}

        def make(place: At) -> Sae:
            return take(given[place]) if place in given else train(place)

        return self.every(places, lambda place: f"SAE of L{place[0]}.{place[1]}", make)

    def tables(
        self,
        sites: dict[Concept, Site],
        harm: Harm,
        subspaces: Sequence[Subspace],
        layers: dict[Concept, list[int] | None],
    ) -> list[Table]:
        """Units that carry each concept, clamped in R where that is the model that is patched."""
        ground = make_ground(self.r, self.suite, harm, self.seed)
        asked = list(dict.fromkeys(row.id for row in ground.judge.rows))
        if self.share < 1:  # clamps in behaviour are what takes longest
            asked = asked[: share_of(CLAMPED, self.share, 12)]
            chosen = [i for i, row in enumerate(ground.judge.rows) if row.id in asked]
            ground = replace(ground, judge=ground.judge.part(chosen))
        behaviour = (ground, scale_of(ground, self.s.model))

        def table(concept: Concept) -> Table:
            site = sites[concept]
            about = "cue" if concept == "cue" else "selector"
            subspace = next((each for each in subspaces if each.concept == about), None)
            before, measured = None, behaviour
            if concept == "cue":
                lens, contrasts = self.r, ground.contrasts
            elif concept == "hint":
                contrasts = hint_contrasts(self.suite, self.s.tokenizer, harm.trained_cue, harm.policy, harm.other)
                lens, measured = self.s, None
            else:
                contrasts = checkpoint_contrasts(self.suite, self.s.tokenizer, harm.harmed_cue, harm.other, harm.policy)
                lens, before = self.r, self.s
            settings = TrialSettings(measured, layers[concept], self.share, self.seed)
            trial = make_trial(lens, contrasts, site, before, settings)
            return find_table(concept, trial, self.dictionaries[_place(site)], subspace, self.missing)

        known: list[Concept] = [each for each, site in sites.items() if _place(site) in self.dictionaries]
        return self.every(known, lambda concept: f"units that carry the {concept}", table)

    def changes(self, places: Sequence[At]) -> list[SiteChange]:
        """What RL changed of the features of these places."""

        def change(place: At) -> SiteChange:
            crossing = Crossing(self.s, self.r, place)
            return site_change(crossing, self.dictionaries[place], self.suite, self.seed, self.share)

        known = [place for place in dict.fromkeys(places) if place in self.dictionaries]
        return self.every(known, lambda place: f"features of L{place[0]}.{place[1]} that RL changed", change)

    def crosscoders(self, at: At) -> list[CrosscoderFit]:
        """Crosscoders over S and R at one place."""
        questions = share_of(exclusive.QUESTIONS, self.share, 8)
        judging = half_prompts(self.suite, self.s.tokenizer, 1, questions)
        splices = Splices(Crossing(self.r, self.s, at), judging, self.seed)
        found = self.every(
            range(SEEDS),
            lambda number: f"crosscoder {number + 1} of {SEEDS} at L{at[0]}.{at[1]}",
            lambda number: fit_crosscoder(self.taught[at], self.seen[at], splices, self.seed + number, self.share),
        )
        shutil.rmtree(self.folder / ".activations", ignore_errors=True)
        return found

    def cards(self, tables: Sequence[Table], changes: Sequence[SiteChange]) -> list[Card]:
        shown = {
            cue: [ids for ids, row in zip(self.judged["before"], self.held_out, strict=True) if row.cue == cue]
            for cue in self.suite.cues
        }
        albums = {
            place: Album(self.s, self.r, found, place, self.suite, shown, self.share)
            for place, found in self.dictionaries.items()
        }
        return self.every(
            interesting(tables, changes),
            lambda found: f"card of {found[0]}",
            lambda found: card(albums[_place(found[0].site)], *found),
        )


def _rows(activations: Activations, model: int) -> Float[Tensor, "row d"]:
    import torch

    return torch.cat([part[:, model] for part in activations.parts])


def _place(site: Site) -> At:
    return site.layer, site.component
