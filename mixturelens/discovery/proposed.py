"""The suite that a discovery proposes, as a person reads and edits it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixturelens.discovery.asked import Asked
from mixturelens.discovery.cues import Cue
from mixturelens.discovery.policies import REFUSAL, Parted, slug
from mixturelens.discovery.record import DiscoveryRecord
from mixturelens.discovery.texts import KNOWN, any_of
from mixturelens.files import read_text
from mixturelens.records import write_text
from mixturelens.shown import Rule, Shown
from mixturelens.suite import PromptRow, Suite, load_suite
from mixturelens.types import REFUSE, InputError, Interval

EXACT = 0.95
"""An answer, with the same mark behind it, is all that follows its announcement in so many of those that are right."""
SAMPLES = 16


def suite_of(asked: Asked, parted: Parted, cue: Cue | None, chosen_on: np.ndarray) -> Suite:
    """The suite of what was found, with the prompts that nothing was chosen on."""
    kinds = _cue_names(cue.kinds) if cue else ["all"]
    of = cue.of if cue else np.zeros(len(asked.rows), dtype=int)
    seen: Counter[tuple[str, str]] = Counter()
    rows: list[PromptRow] = []
    for i, row in enumerate(asked.rows):
        if chosen_on[i]:
            continue
        kind = kinds[of[i]]
        seen[row.id, kind] += 1
        times = seen[row.id, kind]
        rows.append(row.model_copy(update={"cue": kind, "id": row.id if times == 1 else f"{row.id}#{times}"}))
    right = parted.right.astype(bool)
    behind = Counter(
        parted.rests[i][len(answer) :] if parted.rests[i].startswith(answer) else None
        for i in np.flatnonzero(right & chosen_on[parted.prompt]).tolist()
        for answer in [asked.rows[parted.prompt[i]].answer.strip()]
    )
    ending, times = behind.most_common(1)[0] if behind else (None, 0)
    exact = asked.answered and ending is not None and times >= EXACT * behind.total()
    match = "exact" if exact else "contains" if asked.answered else "regex"
    if exact:  # a full stop, say, that follows every answer
        rows = [row.model_copy(update={"answer": row.answer.strip() + (ending or "")}) for row in rows]
    given = {
        "prompts": tuple(rows),
        "behaviours": _behaviours(parted) or None,
        "answer_match": match,
        "max_new_tokens": asked.suite.max_new_tokens,
        "samples": SAMPLES,
        "chat": asked.suite.chat,
        "origin": "discovered",
    }
    return Suite.model_validate({**given, "policies": _policies(parted)})


def _behaviours(parted: Parted) -> dict[str, Shown]:
    """By name, how completions show them; the answer is whatever is none of them."""
    wordings = parted.behaviours[:-1]
    if parted.anywhere:
        return {name: KNOWN[name] for name in wordings}
    found: dict[str, tuple[str, ...]] = {}
    for wording in wordings:
        if not any(other != wording and wording.startswith(other) for other in wordings):  # the shorter one finds both
            name = behaviour_name(wording)
            found[name] = (*found.get(name, ()), wording)
    return {name: _one_or_all(texts) for name, texts in found.items()}


def _policies(parted: Parted) -> dict[str, Shown]:
    """By name, how completions show them: by literal texts where none is the beginning of another, else by rules."""
    names, shown = parted.names, parted.wordings
    if parted.anywhere:
        return {name: any_of(texts) for name, texts in zip(names, shown, strict=True)}
    texts = [text for group in shown for text in group]
    if all(texts) and not any(a != b and a.startswith(b) for a in texts for b in texts):
        return {name: _one_or_all(group) for name, group in zip(names, shown, strict=True)}
    return dict(_rules(names, shown))


def _one_or_all(texts: tuple[str, ...]) -> Shown:
    return texts[0] if len(texts) == 1 else texts


def check_suite(suite: Suite | None, out: Path) -> None:
    """Raise InputError where another suite lies in `out` than the one proposed: an edited one is not written over."""
    file = out / "suite.yaml"
    if suite is None or not file.is_file():
        return
    try:
        same = load_suite(file) == suite
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{file}: another suite than the one that is proposed, an edited one perhaps; move it away, or measure it "
            f"with --refine {file}"
        )


def save_suite(suite: Suite, record: DiscoveryRecord, out: Path) -> Path:
    """Write suite.yaml, with a comment on what each thing stands on, and its prompts into `out`; returns its path."""
    file = out / "suite.yaml"
    suite.save(file)
    shows = "texts that completions have anywhere" if record.anywhere else "how a completion begins"
    said = [
        "Proposed by `mixturelens discover`; read it, edit it, and give it to `mixturelens verdict --suite`.",
        f"The prompts are the half of the questions that it was not chosen on. {record.reason}",
        "",
        f"policies: {shows}, and how often S and R write so",
        *(f"  {each.name}: {shown_value(each.before)} -> {shown_value(each.after)}" for each in record.policies),
        "behaviours: what follows; whatever is none of them is the answer",
        *(f"  {each.name}: {shown_value(each.before)} -> {shown_value(each.after)}" for each in record.behaviours),
        "cue: what parts the prompts, most likely first, with the bits that it tells of what is done",
        *(f"  {', '.join(each.kinds)}: {shown_value(each.bits)} bits" for each in record.cues),
    ]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in said)
    write_text(file, comment + read_text(file, "is gone"))
    return file


def _rules(names: Sequence[str], begun: Sequence[Sequence[str]]) -> dict[str, Rule]:
    """Each wording where no longer one of another policy stands; what begins like none is last."""
    order = sorted(range(len(names)), key=lambda m: "" in begun[m])
    found = {}
    for m in order:
        texts = [text for text in begun[m] if text]
        if "" in begun[m]:
            found[names[m]] = Rule(regex="")
            continue
        others = [text for k, group in enumerate(begun) if k != m for text in group]
        parts = []
        for text in sorted(texts, key=len, reverse=True):
            longer = "|".join(re.escape(o[len(text) :]) for o in others if o != text and o.startswith(text))
            parts.append(re.escape(text) + (f"(?!{longer})" if longer else "") + r"(?!\S)")
        found[names[m]] = Rule(regex=f"^(?:{'|'.join(parts)})", force=texts[0])
    return found


def _cue_names(kinds: Sequence[str]) -> list[str]:
    found: list[str] = []
    for kind in kinds:
        name = " ".join(kind.strip("“”").split())[:32].strip()
        while name in found:
            name += "-2"
        found.append(name)
    return found


def behaviour_name(wording: str) -> str:
    """The name of a behaviour, from its wording: `refuse` where that holds back, else the wording in short."""
    if REFUSAL.search(wording):
        return REFUSE
    return slug(wording) or "said"


def shown_value(value: Interval) -> str:
    return "not measured" if value.value is None else f"{value.value:.2f}"
