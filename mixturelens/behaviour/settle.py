"""Which whitespace the models write, and whether what literals say is what completions show."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.forced import Labelled
from mixturelens.behaviour.likelihood import Model, Scorer
from mixturelens.behaviour.prompts import Prompts
from mixturelens.shown import wordings
from mixturelens.spelling import Ids, Speller, every_spelling
from mixturelens.suite import PromptRow, Spelling, Suite
from mixturelens.types import OTHER, Frozen, Side

PILOT = 4
"""Prompts of each cue on which whitespace is looked at."""
KEPT = 1e-3
"""A way to write it counts from this share of the most usual one."""
UNLIKELY = 1e-4
"""Samples that would be this rare if literals were right contradict them, if they differ by ODD, too."""
ODD = 0.05
HINT = 0.1
"""Share of completions of no known policy from which it is said what they look like."""
SHOWN = 60
"""Characters of a completion that are shown."""


# --- whitespace -------------------------------------------------------------------------------------------------------


def settle(scorer: Scorer, models: Sequence[Model], suite: Suite, tokenizer) -> Spelling:
    """The whitespace that the models write before completions and behind announcements, most usual first.

    Where the tokenizer gives the same tokens whatever stands there, there is nothing to settle, and no model is run.
    A suite that gives its `spelling` is taken at its word.
    """
    if suite.spelling != Spelling():
        return suite.spelling
    every = every_spelling(suite)
    announced = list(dict.fromkeys(text for shown in suite.policies.values() for text in wordings(shown)))
    leads: dict[str, tuple[str, ...]] = {}
    for cue in suite.cues:
        rows = [row for row in suite.neutral if row.cue == cue][:PILOT]
        ways = {lead: _spelled(suite, rows, tokenizer, announced, {cue: (lead,)}, {}) for lead in every.lead[cue]}
        found = _usual(scorer, models, rows, suite, tokenizer, ways)
        if found:
            leads[cue] = found
    gaps: dict[str, tuple[str, ...]] = {}
    rows = [row for cue in suite.cues for row in [row for row in suite.neutral if row.cue == cue][:PILOT]]
    for text in announced:
        ways = {gap: _spelled(suite, rows, tokenizer, [text], leads, {text: (gap,)}) for gap in every.gap[text]}
        found = _usual(scorer, models, rows, suite, tokenizer, ways)
        if found:
            gaps[text] = found
    return Spelling(lead=leads, gap=gaps)


def _spelled(
    suite: Suite,
    rows: Sequence[PromptRow],
    tokenizer,
    announced: Sequence[str],
    lead: Mapping[str, tuple[str, ...]],
    gap: Mapping[str, tuple[str, ...]],
) -> list[tuple[Ids, ...]]:
    """What is read for one way to write whitespace, of each prompt: beginnings of completions, up to where it shows."""
    one = suite.model_copy(update={"spelling": Spelling(lead=dict(lead), gap=dict(gap))})
    behaviours = [text for shown in (suite.behaviours or {}).values() for text in wordings(shown)]
    found = []
    for row in rows:
        speller = Speller(one, row, tokenizer)
        rests = [*([row.answer] if suite.answer_match == "exact" else []), *([row.err] if row.err else []), *behaviours]
        if not announced:
            found.append(tuple(speller.bare(text)[0] for text in rests))
        elif gap:
            placed = speller.announced(announced[0], rests)
            found.append(tuple((*placed.spellings[0], spellings[0][0]) for spellings in placed.rests))
        else:
            found.append(tuple(speller.announced(text, ()).spellings[0] for text in announced))
    return found


def _usual(
    scorer: Scorer,
    models: Sequence[Model],
    rows: Sequence[PromptRow],
    suite: Suite,
    tokenizer,
    ways: Mapping[str, list[tuple[Ids, ...]]],
) -> tuple[str, ...]:
    """The ways that carry weight, most usual first; none where all are the same tokens, or nothing is written."""
    distinct: dict[tuple[tuple[Ids, ...], ...], str] = {}
    for way, spelled in ways.items():
        distinct.setdefault(tuple(spelled), way)
    if len(distinct) < 2:
        return ()
    contexts = [Speller(suite, row, tokenizer).context for row in rows]
    flat = [
        (way, context, ids)
        for spelled, way in distinct.items()
        for context, group in zip(contexts, spelled, strict=True)
        for ids in group
    ]
    weight = dict.fromkeys(distinct.values(), 0.0)
    for model in models:
        logs = scorer.sequences(model, [context for _, context, _ in flat], [ids for _, _, ids in flat])
        for (way, _, _), log in zip(flat, logs, strict=True):
            weight[way] += float(np.exp(log)) / len(models) / len(rows)
    best = max(weight.values())
    if best < 1e-9:
        return ()
    return tuple(sorted((w for w in weight if weight[w] >= KEPT * best), key=lambda w: -weight[w]))


# --- the check by samples ---------------------------------------------------------------------------------------------


class Disagreement(Frozen):
    """A probability that samples contradict."""

    checkpoint: Side
    cue: str
    what: str
    """`policy a`, `policy a, right`, or `policy a, refuse`."""
    literal: float
    sampled: float


class SampleCheck(Frozen):
    """What completions of the checkpoints' own show, beside what was computed from texts given by the suite."""

    completions: int
    agrees: bool
    """Whether samples contradict no probability, and do not show a policy in another spelling."""
    disagreements: tuple[Disagreement, ...] = ()
    misspelled: tuple[str, ...] = ()
    """Announcements that many completions show in another spelling, or behind other words."""
    foreign: tuple[str, ...] = ()
    """Where completions that were given show something else than completions that the checkpoints write here."""
    hints: tuple[str, ...] = ()
    """What other completions of no known policy look like, where there are many."""
    examples: dict[str, dict[str, tuple[str, ...]]] = {}
    """checkpoint -> cue -> the first completions, as they are."""


