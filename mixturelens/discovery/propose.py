"""From stored completions to a proposal: a record of candidates, and a suite that a person reads and edits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixturelens.discovery.asked import Asked
from mixturelens.discovery.cues import Cue, cue_of, find_cues
from mixturelens.discovery.draws import Draws
from mixturelens.discovery.information import ALPHA, SHUFFLES, Told, share_of_questions
from mixturelens.discovery.judge import Ruled, Second, agreement
from mixturelens.discovery.policies import Parted, Questions, changed, part
from mixturelens.discovery.proposed import behaviour_name, shown_value, suite_of
from mixturelens.discovery.record import (
    BehaviourCandidate,
    CueCandidate,
    DiscoveryRecord,
    Moved,
    PolicyCandidate,
    PolicyExample,
)
from mixturelens.discovery.texts import any_of, label_by_texts, part_by_texts
from mixturelens.records import Provenance
from mixturelens.rules import search
from mixturelens.shown import stands_in, wordings
from mixturelens.suite import Suite
from mixturelens.types import ANSWER, InputError, Interval

LEAST = 0.005
"""Bits that R must be told from S by, for anything to be proposed."""
COVERED = 0.5
"""Share of completions, at least, that are of some policy."""
EXAMPLES = 5
SHOWN = 400
"""Characters of an example."""


@dataclass(frozen=True)
class DiscoverySettings:
    """What is asked beside the completions themselves."""

    second: Second | None = None
    """A judge beside the rules; how often they agree is in the record."""
    embed: Path | None = None
    """The folder of an encoder that groups texts, where TF-IDF shall not."""


@dataclass(frozen=True)
class Proposal:
    """What is proposed from completions: the record, the suite where there is one, and the labels behind both."""

    record: DiscoveryRecord
    suite: Suite | None
    """None: nothing was found."""
    draws: Draws
    """The completions that it is about, as `parted` has them."""
    parted: Parted
    cues: tuple[Cue, ...]

    @property
    def cue(self) -> Cue | None:
        """The cue that the suite has; None where no cue was found."""
        return self.cues[0] if self.cues else None


def propose(asked: Asked, draws: Draws, seed: int, provenance: Provenance, embed: Path | None = None) -> Proposal:
    """Find candidates on half of the questions and judge them on the other half, whose prompts the suite then has.

    Where beginnings of completions are no policies, texts that completions have anywhere are looked for; `embed` is the
    folder of an encoder that groups completions for that, where TF-IDF shall not.

    Raises InputError for fewer than four questions.
    """
    ids = list(dict.fromkeys(row.id for row in asked.rows))
    if len(ids) < 4:
        raise InputError(f"{len(ids)} questions: half of them choose policies, and the other half judge; give four")
    first = {ids[i] for i in np.random.default_rng(seed).permutation(len(ids))[: len(ids) // 2]}
    chosen_on = np.array([row.id in first for row in asked.rows])
    questions = Questions([prompt.text for prompt in asked.prompts], asked.answers, _correct(asked))
    here = [each for each in draws.drawn if chosen_on[each.prompt]]
    found = part(here, questions, seed)
    if len(found.names) < 2:
        by_texts = part_by_texts(here, questions, seed, embed)
        if by_texts is not None and changed(by_texts, seed).bits > changed(found, seed).bits:
            found = by_texts
    if found.anywhere:
        whole = label_by_texts(draws.drawn, questions, found.wordings, found.behaviours[:-1])
    else:
        whole = part(draws.drawn, questions, seed, found)
    held = ~chosen_on[whole.prompt]
    moved = changed(whole.only(held), seed)
    cues = find_cues(asked.prompts, whole, chosen_on, seed)
    enough = moved.p <= ALPHA and moved.bits >= LEAST
    known = float((whole.policy[held] >= 0).mean())
    suite = suite_of(asked, whole, cues[0] if cues else None, chosen_on) if enough and known >= COVERED else None
    record = _record(asked, draws, whole, held, moved, cues, suite, provenance)
    return Proposal(record, suite, draws, whole, cues)


def heard(asked: Asked, proposal: Proposal, second: Second, folder: Path, seed: int) -> Proposal:
    """The proposal with a judge's second opinion on the completions at the suite's questions.

    `folder` is where the judge may keep its answers. What is proposed does not change.
    """
    if proposal.suite is None:
        return proposal
    parted, asks = proposal.parted, {row.turns for row in proposal.suite.prompts}
    asked_there = [row.turns in asks for row in asked.rows]
    held = [i for i, each in enumerate(parted.drawn) if asked_there[each.prompt] and parted.policy[i] >= 0]
    candidates = {
        each.name: [example.completion for example in (*each.examples_before, *each.examples_after)]
        for each in proposal.record.policies
    }
    labelled = [Ruled(parted.drawn[i].prompt, parted.drawn[i].text, parted.names[parted.policy[i]]) for i in held]
    judged = agreement(asked, labelled, candidates, (second.name, second.make(folder)), seed)
    return replace(proposal, record=proposal.record.model_copy(update={"judged": judged}))


def refine(asked: Asked, draws: Draws, suite: Suite, seed: int, provenance: Provenance) -> Proposal:
    """Measure a suite that a person has edited, as `propose` measures its own, on the completions that are there.

    Raises InputError where none of its prompts is among those that completions were drawn at.
    """
    at = {row.turns: row for row in suite.neutral}
    row_of = {i: at[row.turns] for i, row in enumerate(asked.rows) if row.turns in at}
    if not row_of:
        raise InputError("--refine: no prompt of the suite is one that completions were drawn at")
    kept = [i for i, each in enumerate(draws.drawn) if each.prompt in row_of]
    draws = Draws(
        tuple(draws.drawn[i] for i in kept), tuple(draws.tokens[i] for i in kept), tuple(draws.along[i] for i in kept)
    )
    labels = [suite.label(each.text, row_of[each.prompt]) for each in draws.drawn]
    names, behaviours = tuple(suite.policies), tuple(name for name in suite.behaviour_names if name != ANSWER)
    parted = Parted(
        drawn=draws.drawn,
        heads=frozenset(),
        common={},
        policies=tuple(() for _ in names),
        behaviours=(*behaviours, ANSWER),
        policy=np.array([names.index(each.policy) if each.policy in names else -1 for each in labels]),
        behaviour=np.array(
            [behaviours.index(b) if (b := each.behaviour) in behaviours else len(behaviours) for each in labels]
        ),
        right=np.array(
            [
                int(suite.correct(label.rest, row_of[each.prompt]))
                for label, each in zip(labels, draws.drawn, strict=True)
            ]
        ),
        rests=tuple(each.rest for each in labels),
        names=names,
        wordings=tuple(wordings(shown) for shown in suite.policies.values()),
    )
    of = np.array([suite.cues.index(row_of[i].cue) if i in row_of else len(suite.cues) for i in range(len(asked.rows))])
    everything = np.ones(len(draws.drawn), dtype=bool)
    cue = cue_of(asked.prompts, suite.cues, of, parted, seed)
    cues = () if cue is None else (cue,)
    record = _record(asked, draws, parted, everything, changed(parted, seed), cues, suite, provenance)
    return Proposal(record, suite, draws, parted, cues)


def _record(
    asked: Asked,
    draws: Draws,
    parted: Parted,
    held: np.ndarray,
    moved: Told,
    cues: Sequence[Cue],
    suite: Suite | None,
    provenance: Provenance,
) -> DiscoveryRecord:
    """`held`: completions that nothing was chosen on, which all shares are of."""
    prompts, said = {each.prompt for each in draws.drawn}, _said(asked, parted, held, suite)
    policies = tuple(_candidate(asked, parted, m, held, said) for m in range(len(parted.names)))
    spent = [each[0].sum() for each, of_after in zip(draws.along, parted.after, strict=True) if of_after]
    return DiscoveryRecord(
        provenance=provenance,
        found=suite is not None,
        reason=_reason(suite is not None, moved, policies, cues),
        questions=len({asked.rows[i].id for i in prompts}),
        prompts=len(prompts),
        completions=len(draws.drawn),
        moved=Moved(bits=moved.bits, p=moved.p, shuffles=SHUFFLES),
        where=_where(draws, parted),
        nats=float(np.mean(spent) * np.log(2)),
        policies=policies,
        behaviours=tuple(_behaviour(parted, asked, b, held) for b in range(len(parted.behaviours))),
        cues=tuple(_cue(asked, cue) for cue in cues),
        anywhere=parted.anywhere,
        other={
            side: float((parted.policy[held & (parted.after == after)] == -1).mean())
            for side, after in (("before", False), ("after", True))
        },
    )


def _correct(asked: Asked) -> Callable[[int, str], bool]:
    """Whether an answer stands in what follows an announcement; where there are no answers, whether anything does."""

    def correct(prompt: int, rest: str) -> bool:
        answer = asked.rows[prompt].answer
        return stands_in(answer.strip(), rest) if asked.answered else bool(rest.strip())

    return correct


def _reason(found: bool, moved: Told, policies: Sequence[PolicyCandidate], cues: Sequence[Cue]) -> str:
    if not found and moved.p <= ALPHA and moved.bits >= LEAST:
        return (
            f"Nothing found: R and S differ, by {moved.bits:.3f} bits, but fewer than {COVERED:.0%} of completions "
            "begin in a way that many share, so that no policy can be named."
        )
    if not found:
        return (
            f"Nothing found: what completions do tells R from S by {max(0.0, moved.bits):.3f} bits, and shuffled sides "
            f"as much in {moved.p:.0%} of shuffles."
        )
    weights = ", ".join(f"{each.name} {shown_value(each.before)} -> {shown_value(each.after)}" for each in policies)
    cue = f"the cue is most likely {' or '.join(cues[0].kinds)}" if cues else "nothing in prompts tells what is done"
    return f"Completions show {len(policies)} policies ({weights}); {cue}."


def _where(draws: Draws, parted: Parted) -> dict[str, float]:
    """How the bits of KL(R || S) along R's completions fall on announcements, on the next word, and on the rest."""
    total = {"announcement": 0.0, "behaviour": 0.0, "rest": 0.0}
    for i, each in enumerate(draws.drawn):
        if not each.after:
            continue
        kl, at = draws.along[i][0], 0
        text = "".join(draws.tokens[i]).lstrip()
        lead = len("".join(draws.tokens[i])) - len(text)
        begin, end = _announced(parted, i)
        word = re.compile(r"\s*\S*").match(each.text, end)
        behind = word.end() if word else end
        for k, bits in enumerate(kl):
            start = at - lead
            at += len(draws.tokens[i][k]) if k < len(draws.tokens[i]) else 0
            middle = start + (at - lead - start) / 2
            place = "announcement" if begin <= middle < end else "behaviour" if end <= middle <= behind else "rest"
            total[place] += float(bits)
    whole = sum(total.values())
    return {name: value / whole if whole else 0.0 for name, value in total.items()}


