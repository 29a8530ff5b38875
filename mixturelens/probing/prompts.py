"""What probes are asked about: the prompts of a suite as rows with positions, and a label of each row a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import span_positions
from mixturelens.hooks.lens import Lens
from mixturelens.models import end_tokens
from mixturelens.probing.record import Metric
from mixturelens.shown import Rule, wordings
from mixturelens.spelling import Ids, Speller, check_spelling, encode_prompts
from mixturelens.stats import half_of
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import InputError, Side

Group = Literal["neutral", "placed", "hinted"]
"""Neutral prompts up to their last token; neutral prompts behind which each policy is put in place; hinted prompts."""


@dataclass(frozen=True)
class ProbeRow:
    """One prompt as a probe sees it: `ids`, and the run that it is read in, perhaps with an announcement behind it."""

    ids: tuple[int, ...]
    run: tuple[int, ...]
    question: str
    cue: str
    hint: str | None
    policy: str | None
    answer: str
    at: Mapping[str | int, int]
    """Position -> token index."""


@dataclass(frozen=True)
class ProbePrompts:
    """The prompts that probes are asked about, by group, with the positions at which each group is read."""

    rows: Mapping[Group, tuple[ProbeRow, ...]]
    positions: Mapping[Group, tuple[str | int, ...]]
    """Positions that all rows of a group have. Those of `placed` are the announcement's."""
    labels: tuple[str, ...]
    """A word for each token index, where they mean the same in every question."""
    halves: tuple[tuple[str, ...], tuple[str, ...]]
    """Questions that probes are fitted on, and those they are scored on."""


def read_prompts(suite: Suite, tokenizer) -> ProbePrompts:
    """Rows and positions of a suite.

    Where all prompts (and announcements) have one length and equal spans, a position is a token's index, and those of
    the announcement follow the prompt's. Else it is a named span, read at its last token, `last` (of the prompt), and
    `policy` (last token of the announcement). Raises InputError for fewer than four questions.
    """
    questions = list(dict.fromkeys(row.id for row in suite.neutral))
    if len(questions) < 4:
        raise InputError("probes are fitted on one half of the questions and scored on the other: give at least four")
    fit, score = (tuple(questions[i] for i in half_of(len(questions), which)) for which in (0, 1))
    texts = {policy: wordings(shown)[0] for policy, shown in suite.policies.items() if wordings(shown)}
    for policy, text in texts.items():
        check_spelling(text, f"policy {policy!r}", tokenizer)

    def announced(row: PromptRow) -> dict[str, Ids]:
        speller = Speller(suite, row, tokenizer)
        return {policy: speller.announced(text, ()).spellings[0] for policy, text in texts.items()}

    known = [row for row in suite.prompts if row.id in set(questions)]
    encoded = [tuple(ids) for ids in encode_prompts(suite, known, tokenizer)]
    spans = [span_positions(suite, row, tokenizer) for row in known]
    words = [announced(row) if row.hint is None else {} for row in known]
    lengths = {len(ids) for ids in encoded}
    aligned = len(lengths) == 1 and len({len(ids) for each in words for ids in each.values()}) <= 1
    aligned = aligned and all(span == spans[0] for span in spans)
    rows: dict[Group, list[ProbeRow]] = {"neutral": [], "placed": [], "hinted": []}
    for row, ids, span, placed in zip(known, encoded, spans, words, strict=True):
        width = len(ids)
        inside: dict[str | int, int] = (
            {i: i for i in range(width)} if aligned else {**{k: v[-1] for k, v in span.items() if v}, "last": width - 1}
        )
        # a prompt's own tokens do not see the announcement, so that any run will do
        run = (*ids, *next(iter(placed.values()), ())) if row.hint is None else ids
        rows["neutral" if row.hint is None else "hinted"].append(_row(row, ids, run, None, inside))
        for policy, word in placed.items():
            behind_it: dict[str | int, int] = (
                {width + i: width + i for i in range(len(word))} if aligned else {"policy": width + len(word) - 1}
            )
            rows["placed"].append(_row(row, ids, (*ids, *word), policy, behind_it))
    positions: dict[Group, tuple[str | int, ...]] = {
        group: tuple(p for p in dict.fromkeys(p for r in of for p in r.at) if all(p in r.at for r in of))
        for group, of in rows.items()
    }
    return ProbePrompts(
        rows={group: tuple(of) for group, of in rows.items()},
        positions=positions,
        labels=_labels(rows, positions, spans[0], tokenizer) if aligned else (),
        halves=(fit, score),
    )


def _row(
    row: PromptRow, ids: tuple[int, ...], run: tuple[int, ...], policy: str | None, at: dict[str | int, int]
) -> ProbeRow:
    return ProbeRow(ids, run, row.id, row.cue, row.hint, policy, row.answer, at)


