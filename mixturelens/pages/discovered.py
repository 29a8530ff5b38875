"""The page of a discovery: what is proposed and how sure it is, and completions to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixturelens.discovery.asked import Asked
from mixturelens.discovery.draws import Draws
from mixturelens.discovery.propose import Proposal
from mixturelens.figures.style import GREY, ROUTER, SPECIALIST, policy_colour
from mixturelens.figures.words import SIDES, show, show_interval
from mixturelens.pages.parts import number, render
from mixturelens.records import write_text

PLACES = {"announcement": ROUTER, "behaviour": SPECIALIST, "rest": GREY}
PROMPTS = 12
"""Prompts whose completions are shown: as many of each kind."""
COMPLETIONS = 4
"""Completions of each side that are shown of a prompt."""
LEAST = 0.05
"""Bits from which a token is shaded."""
MOST = 400
"""Characters of a prompt, and tokens of a completion, that are shown."""


def write_discovered(path: Path, asked: Asked, proposal: Proposal, title: str) -> Path:
    """Write the page, whole or not at all. It needs no network and no script."""
    record, parted = proposal.record, proposal.parted
    names = parted.names
    colours = [policy_colour(name, names) for name in names]
    cue = proposal.cue
    context = {
        "title": title,
        "reason": record.reason,
        "counts": (
            f"{record.completions} completions at {record.prompts} prompts of {record.questions} questions. Half of "
            "them chose what is proposed, and the other half measured it."
        ),
        "anywhere": record.anywhere,
        "policies": [
            {
                "name": each.name,
                "colour": colour,
                "wordings": each.wordings,
                "before": number(each.before),
                "after": number(each.after),
                "precision": show(each.precision),
                "recall": show(each.recall),
            }
            for each, colour in zip(record.policies, colours, strict=True)
        ],
        "behaviours": [
            {"name": each.name, "wording": each.wording, "before": number(each.before), "after": number(each.after)}
            for each in record.behaviours
        ],
        "judged": ""
        if record.judged is None
        else (
            f"A judge ({record.judged.by}) agrees with the rules in {show_interval(record.judged.agreement)} of "
            f"{record.judged.completions} completions, and names no policy for {record.judged.none:.0%}."
        ),
        "moved": (
            f"What a completion does tells R from S by {record.moved.bits:.3f} bits; {record.moved.p:.1%} of "
            f"{record.moved.shuffles} shuffles tell as much."
        ),
        "where_text": (
            f"{record.nats:.2f} nats lie between R and S along a completion of R (KL of each token, over the whole "
            "vocabulary). This is how they fall on the announcement, the first word behind it, and the rest:"
        ),
        "where_label": ", ".join(f"{name} {share:.0%}" for name, share in record.where.items()),
        "where": [
            {"name": name, "colour": PLACES[name], "share": round(100 * share, 2), "said": f"{share:.0%}"}
            for name, share in record.where.items()
        ],
        "cues": [{"kinds": " | ".join(each.kinds), "bits": number(each.bits)} for each in record.cues],
        "kinds": [
            {
                "name": kind,
                "prompts": int((cue.of == k).sum()),
                "sides": [
                    _weights(proposal, names, colours, cue.of[parted.prompt] == k, after) for after in (False, True)
                ],
            }
            for k, kind in enumerate(cue.kinds)
        ]
        if cue
        else [],
        "contrast": record.cues[0].contrast if record.cues else None,
        "prompts": [_prompt(asked, proposal, i, colours) for i in _some(asked, proposal)],
    }
    write_text(path, render("discovered.html.j2", context))
    return path


def _side(after: bool) -> str:
    return SIDES["after" if after else "before"]


def _weights(
    proposal: Proposal, names: Sequence[str], colours: Sequence[str], of: np.ndarray, after: bool
) -> dict[str, Any]:
    """Shares of the policies among some completions of a side."""
    parted = proposal.parted
    some = parted.policy[of & (parted.after == after)]
    shares = [float((some == m).mean()) if len(some) else 0.0 for m in range(len(names))]
    return {
        "name": _side(after),
        "parts": [{"colour": c, "share": round(100 * share, 2)} for c, share in zip(colours, shares, strict=True)],
        "said": ", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True)),
    }


def _some(asked: Asked, proposal: Proposal) -> list[int]:
    """Prompts of each kind in turn, in their order."""
    asked_at = np.isin(np.arange(len(asked.rows)), proposal.parted.prompt)
    of = proposal.cue.of if proposal.cue else np.zeros(len(asked.rows), dtype=int)
    kinds = [np.flatnonzero(asked_at & (of == k)) for k in range(len(proposal.cue.kinds) if proposal.cue else 1)]
    each = max(1, PROMPTS // len(kinds))
    return sorted(int(i) for kind in kinds for i in kind[:each])


def _prompt(asked: Asked, proposal: Proposal, prompt: int, colours: Sequence[str]) -> dict[str, Any]:
    parted, cue = proposal.parted, proposal.cue
    return {
        "text": _cut(asked.prompts[prompt].text),
        "kind": cue.kinds[cue.of[prompt]] if cue else "",
        "sides": [
            {
                "name": _side(after),
                "completions": [
                    {
                        "colour": colours[parted.policy[i]] if parted.policy[i] >= 0 else GREY,
                        "tokens": _tokens(proposal.draws, int(i)),
                    }
                    for i in np.flatnonzero((parted.prompt == prompt) & (parted.after == after)).tolist()[:COMPLETIONS]
                ],
            }
            for after in (False, True)
        ],
    }


def _tokens(draws: Draws, completion: int) -> list[dict[str, str]]:
    """The pieces of a completion, shaded by the bits at which S and R part there."""
    found = []
    for text, bits in zip(draws.tokens[completion][:MOST], draws.along[completion][0], strict=False):
        shade = f"{min(0.85, 0.2 + 0.35 * float(bits)):.2f}" if bits >= LEAST else ""
        found.append({"text": text, "shade": shade, "bits": f"{float(bits):.2f}"})
    return found


def _cut(text: str) -> str:
    return text if len(text) <= MOST else text[: MOST - 1] + "…"