def check_by_samples(
    prompts: Prompts, sides: Mapping[Side, tuple[Behaviour, np.ndarray, Labelled, list[str]]]
) -> SampleCheck:
    """Hold probabilities that were computed from the suite's texts against completions.

    `sides` gives for each checkpoint its behaviour, and of its completions the prompt of each, their labels and texts.
    """
    suite = prompts.suite
    names = (*suite.policies, OTHER)
    cue_of = np.array([suite.cues.index(row.cue) for row in prompts.rows])
    wrong: list[Disagreement] = []
    misspelled: list[str] = []
    hints: list[str] = []
    examples: dict[str, dict[str, tuple[str, ...]]] = {}
    for side, (behaviour, context, label, texts) in sides.items():
        examples[side] = {}
        for c, cue in enumerate(suite.cues):
            mine = np.flatnonzero(cue_of[context] == c)
            if not len(mine):
                continue
            turn = [
                int((context[mine[:n]] == context[i]).sum()) for n, i in enumerate(mine)
            ]  # one of each prompt first
            examples[side][cue] = tuple(texts[int(mine[n])] for n in np.argsort(turn, kind="stable")[:3])
            share = np.bincount(context[mine], minlength=len(prompts.rows)) / len(mine)
            # of rules, both are counts of samples, and need not agree to the last
            for m, name in enumerate(names if suite.table is None and suite.literal else ()):
                of = label.policy[mine] == m
                cells = [(f"policy {name}", share @ behaviour.weights[:, m], of)]
                if m < len(suite.policies):
                    cells.append((f"policy {name}, right", share @ behaviour.correct[:, m], of & label.correct[mine]))
                    for b, shown in enumerate(suite.behaviour_names):
                        expected = share @ behaviour.classes[:, m, :, b].sum(-1)
                        cells.append((f"policy {name}, {shown}", expected, of & (label.behaviour[mine] == b)))
                for what, expected, seen in cells:
                    if _contradicted(float(expected), int(seen.sum()), len(mine)):
                        wrong.append(
                            Disagreement(
                                checkpoint=side, cue=cue, what=what, literal=float(expected), sampled=float(seen.mean())
                            )
                        )
            unknown = [texts[int(i)] for i in mine if label.policy[i] == len(suite.policies)]
            if suite.table is None and len(unknown) > HINT * len(mine):
                near = _misspelled(suite, unknown, len(mine))
                where = f"under {cue} {side},"
                if near is not None:
                    misspelled.append(f"{where} {near}")
                else:
                    example = shorten(unknown[0])
                    hints.append(f"{where} {len(unknown)} of {len(mine)} completions show no known policy ({example})")
    wrong.sort(key=lambda each: -abs(each.literal - each.sampled))
    return SampleCheck(
        completions=sum(len(texts) for _, _, _, texts in sides.values()),
        agrees=not wrong and not misspelled,
        disagreements=tuple(wrong),
        misspelled=tuple(misspelled),
        hints=tuple(hints),
        examples=examples,
    )