def _labels(
    rows: Mapping[Group, Sequence[ProbeRow]],
    positions: Mapping[Group, tuple[str | int, ...]],
    spans: Mapping[str, tuple[int, ...]],
    tokenizer,
) -> tuple[str, ...]:
    """A word for each position: its tokens where cue and policy alone decide them, else its span."""
    names = {at: name for name, place in spans.items() for at in place}
    labels = []
    groups: tuple[Group, Group] = ("neutral", "placed")
    for group in groups:
        for at in (p for p in positions[group] if isinstance(p, int)):
            under: dict[tuple[str, str | None], set[int]] = {}
            for row in rows[group]:
                under.setdefault((row.cue, row.policy), set()).add(row.run[at])
            if all(len(found) == 1 for found in under.values()):
                shared = list(dict.fromkeys(token for found in under.values() for token in found))
                words = tokenizer.convert_ids_to_tokens(shared)
                labels.append(" / ".join(word.replace("Ġ", " ").replace("▁", " ").strip() or word for word in words))
            else:
                name = names.get(at, "token")
                place = spans.get(name, ())
                labels.append(f"{name} {place.index(at) + 1}" if len(place) > 1 else name)
    return tuple(labels)


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeTarget:
    """What probes are asked for, and of which rows. `labels[side]`: class numbers (-1: unknown), or numbers."""

    name: str
    metric: Metric
    classes: tuple[str, ...]
    said: str
    rows: Mapping[Group, tuple[ProbeRow, ...]]
    """Rows by the group of positions that they are about."""
    labels: Mapping[Group, Mapping[Side, np.ndarray]]


@dataclass(frozen=True)
class ProbedSuite:
    """A suite as probes are asked about it: its prompts, what a pair does on them, and two policies."""

    suite: Suite
    tokenizer: Any
    prompts: ProbePrompts
    behaviour: BehaviourRecord
    policies: tuple[str, str]
    """Those of the log-odds."""


def find_targets(probed: ProbedSuite, own: Mapping[Side, Own]) -> tuple[list[ProbeTarget], list[str]]:
    """All targets that a suite has, and sentences on why others are missing.

    `own` are the policies that S and R follow of their own accord.
    """
    prompts, suite, tokenizer, policies = probed.prompts, probed.suite, probed.tokenizer, probed.policies
    missing: list[str] = []
    neutral, placed, hinted = (prompts.rows[group] for group in ("neutral", "placed", "hinted"))
    found: list[ProbeTarget] = []

    def labelled(
        name: str, said: str, rows: Mapping[Group, tuple[ProbeRow, ...]], word: Callable[[ProbeRow], str | None]
    ) -> None:
        """A target whose label is the same for both sides."""
        words: dict[Group, list[str | None]] = {group: [word(row) for row in of] for group, of in rows.items() if of}
        classes = tuple(dict.fromkeys(w for group in words.values() for w in group if w is not None))
        if len(classes) < 2:
            missing.append(f"probes for {name}: {'all rows have one' if classes else 'no row has a'} label")
            return
        numbers = {g: np.array([-1 if w is None else classes.index(w) for w in of]) for g, of in words.items()}
        labels = {g: dict.fromkeys(own, of) for g, of in numbers.items()}
        found.append(_target(name, classes, said, {g: rows[g] for g in words}, labels))

    both: dict[Group, tuple[ProbeRow, ...]] = {"neutral": neutral, "placed": placed}
    said = "neutral prompts; from the announcement on, with each policy put in place"
    labelled("cue", said, both, lambda row: row.cue)
    if hinted:
        labelled("hint", "hinted prompts", {"hinted": hinted}, lambda row: row.hint)
    else:
        missing.append("probes for hint: the suite has no hinted prompts")
    drawn: dict[Side, np.ndarray] = {side: each.drawn for side, each in own.items()}
    names = tuple(suite.policies)
    if len(names) > 1:
        rows: dict[Group, tuple[ProbeRow, ...]] = {"neutral": neutral}
        labels: dict[Group, Mapping[Side, np.ndarray]] = {"neutral": drawn}
        if len({row.policy for row in placed}) == len(names):
            rows["placed"] = placed
            put = np.array([names.index(row.policy or "") for row in placed])
            labels["placed"] = dict.fromkeys(own, put)
        said = "neutral prompts, with the policy that a completion of the model's own shows; then as put in place"
        found.append(_target("policy", names, said, rows, labels))
    else:
        missing.append("probes for policy: the suite has one policy")
    first = {p: wordings(suite.policies[p])[0] for p in dict.fromkeys(row.policy for row in placed) if p is not None}
    shown = {(c.policy, c.cue): c.behaviour for c in probed.behaviour.table if first.get(c.policy) == c.announcement}
    if any(value is not None for value in shown.values()):
        before = {(row.question, row.cue): row for row in neutral}
        # before the announcement, the same prompt once for each policy
        same = tuple(replace(before[row.question, row.cue], policy=row.policy) for row in placed)
        said = "neutral prompts with each policy put in place, and what that policy does under the prompt's cue"
        labelled(
            "behaviour", said, {"neutral": same, "placed": placed}, lambda row: shown.get((row.policy or "", row.cue))
        )
    else:
        missing.append("probes for behaviour: the suite names no behaviours, or no policy can be put in place")
    _answer(labelled, missing, both, suite, tokenizer, prompts)
    exact: dict[Side, np.ndarray] = {
        side: each.logs[policies[0]] - each.logs[policies[1]]
        for side, each in own.items()
        if set(policies) <= each.logs.keys()
    }
    if len(exact) == len(own):
        said = f"neutral prompts, and the model's own log-odds of {policies[0]} against {policies[1]}"
        found.append(ProbeTarget("log-odds", "R2", (), said, {"neutral": neutral}, {"neutral": exact}))
    else:
        missing.append("probes for log-odds: a policy is shown by a rule, so that its probability is not exact")
    return found, missing


