"""What S usually does once an announcement is in place, as far as it takes to show it: what grafts are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int

from mixturelens.behaviour.forced import Labelled, label_completions
from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.prompts import Prompts, behind_announcements, room_behind
from mixturelens.contrasts import span_positions
from mixturelens.grafting.cells import Cells
from mixturelens.grafting.readings import read
from mixturelens.models.beginnings import BATCH_TOKENS, LONG, keeps
from mixturelens.shown import Rule, wordings
from mixturelens.suite import Suite
from mixturelens.types import InputError

ROUNDING = 1e-4
"""Nats by which float32 may make two readings of the same differ."""


def make_cells(prompts: Prompts, before_model: Model, scorer: Scorer, seed: int = 0) -> Cells:
    """Prompts with every announcement put in place, and what S does there: its greedy completion (argmax, to an end
    token inclusive), up to where behaviour and rightness have shown.

    Raises InputError for a policy that is a rule without `force`: no text puts it in place.
    """
    suite, rows = prompts.suite, prompts.rows
    for name, shown in suite.policies.items():
        if not wordings(shown):
            raise InputError(f"policy {name!r} is a rule without `force`: give a text that puts it in place")
    contexts = behind_announcements(prompts)
    begins = [len(context) for context in prompts.contexts for _ in prompts.announcements]
    usual = greedy(before_model, contexts, room_behind(prompts), scorer, begins)
    completions, shown = _as_far_as_they_show(prompts, usual, scorer)
    cells = Cells(
        prompts=prompts,
        completions=completions,
        shown=shown,
        spans=tuple(span_positions(suite, row, prompts.tokenizer) if row.spans else {} for row in rows),
        grid=grid_of(prompts, seed),
        seed=seed,
        device=scorer.device,
    )
    shared = replace(cells, shared=True)
    return shared if cells.long and len(cells.announcements) > 1 and _alike(before_model, cells, shared) else cells


def beginnings(
    prompts: Prompts,
    bodies: Sequence[tuple[int, ...]],
    owner: Int[np.ndarray, " body"],
    scorer: Scorer,
    announced: Sequence[str] | None = None,
) -> list[Labelled]:
    """What each completion (`bodies`, token ids) is taken for after its first 0, 1, ... tokens, up to all of them.

    `owner` is the number of its prompt, and `announced` the text that stands before it, where that is not part of it.
    """
    lengths = [len(body) + 1 for body in bodies]
    parts = [list(body[:n]) for body in bodies for n in range(len(body) + 1)]
    before = None if announced is None else [text for text, n in zip(announced, lengths, strict=True) for _ in range(n)]
    labels = label_completions(scorer, prompts, Completions(np.repeat(owner, lengths), parts), before)
    ends = np.cumsum(lengths)
    return [labels.part(np.arange(end - n, end)) for end, n in zip(ends, lengths, strict=True)]


def enough_of(labels: np.ndarray) -> int:
    """The number of tokens from which on a beginning has the label that the whole has, given the labels of all
    beginnings.

    >>> enough_of(np.array([2, 2, 0, 1, 1, 1]))
    3
    """
    differ = np.flatnonzero(labels != labels[-1])
    return int(differ[-1]) + 1 if len(differ) else 0


def _as_far_as_they_show(
    prompts: Prompts, completions: Sequence[tuple[int, ...]], scorer: Scorer
) -> tuple[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
    """Completions behind every announcement, up to where behaviour and rightness have shown; and whether these do.

    Only its end shows that an exact answer is one, and nothing but all of it shows a wrong one.
    """
    suite, count = prompts.suite, len(prompts.announcements)
    bodies = [tokens[:-1] if tokens and tokens[-1] in scorer.ends else tokens for tokens in completions]
    texts = [wordings(shown) for shown in suite.policies.values()]
    announced = [texts[a.policy][a.wording] for a in prompts.announcements] * len(prompts.rows)
    owner = np.repeat(np.arange(len(prompts.rows)), count)
    found, shown = [], []
    for tokens, body, labels in zip(
        completions, bodies, beginnings(prompts, bodies, owner, scorer, announced), strict=True
    ):
        right, named = bool(labels.correct[-1]), bool(labels.behaviour[-1] < len(suite.behaviours or {}))
        enough = max(enough_of(labels.behaviour), enough_of(labels.correct))
        tells = (named or right) and enough > 0
        exact = right and suite.answer_match == "exact"
        found.append(body[:enough] if tells and not exact else tokens)
        shown.append(tells or suite.literal)
    return tuple(found), tuple(shown)


def _alike(model: Model, cells: Cells, shared: Cells) -> bool:
    """Whether a model reads a prompt with branches as it reads its rows one by one: some do not heed such masks."""
    one = [0]
    try:
        with torch.inference_mode():
            plain, once = read(model, cells, one), read(model, shared, one)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    room = ROUNDING * torch.finfo(getattr(model, "dtype", torch.float32)).eps / torch.finfo(torch.float32).eps
    return all(torch.allclose(x, y, atol=room) for x, y in ((plain.log_c, once.log_c), (plain.log_p, once.log_p)))


@torch.inference_mode()
def greedy(
    model: Model,
    contexts: Sequence[Sequence[int]],
    room: Sequence[int],
    scorer: Scorer,
    begins: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """The most likely next token again and again, at most `room[i]` of them, to an end token inclusive.

    Contexts of one length go together, so that nothing is padded; of those that share their first `begins[i]` tokens,
    where these are many, they are computed once.
    """
    found: list[tuple[int, ...]] = [()] * len(contexts)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, context in enumerate(contexts):
        begin = 0 if begins is None or not LONG <= begins[i] < len(context) else begins[i]
        groups.setdefault((len(context), begin if keeps(model) else 0), []).append(i)
    ends = torch.tensor(scorer.ends, device=scorer.device)
    for (length, begin), group in groups.items():
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), size):
            some = group[start : start + size]
            ids = torch.tensor([list(contexts[i]) for i in some], device=scorer.device)
            ended = torch.zeros(len(some), dtype=torch.bool, device=scorer.device)
            past, steps = None, []
            if begin:
                once, copies = ids[:, :begin].unique(dim=0, return_inverse=True)
                past = model(input_ids=once, use_cache=True, logits_to_keep=1).past_key_values
                past.batch_select_indices(copies)
                ids = ids[:, begin:]
            for _ in range(max(room[i] for i in some)):
                output = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, chosen = output.past_key_values, output.logits[:, -1].argmax(-1)
                steps.append(torch.where(ended, -1, chosen))
                ended = ended | torch.isin(chosen, ends)
                if bool(ended.all()):
                    break
                ids = chosen[:, None]
            for i, tokens in zip(some, torch.stack(steps, 1).tolist(), strict=True):
                found[i] = tuple(token for token in tokens[: room[i]] if token >= 0)
    return tuple(found)


def method_of(suite: Suite) -> Literal["literal", "forced texts"]:
    """How grafts weigh policies: `literal`, or `forced texts` where any policy is a rule."""
    return "forced texts" if any(isinstance(shown, Rule) for shown in suite.policies.values()) else "literal"