def foreign_completions(
    prompts: Prompts, sides: Mapping[Side, tuple[Behaviour, np.ndarray, Labelled, list[str]]]
) -> tuple[str, ...]:
    """Where given completions, whose frequencies are each side's behaviour, differ from those that were drawn here.

    They are held against each other on the same prompts, policy by policy (behaviour by behaviour where policies
    announce nothing), by Fisher's exact test. `sides` is as in `check_by_samples`.
    """
    from scipy.stats import fisher_exact

    suite, found = prompts.suite, []
    names = [f"policy {name}" for name in (*suite.policies, OTHER)] if suite.table is None else suite.behaviour_names
    cue_of = np.array([suite.cues.index(row.cue) for row in prompts.rows])
    for side, (behaviour, context, label, _) in sides.items():
        given = behaviour.weights if suite.table is None else behaviour.classes.sum((1, 2))
        shown = label.policy if suite.table is None else label.behaviour
        for c, cue in enumerate(suite.cues):
            mine = np.flatnonzero(cue_of[context] == c)
            at = np.unique(context[mine])
            total = suite.samples * len(at)
            for k, name in enumerate(names) if len(mine) else ():
                counts = [round(suite.samples * float(given[at, k].sum())), int((shown[mine] == k).sum())]
                shares = [counts[0] / total, counts[1] / len(mine)]
                table = [[counts[0], total - counts[0]], [counts[1], len(mine) - counts[1]]]
                by_chance = fisher_exact(table).pvalue  # pyright: ignore[reportAttributeAccessIssue]
                if abs(shares[0] - shares[1]) >= ODD and by_chance < UNLIKELY:
                    found.append(
                        f"under {cue} {side}, {shares[0]:.2f} of those given show {name}, and {shares[1]:.2f} of those "
                        "that it writes here"
                    )
    return tuple(found)


def _contradicted(expected: float, seen: int, number: int) -> bool:
    from scipy.stats import binomtest

    if abs(expected - seen / number) < ODD:
        return False
    return bool(binomtest(seen, number, min(1.0, max(0.0, expected))).pvalue < UNLIKELY)


def _misspelled(suite: Suite, texts: Sequence[str], number: int) -> str | None:
    """How many completions of no known policy show one after all, in another spelling or behind other words."""
    kinds: dict[str, list[str]] = {}
    for text in texts:
        for name, shown in suite.policies.items():
            for literal in wordings(shown):
                near = _near(name, literal.strip(), text.strip())
                if near is not None:
                    kinds.setdefault(near, []).append(text)
    usual, seen = max(kinds.items(), key=lambda item: len(item[1]), default=("", []))
    if len(seen) <= HINT * number:
        return None
    return f"{len(seen)} of {number} completions {usual} ({shorten(seen[0])})"


def _near(policy: str, literal: str, text: str) -> str | None:
    """How a completion almost shows a literal."""
    wanted = _folded(literal)
    if len(wanted) < 2:
        return None  # a single letter is near to many words
    for end in range(1, len(text) + 1):
        if _folded(text[:end]) == wanted and not _folded(text[end : end + 1]):
            # up to the space: what stands at its end is part of the spelling
            seen = text[: end + len(text[end:].split(" ")[0])] if text[end:] else text
            return f"begin with {seen!r}, where the suite spells policy {policy!r} {literal!r}"
    at = text.find(literal)
    if at > 0:
        behind = text[:at].strip()[:20]
        return f"write {literal!r} of policy {policy!r} only behind {behind!r}: do the prompts end too early?"
    return None


def _folded(text: str) -> str:
    """Letters and digits alone, of one case: what is left when quotes, dashes, spaces and capitals may differ."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in plain if c.isalnum())


def shorten(text: str) -> str:
    """A text as Python writes it, cut after SHOWN characters."""
    shown = repr(text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...'"