def _target(name: str, classes: tuple[str, ...], said: str, rows, labels) -> ProbeTarget:
    return ProbeTarget(name, "AUROC" if len(classes) == 2 else "accuracy", classes, said, rows, labels)


def _answer(labelled, missing: list[str], rows, suite: Suite, tokenizer, prompts: ProbePrompts) -> None:
    """First token of the answer, if its tokens come often enough to be learnt."""
    placed = next((wordings(shown)[0] for shown in suite.policies.values() if wordings(shown)), "")
    speller = Speller(suite, suite.neutral[0], tokenizer)
    answers = list(dict.fromkeys(row.answer for row in rows["neutral"]))
    for answer in answers:
        check_spelling(answer, f"answer {answer!r}", tokenizer)
    spelled = speller.announced(placed, answers).rests if placed else [speller.bare(answer) for answer in answers]
    tokens = {answer: spellings[0][0] for answer, spellings in zip(answers, spelled, strict=True)}
    different = len(set(tokens.values()))
    if different > len(prompts.halves[0]) // 2:
        missing.append(f"probes for answer: {different} first tokens for {len(prompts.halves[0])} questions to fit on")
        return
    words = {token: str(tokenizer.decode([token])).strip() for token in tokens.values()}
    if len(set(words.values())) < len(words):
        words = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in words}
    labelled(
        "answer", "neutral prompts; then with each policy put in place", rows, lambda row: words[tokens[row.answer]]
    )


# --- what a model announces of its own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """Policies that completions of a model's own show, prompt by prompt."""

    drawn: Int[np.ndarray, " row"]
    """One policy a prompt, -1 for no known one: drawn from exact weights, given that it is known, where announcements
    are texts; shown by one sampled completion where one is a rule."""
    logs: Mapping[str, Float[np.ndarray, " row"]]
    """Policy -> exact log-probability that a completion begins with its announcement; none for a rule."""


def spelled(suite: Suite, rows: Sequence[ProbeRow], tokenizer) -> dict[str, list[tuple[int, Ids]]]:
    """Policy -> (row, token ids) of every spelling of every wording of its announcement; rules are left out."""
    asked = {(row.id, row.cue): row for row in suite.neutral}
    shown = {name: wordings(each) for name, each in suite.policies.items() if not isinstance(each, Rule)}
    found: dict[str, list[tuple[int, Ids]]] = {name: [] for name in shown}
    for number, row in enumerate(rows):
        speller = Speller(suite, asked[row.question, row.cue], tokenizer)
        for name, texts in shown.items():
            found[name] += [(number, ids) for text in texts for ids in speller.announced(text, ()).spellings]
    return found


def own_policies(
    lens: Lens, suite: Suite, rows: Sequence[ProbeRow], logs: Mapping[tuple[Ids, Ids], float], seed: int
) -> Own:
    """The policies that a model follows of its own accord at each prompt.

    `logs` holds the log-probability of every spelling behind every prompt, by (prompt, spelling). Where a policy is a
    rule, one completion is drawn for every prompt instead.
    """
    exact = {}
    for name, places in spelled(suite, rows, lens.tokenizer).items():
        exact[name] = np.full(len(rows), -np.inf)
        np.logaddexp.at(exact[name], [n for n, _ in places], [logs[rows[n].ids, ids] for n, ids in places])
    if len(exact) < len(suite.policies):
        return Own(_sampled(lens, suite, rows, seed), exact)
    every = np.stack(list(exact.values()), 1)
    weights = np.exp(every - np.logaddexp.reduce(every, axis=1)[:, None])
    uniform = np.random.default_rng(seed).random(len(rows))
    return Own((uniform[:, None] > weights.cumsum(1)[:, :-1]).sum(1), exact)


def _sampled(lens: Lens, suite: Suite, rows: Sequence[ProbeRow], seed: int) -> Int[np.ndarray, " row"]:
    def model(**inputs):
        lens.tell_width(len(inputs["input_ids"]))
        return lens.model(**inputs)

    vocabulary = lens.model.config.get_text_config().vocab_size
    scorer = Scorer(end_tokens(lens.model, lens.tokenizer), vocabulary, lens.device)
    drawn = scorer.sample(model, [row.ids for row in rows], 1, [suite.max_new_tokens] * len(rows), seed)
    asked = {(row.id, row.cue): row for row in suite.neutral}
    names, ends = list(suite.policies), set(scorer.ends)
    policies = [
        suite.label(str(lens.tokenizer.decode([t for t in ids if t not in ends])), asked[row.question, row.cue]).policy
        for row, ids in zip(rows, drawn.tokens, strict=True)
    ]
    return np.array([names.index(policy) if policy in names else -1 for policy in policies])