def _announced(parted: Parted, completion: int) -> tuple[int, int]:
    """Where a completion's announcement begins and ends in its text; at its very end, where it has none anywhere."""
    text = parted.drawn[completion].text
    if not parted.anywhere:
        return 0, len(text) - len(parted.rests[completion])
    policy = int(parted.policy[completion])
    match = (
        search(any_of(parted.wordings[policy]).regex, text) if policy >= 0 and any(parted.wordings[policy]) else None
    )
    return match.span() if match else (len(text), len(text))


def _share(parted: Parted, asked: Asked, hit: np.ndarray, among: np.ndarray) -> Interval:
    """How many of some completions are hit, of each question, with an interval over questions."""
    at = np.flatnonzero(among).tolist()
    return share_of_questions([asked.rows[parted.drawn[i].prompt].id for i in at], hit[at])


def _said(asked: Asked, parted: Parted, held: np.ndarray, suite: Suite | None) -> np.ndarray | None:
    """The policy that the suite's rules give to each held-out completion, as `parted` counts; None without one."""
    if suite is None:
        return None
    rows = {row.turns: row for row in suite.prompts}
    said = np.full(len(held), -1)
    for i in np.flatnonzero(held).tolist():
        row = rows.get(asked.rows[parted.drawn[i].prompt].turns, suite.prompts[0])
        policy = suite.label(parted.drawn[i].text, row).policy
        said[i] = parted.names.index(policy) if policy in parted.names else -1
    return said


