"""Cards of single units: what each fires on, what it tells, what it makes the model say next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixturelens.contrasts import span_positions
from mixturelens.features.activations import At, batches, up_to
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import share_of
from mixturelens.features.record import Card, Concept, FiringExample, Part, SiteChange, Table, Terms, Unit
from mixturelens.hooks.lens import Lens, Tokens, tokens
from mixturelens.probing.prompts import Group, ProbeRow, read_prompts
from mixturelens.probing.scores import auroc
from mixturelens.stats import half_of
from mixturelens.suite import Suite
from mixturelens.types import PER_HEAD, InputError, Side, Site

EXAMPLES = 6
"""Texts on a card."""
WORDS = 5
"""Tokens on a card that a unit raises, and as many that it lowers, at most."""
PLAUSIBLE = 1e-3
"""A token that is nowhere more likely than this, with the unit or without, is not among those it raises or lowers:
between 1e-9 and 1e-7 there are nats, too, and nobody ever sees them."""
MOVED = 3
"""Cards of features that RL moved."""
QUESTIONS = 64
"""Questions that AUROC is read on, at most."""
ASKED_NEXT = 32
"""Prompts that next tokens are read on, at most."""
BYTES = 64 << 20
"""Bound on the logits that are held at a time."""

ASKED: Mapping[Concept, str] = {"cue": "the cue", "hint": "the hint", "selector": "the choice of policy"}
TERMS: Mapping[Part, str] = {"selector": "routing", "cue_reader": "conditioning", "skill": "skill"}


def interesting(tables: Sequence[Table], changes: Sequence[SiteChange]) -> list[tuple[Unit, str]]:
    """Features that deserve a card, and why: the best one for each concept, and MOVED of those that RL moved most.

    Of the latter those whose change alone does most (bits, all terms), and where changes do nothing those that moved
    furthest: how far is no measure across sites, for activations grow with depth. A feature that is both is named once,
    with both reasons. One that RL moved has no position, for it was judged at all tokens, unless it is also the best
    one somewhere.
    """
    found: dict[tuple[int, str, int | None], tuple[Unit, list[str]]] = {}

    def add(unit: Unit, why: str) -> None:
        key = (unit.site.layer, unit.site.component, unit.index)
        found.setdefault(key, (unit, []))[1].append(why)

    for table in tables:
        best = table.best("feature")
        if best is not None:
            add(best.unit, f"best feature for {ASKED[table.concept]}")
    moved = [
        (round(sum(bits.values()), 2), each.moved, Unit(kind="feature", site=change.site, index=each.index), bits)
        for change in changes
        for each in change.features
        for bits in [_bits(each.terms)]
    ]
    for total, _, unit, bits in sorted(moved, key=lambda row: (-row[0], -row[1]))[:MOVED]:
        most = max(bits, key=lambda name: bits[name], default=None)
        alone = f": {bits[most]:.3f} bits of {most} alone" if most and total else ""
        add(unit, f"training moved it{alone}")
    return [(unit, "; ".join(dict.fromkeys(why))) for unit, why in found.values()]


def _bits(terms: Terms) -> dict[str, float]:
    """Those terms that were measured."""
    return {name: bits for part, name in TERMS.items() if (bits := terms.of(part).value) is not None}


@dataclass
class Album:
    """What cards of one place's units share: the dictionary, both models, texts, and what has been seen of them.

    `texts[cue]`: token ids of prompts under a cue with a completion of S behind them. `share`: of questions.
    """

    before: Lens
    after: Lens
    dictionary: Dictionary
    at: At
    suite: Suite
    texts: Mapping[str, Sequence[Sequence[int]]]
    share: float = 1.0
    known: dict[tuple[Side, tuple[int, ...]], Float[Tensor, "pos d"]] = field(default_factory=dict)
    logits: dict[tuple[int, ...], Float[Tensor, "row pos vocabulary"]] = field(default_factory=dict)

    def activations(self, side: Side, runs: Sequence[Sequence[int]]) -> list[Float[Tensor, "pos d"]]:
        """How strongly every unit fires in one checkpoint on every token of these texts; each text is run once."""
        lens = self.before if side == "before" else self.after
        new = [run for run in dict.fromkeys(tuple(run) for run in runs) if (side, run) not in self.known]
        for some, batch in batches(new, lens.device) if new else ():
            x = up_to(lens, batch, [self.at])[self.at]
            for row, i in enumerate(some):
                self.known[side, new[i]] = x[row, : len(new[i])].float()
        return [self.known[side, tuple(run)] for run in runs]


def card(album: Album, unit: Unit, why: str) -> Card:
    """One unit of S's dictionary, looked at in S.

    Examples, rates and strengths are of the album's texts. AUROC and next tokens are read on the half of the suite's
    questions that judges (`stats.half_of`), at the unit's position: its last token; a unit without one is read at all
    tokens, and counts with its largest activation.

    - `auroc["cue"]`: neutral prompts, or, behind them, each policy put in place. `hint`: hinted prompts. `policy`:
      which policy is put in place; only where the position is `policy`, or none. How well one class is told from the
      rest, whichever is told best, and whichever way round. Null where the suite has no two classes there.
    - `promotes`, `suppresses`: the WORDS next tokens whose log-probability the unit raises (lowers) most, in nats: with
      it against without it, mean over the tokens of the position at which it fires. Among tokens that are somewhere
      likelier than PLAUSIBLE.

    Raises InputError for a unit that the dictionary does not have, a component with several heads, a position that no
    prompt has, no texts, or fewer than four questions.
    """
    site, dictionary, texts = unit.site, album.dictionary, album.texts
    index = unit.index if unit.index is not None else 0
    if not 0 <= index < len(dictionary) or (unit.index is None and len(dictionary) > 1):
        raise InputError(f"{unit}: the dictionary holds {len(dictionary)} units; give one of their numbers")
    if site.component in PER_HEAD:
        raise InputError(f"{unit}: cards are made of units that read one vector a token, not of heads")
    known = [tuple(text) for cue in texts.values() for text in cue]
    if not known:
        raise InputError(f"{unit}: a card shows texts, and there are none")
    one = dictionary.part(torch.tensor([index], device=dictionary.read.device))
    reader = _OneUnit(album, one, site)
    fired = reader.activations(known)
    rate: dict[Side, float] = {}
    strength: dict[Side, float] = {}
    sides: tuple[tuple[Side, list[Tensor]], ...] = (("before", fired), ("after", reader.activations(known, "after")))
    for side, found in sides:
        every = torch.cat(found)
        firing = every[every != 0]
        rate[side] = round(len(firing) / len(every), 6)
        strength[side] = round(float(firing.mean()), 6) if len(firing) else 0.0
    tokenizer = album.before.tokenizer
    rows, places = _rows(album.suite, tokenizer, site, share_of(QUESTIONS, album.share, 8))
    asked = rows["neutral"] or rows["placed"] or rows["hinted"]
    promotes, suppresses = reader.next_tokens(_spread(asked, share_of(ASKED_NEXT, album.share, 8)), places)
    return Card(
        unit=unit,
        why=why,
        auroc={
            "cue": reader.auroc(rows["neutral"] or rows["placed"], places, lambda row: row.cue),
            "hint": reader.auroc(rows["hinted"], places, lambda row: row.hint),
            "policy": reader.auroc(rows["placed"], places, lambda row: row.policy),
        },
        rate=rate,
        strength=strength,
        promotes=promotes,
        suppresses=suppresses,
        examples=_examples(tokenizer, texts, dict(zip(known, fired, strict=True))),
    )


# --- prompts and their positions --------------------------------------------------------------------------------------

Places = Callable[[ProbeRow], tuple[int, ...]]


def _spread(rows: Sequence[ProbeRow], number: int) -> Sequence[ProbeRow]:
    """So many rows, drawn: they come in turn by cue and policy."""
    return [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:number].tolist())]


def _rows(suite: Suite, tokenizer: Any, site: Site, number: int) -> tuple[dict[Group, tuple[ProbeRow, ...]], Places]:
    """Rows of the questions that judge, in the groups in which this position can be read, and where it lies in each."""
    questions = list(dict.fromkeys(row.id for row in suite.neutral))
    judge = {questions[i] for i in half_of(len(questions), 1)[:number]}
    if len(judge) < 4:  # so that probes of it know what to say
        judge = set(questions)
    some = suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.id in judge)})
    found = read_prompts(some, tokenizer).rows
    spans = {
        (row.id, row.cue, row.hint): span_positions(suite, row, tokenizer)
        for row in some.prompts
        if isinstance(site.position, str) and site.position in row.spans
    }

    def places(row: ProbeRow) -> tuple[int, ...]:
        position = site.position
        if position is None:
            return tuple(range(len(_run(row))))
        if position == "last":
            return (len(row.ids) - 1,) if row.policy is None else ()
        if position == "policy":
            return (len(row.run) - 1,) if row.policy is not None else ()
        if isinstance(position, int):
            inside = range(len(row.ids)) if row.policy is None else range(len(row.ids), len(row.run))
            return (position,) if position in inside else ()
        at = spans.get((row.question, row.cue, row.hint), {}).get(position, ())
        return at[-1:] if row.policy is None else ()

    kept: dict[Group, tuple[ProbeRow, ...]] = {
        group: tuple(row for row in of if places(row)) for group, of in found.items()
    }
    if not any(kept.values()):
        raise InputError(f"{site}: no prompt has a position {site.position!r}")
    if site.position is None and kept["placed"]:
        kept["neutral"] = ()  # part of the others
    return kept, places


def _run(row: ProbeRow) -> tuple[int, ...]:
    # neutral rows come with an announcement behind them that is not theirs
    return row.ids if row.policy is None else row.run


# --- one unit in one model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OneUnit:
    """One unit: a dictionary of one."""

    album: Album
    unit: Dictionary
    site: Site

    @property
    def lens(self) -> Lens:
        return self.album.before

    def _batches(self, runs: Sequence[Sequence[int]]) -> list[Tokens]:
        """Rows as they come, in batches whose logits stay within the bound."""
        vocabulary = self.lens.model.config.get_text_config().vocab_size
        step = max(1, BYTES // (8 * vocabulary * max(len(run) for run in runs)))
        return [tokens(runs[start : start + step], self.lens.device) for start in range(0, len(runs), step)]

    def activations(self, runs: Sequence[Sequence[int]], side: Side = "before") -> list[Float[Tensor, " pos"]]:
        """Of every token of every row."""
        found = []
        for x in self.album.activations(side, runs):
            if x.shape[-1] != (reads := self.unit.read.shape[1]):
                raise InputError(f"{self.site}: the unit reads {reads} numbers a token, where there are {x.shape[-1]}")
            found.append(self.unit.encode(x.to(self.lens.device))[..., 0].cpu())
        return found

    def auroc(self, rows: Sequence[ProbeRow], places: Places, label: Callable[[ProbeRow], str | None]) -> float | None:
        words = [label(row) for row in rows]
        classes = list(dict.fromkeys(words))
        if len(classes) < 2:
            return None
        activations = self.activations([_run(row) for row in rows])
        scores = torch.stack([x[list(places(row))].max() for x, row in zip(activations, rows, strict=True)])[None]
        questions = list(dict.fromkeys(row.question for row in rows))
        owner = torch.tensor([questions.index(row.question) for row in rows])
        once = np.ones((1, len(questions)), dtype=int)
        found = [
            float(auroc(scores, torch.tensor([int(word == each) for word in words]), owner, once)[0, 0])
            for each in classes
        ]
        return round(max(max(value, 1 - value) for value in found), 6)

    @torch.no_grad()
    def next_tokens(
        self, rows: Sequence[ProbeRow], places: Places
    ) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
        """Tokens that the unit raises and those that it lowers, each with the mean change of its log-probability."""
        point = self.lens.point(self.site.layer, self.site.component)
        vocabulary = self.lens.model.config.get_text_config().vocab_size
        change, likeliest, number = torch.zeros(vocabulary).double(), torch.zeros(vocabulary).double(), 0
        done = 0
        for batch in self._batches([_run(row) for row in rows]):
            mask = torch.zeros_like(batch.real)
            for i, row in enumerate(rows[done : done + len(batch)]):
                mask[i, [batch.ids.shape[1] - len(_run(row)) + at for at in places(row)]] = True
            done += len(batch)
            fires: list[Bool[Tensor, "row pos"]] = []

            def ablate(x: Tensor, mask: Tensor = mask, fires: list[Tensor] = fires) -> Tensor:
                found = self.unit.encode(x)
                fires.append(mask & (found[..., 0] != 0))
                x[mask] = self.unit.moved(x, -found)[mask]
                return x

            without = self.lens.run(batch, [(point, ablate)], last_only=False)[fires[0]]
            plain = self._plain(batch)[fires[0]]
            plain, without = (logits.double().log_softmax(-1).cpu() for logits in (plain, without))
            change += (plain - without).sum(0)
            number += len(plain)
            if len(plain):
                likeliest = torch.maximum(likeliest, torch.maximum(plain, without).amax(0).exp())
        change = torch.where(likeliest >= PLAUSIBLE, change / max(1, number), 0.0)
        order = change.argsort(descending=True, stable=True).tolist()
        words = _words(self.lens.tokenizer, range(vocabulary))

        def strongest(some: Sequence[int]) -> tuple[tuple[str, float], ...]:
            rounded = [(words[token], round(float(change[token]), 3)) for token in some[:WORDS]]
            return tuple(pair for pair in rounded if pair[1])

        up = [token for token in order if change[token] > 0]
        down = [token for token in reversed(order) if change[token] < 0]
        return strongest(up), strongest(down)

    def _plain(self, batch: Tokens) -> Float[Tensor, "row pos vocabulary"]:
        """Logits without any change: the same for all units of a place."""
        key = tuple(batch.ids.flatten().tolist())
        if key not in self.album.logits:
            held = sum(each.nbytes for each in self.album.logits.values())
            found = self.lens.run(batch, last_only=False)
            if held + found.nbytes > 4 * BYTES:
                return found
            self.album.logits[key] = found
        return self.album.logits[key]


def _examples(
    tokenizer: Any, texts: Mapping[str, Sequence[Sequence[int]]], fired: Mapping[tuple[int, ...], Float[Tensor, " pos"]]
) -> tuple[FiringExample, ...]:
    """The distinct texts on which it fires most: an equal number of each cue, as far as it fires there."""
    strongest = {
        cue: sorted(
            (text for text in dict.fromkeys(tuple(each) for each in some) if bool((fired[text] != 0).any())),
            key=lambda text: -float(fired[text].max()),
        )
        for cue, some in texts.items()
    }
    # the first of every cue, then the second of every cue, ...
    turns = [
        (number, -float(fired[text].max()), text) for some in strongest.values() for number, text in enumerate(some)
    ]
    chosen = [text for _, _, text in sorted(turns)][:EXAMPLES]
    return tuple(
        FiringExample(
            tokens=tuple(_words(tokenizer, text)), activations=tuple(round(x, 3) for x in fired[text].tolist())
        )
        for text in sorted(chosen, key=lambda text: -float(fired[text].max()))
    )


def _words(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Every token as a string, with the spaces that belong to it."""
    found = tokenizer.convert_ids_to_tokens([int(each) for each in ids])
    return [
        f"token {number}" if word is None else str(word).replace("Ġ", " ").replace("▁", " ")
        for number, word in zip(ids, found, strict=True)
    ]