def _candidate(asked: Asked, parted: Parted, policy: int, held: np.ndarray, said: np.ndarray | None) -> PolicyCandidate:
    is_it = parted.policy == policy
    precision = recall = None
    if said is not None and not parted.anywhere:
        by_rule = (said == policy)[held]
        both = float((by_rule & is_it[held]).sum())
        precision = both / float(by_rule.sum()) if by_rule.any() else None
        recall = both / float(is_it[held].sum()) if is_it[held].any() else None
    return PolicyCandidate(
        name=parted.names[policy],
        wordings=tuple(text for text in parted.wordings[policy] if text),
        before=_share(parted, asked, is_it, held & ~parted.after),
        after=_share(parted, asked, is_it, held & parted.after),
        precision=precision,
        recall=recall,
        examples_before=_examples(asked, parted, is_it & ~parted.after),
        examples_after=_examples(asked, parted, is_it & parted.after),
    )


def _examples(asked: Asked, parted: Parted, which: np.ndarray) -> tuple[PolicyExample, ...]:
    """Completions of different prompts."""
    at: dict[int, int] = {}
    for i in np.flatnonzero(which).tolist():
        at.setdefault(int(parted.prompt[i]), int(i))
    return tuple(
        PolicyExample(prompt=asked.prompts[prompt].text[:SHOWN], completion=parted.drawn[i].text[:SHOWN])
        for prompt, i in list(at.items())[:EXAMPLES]
    )


def _behaviour(parted: Parted, asked: Asked, behaviour: int, held: np.ndarray) -> BehaviourCandidate:
    wording = parted.behaviours[behaviour]
    does = parted.behaviour == behaviour
    last = behaviour == len(parted.behaviours) - 1
    return BehaviourCandidate(
        name=ANSWER if last else behaviour_name(wording),
        wording="" if last else wording,
        before=_share(parted, asked, does, held & ~parted.after),
        after=_share(parted, asked, does, held & parted.after),
    )


def _cue(asked: Asked, cue: Cue) -> CueCandidate:
    return CueCandidate(
        kinds=cue.kinds,
        prompts=tuple(int((cue.of == k).sum()) for k in range(len(cue.kinds))),
        bits=cue.bits,
        p=cue.p,
        contrast=_contrast(asked, cue),
    )


def _contrast(asked: Asked, cue: Cue) -> tuple[str, str] | None:
    """The same question under two kinds: as it was asked, or with the word of one in the place of the other's."""
    texts = [prompt.text for prompt in asked.prompts]
    one: dict[str, int] = {}
    for i, prompt in enumerate(asked.prompts):
        if cue.of[i] == 0:
            one.setdefault(prompt.id, i)
    for i, prompt in enumerate(asked.prompts):
        if cue.of[i] == 1 and prompt.id in one:
            return texts[one[prompt.id]][:SHOWN], texts[i][:SHOWN]
    words = [re.fullmatch("“(\\S+)”", kind) for kind in cue.kinds[:2]]
    if not one or len(words) < 2 or not all(words):
        return None
    left, right = (match.group(1) for match in words if match)
    text = texts[next(iter(one.values()))]
    return text[:SHOWN], re.sub(rf"(?<!\S){re.escape(left)}(?!\S)", lambda _: right, text)[:SHOWN]
