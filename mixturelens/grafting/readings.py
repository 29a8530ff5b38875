"""What grafts are judged by: log-probabilities of announcements, and of what S usually does once one is in place.

One forward over prompt + announcement + usual completion gives both, and stays differentiable in the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.behaviour.likelihood import BATCH_BYTES, BATCH_TOKENS, Model, Scorer
from mixturelens.behaviour.prompts import Announcement, Prompts, behind_announcements, prepare, room_behind
from mixturelens.behaviour.record import Grid, grid_of
from mixturelens.contrasts import span_positions
from mixturelens.spelling import Ids
from mixturelens.suite import PromptRow, Rule, Suite, wordings
from mixturelens.types import InputError


@dataclass(frozen=True)
class Batch:
    """Some sequences in one forward, and which logits are read for which cell rows (the members).

    The last token of a sequence is never fed: nothing behind it is read. Rows are padded on the right, which a causal
    model cannot see, so no mask is needed.
    """

    ids: Int[Tensor, "sequence pos"]
    members: Int[Tensor, " member"]
    """Rows of Cells; where `sequences` is None there is one member a sequence, in the same order."""
    sequence: Int[Tensor, " member"]
    at: Int[Tensor, "member step"]
    """Positions whose logits are read."""
    targets: Int[Tensor, "member step"]
    announces: Bool[Tensor, "member step"]
    completes: Bool[Tensor, "member step"]


@dataclass(frozen=True)
class Cells:
    """One row per prompt x announcement (all wordings): prompt, announcement, and S's greedy completion behind it.

    Rows go prompt by prompt, and through `announcements` within a prompt.
    """

    prompts: Prompts
    completions: tuple[tuple[int, ...], ...]
    """Of each row; with its end token, where S ends."""
    spans: tuple[dict[str, tuple[int, ...]], ...]
    """Of each prompt: name -> token positions."""
    grid: Grid
    seed: int = 0
    device: str = "cpu"

    @property
    def suite(self) -> Suite:
        return self.prompts.suite

    @property
    def announcements(self) -> tuple[Announcement, ...]:
        return self.prompts.announcements

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self.suite.policies)

    @property
    def cues(self) -> tuple[str, ...]:
        return self.suite.cues

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.id for row in self.prompts.rows))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.completions)

    @cached_property
    def prompt(self) -> Int[np.ndarray, " row"]:
        """Which prompt a row belongs to."""
        return np.repeat(np.arange(len(self.prompts.rows)), len(self.announcements))

    @cached_property
    def policy(self) -> Int[np.ndarray, " row"]:
        return np.tile([a.policy for a in self.announcements], len(self.prompts.rows))

    @cached_property
    def wording(self) -> Int[np.ndarray, " row"]:
        return np.tile([a.wording for a in self.announcements], len(self.prompts.rows))

    @cached_property
    def announced(self) -> Int[np.ndarray, " row"]:
        """Where the announcement begins: the length of the prompt."""
        return np.array([len(self.prompts.contexts[i]) for i in self.prompt])

    @cached_property
    def placed(self) -> Int[np.ndarray, " row"]:
        """Where the announcement ends and the completion begins."""
        return self.announced + np.array([len(self.announcement(row)) for row in range(len(self))])

    @cached_property
    def lengths(self) -> Int[np.ndarray, " row"]:
        return self.placed + np.array([len(c) for c in self.completions])

    @cached_property
    @torch.inference_mode(False)  # what is kept may meet autograd later
    def ids(self) -> Int[Tensor, "row pos"]:
        """Prompt, announcement and completion, padded on the right."""
        return _padded([self._tokens(row) for row in range(len(self))], self.device)

    def announcement(self, row: int) -> Ids:
        """Token ids of what puts the row's policy in place."""
        return self.prompts.placed[row // len(self.announcements)][row % len(self.announcements)].ids

    def _tokens(self, row: int) -> list[int]:
        return [*self.prompts.contexts[self.prompt[row]], *self.announcement(row), *self.completions[row]]

    def part(self, prompts: Sequence[int]) -> Cells:
        """Some of the prompts, with a grid of their own."""
        count = len(self.announcements)
        some = self.prompts.part(prompts)
        return replace(
            self,
            prompts=some,
            completions=tuple(self.completions[i * count + a] for i in prompts for a in range(count)),
            spans=tuple(self.spans[i] for i in prompts),
            grid=grid_of(some, self.seed),
        )

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All rows, in batches of bounded memory."""
        rows = range(len(self))
        return self._cut([[row] for row in rows], [self._tokens(row)[:-1] for row in rows], completes=True)

    @cached_property
    def announcement_batches(self) -> tuple[Batch, ...]:
        """Prompts and announcements alone; those that share all that is fed (of one token: the prompt) are fed once."""
        shared: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for row in range(len(self)):
            key = (int(self.prompt[row]), self.announcement(row)[:-1])
            shared.setdefault(key, []).append(row)
        fed = [[*self.prompts.contexts[i], *beginning] for i, beginning in shared]
        return self._cut(list(shared.values()), fed, completes=False)

    def _cut(self, members: list[list[int]], fed: list[list[int]], completes: bool) -> tuple[Batch, ...]:
        vocabulary = max(len(self.prompts.tokenizer), 1)  # type: ignore[arg-type]
        order = sorted(range(len(fed)), key=lambda i: len(fed[i]))
        batches: list[Batch] = []
        batch: list[int] = []
        for i in order:
            tokens = (len(batch) + 1) * len(fed[i])
            if batch and (tokens > BATCH_TOKENS or tokens * vocabulary * 8 > BATCH_BYTES):
                batches.append(self._batch(batch, members, fed, completes))
                batch = []
            batch.append(i)
        return (*batches, self._batch(batch, members, fed, completes))

    @torch.inference_mode(False)
    def _batch(self, batch: list[int], members: list[list[int]], fed: list[list[int]], completes: bool) -> Batch:
        rows = [row for i in batch for row in members[i]]
        sequence = [k for k, i in enumerate(batch) for _ in members[i]]
        first = self.announced[rows]
        counts = (self.lengths if completes else self.placed)[rows] - first
        step = np.arange(int(counts.max(initial=1)))
        at = first[:, None] - 1 + np.minimum(step, counts[:, None] - 1)
        real = step < counts[:, None]
        announces = real & (first[:, None] + step < self.placed[rows][:, None])
        targets = self.ids.cpu().numpy()[np.array(rows)[:, None], at + 1]

        def on_device(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values), device=self.device)

        return Batch(
            ids=_padded([fed[i] for i in batch], self.device),
            members=on_device(rows),
            sequence=on_device(sequence),
            at=on_device(at),
            targets=on_device(targets),
            announces=on_device(announces),
            completes=on_device(real & ~announces),
        )


@dataclass(frozen=True)
class Readings:
    """What one model gives to announcements and completions; float64, differentiable in its weights."""

    log_c: Float[Tensor, "prompt policy"]
    """Log-probability of announcing a policy, in any of its wordings."""
    log_p: Float[Tensor, "prompt policy"]
    """Log-probability of the usual completion once the policy is in place, mean over its wordings."""

    def part(self, prompts: Sequence[int]) -> Readings:
        """Of some of the prompts."""
        return Readings(self.log_c[list(prompts)], self.log_p[list(prompts)])


def make_cells(
    suite: Suite,
    rows: Sequence[PromptRow],
    tokenizer: Any,
    before_model: Model,
    scorer: Scorer,
    seed: int = 0,
) -> Cells:
    """Prompts with every announcement put in place and S's greedy completion (argmax, to an end token inclusive).

    Raises InputError for a policy that is a rule without `force`: no text puts it in place.
    """
    for name, shown in suite.policies.items():
        if not wordings(shown):
            raise InputError(f"policy {name!r} is a rule without `force`: give a text that puts it in place")
    prompts = prepare(suite, rows, tokenizer)
    return Cells(
        prompts=prompts,
        completions=greedy(before_model, behind_announcements(prompts), room_behind(prompts), scorer),
        spans=tuple(span_positions(suite, row, tokenizer) if row.spans else {} for row in rows),
        grid=grid_of(prompts, seed),
        seed=seed,
        device=scorer.device,
    )


def method_of(suite: Suite) -> Literal["literal", "forced texts"]:
    """`literal`, or `forced texts` where any policy is a rule."""
    return "forced texts" if any(isinstance(shown, Rule) for shown in suite.policies.values()) else "literal"


@torch.inference_mode()
def greedy(
    model: Model, contexts: Sequence[Sequence[int]], room: Sequence[int], scorer: Scorer
) -> tuple[tuple[int, ...], ...]:
    """The most likely next token again and again, at most `room[i]` of them, to an end token inclusive.

    Contexts of one length go together, so that nothing is padded.
    """
    found: list[tuple[int, ...]] = [()] * len(contexts)
    groups: dict[int, list[int]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(len(context), []).append(i)
    ends = torch.tensor(scorer.ends, device=scorer.device)
    for length, group in groups.items():
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), size):
            some = group[start : start + size]
            ids = torch.tensor([list(contexts[i]) for i in some], device=scorer.device)
            ended = torch.zeros(len(some), dtype=torch.bool, device=scorer.device)
            past, steps = None, []
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


def read(
    model: Model, cells: Cells, rows: Sequence[int] | None = None, told: Callable[[Batch], None] | None = None
) -> Readings:
    """One forward (in batches of bounded memory) of anything called like a Hugging Face model.

    `rows` are numbers of prompts; None: all. `told` hears of every batch before the model does.
    Works under torch.func.functional_call, forward-mode AD and autograd.
    """
    if rows is not None:
        cells = cells.part(rows)
    announced, completed = _scores(model, cells, cells.batches, told)
    policy = [a.policy for a in cells.announcements]
    shape = (len(cells.prompts.rows), len(policy))
    log_p = [completed.view(shape)[:, _columns(policy, m)].mean(1) for m in range(len(cells.policies))]
    return Readings(_log_weights(announced, cells), torch.stack(log_p, 1))


def _padded(rows: Sequence[Sequence[int]], device: str) -> Int[Tensor, "row pos"]:
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
    return ids.to(device)


def read_weights(model: Model, cells: Cells) -> Float[Tensor, "prompt policy"]:
    """`log_c` alone, at a fraction of the cost: completions are not fed."""
    return _log_weights(_scores(model, cells, cells.announcement_batches)[0], cells)


def _log_weights(announced: Float[Tensor, " row"], cells: Cells) -> Float[Tensor, "prompt policy"]:
    policy = [a.policy for a in cells.announcements]
    table = announced.view(len(cells.prompts.rows), len(policy))
    return torch.stack([table[:, _columns(policy, m)].logsumexp(1) for m in range(len(cells.policies))], 1)


def _columns(policy: Sequence[int], m: int) -> list[int]:
    return [k for k, owner in enumerate(policy) if owner == m]


def _scores(
    model: Model, cells: Cells, batches: Sequence[Batch], told: Callable[[Batch], None] | None = None
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Log-probability of the announcement and of the completion of every row."""
    announced, completed = [], []
    for batch in batches:
        if told is not None:
            told(batch)
        logits = model(input_ids=batch.ids, use_cache=False).logits
        kept = logits[batch.sequence[:, None], batch.at].double().log_softmax(-1)
        steps = kept.gather(-1, batch.targets[..., None])[..., 0]
        announced.append(torch.where(batch.announces, steps, 0.0).sum(1))
        completed.append(torch.where(batch.completes, steps, 0.0).sum(1))
    back = torch.cat([batch.members for batch in batches]).argsort()
    return torch.cat(announced)[back], torch.cat(completed)[back]


def metrics(
    readings: Readings, cells: Cells, policies: tuple[str, str]
) -> tuple[Float[Tensor, "question metric"], tuple[str, ...]]:
    """Every metric on every question, NaN where a question lacks the cue, and their names.

    `routing@A`: log c_p / c_o under cue A, with (p, o) = `policies`; `a@A`: log-probability of what policy a usually
    does there. Averages over questions are means over that cue's prompts.
    """
    p, o = (cells.policies.index(name) for name in policies)
    values = torch.cat([(readings.log_c[:, p] - readings.log_c[:, o])[:, None], readings.log_p], 1)
    index = torch.as_tensor(cells.grid.index, device=values.device)  # [question, cue]
    table = torch.where((index >= 0)[..., None], values[index.clamp(min=0)], torch.nan)
    return table.transpose(1, 2).flatten(1), metric_names(cells)


def metric_names(cells: Cells) -> tuple[str, ...]:
    """`routing@A`, `routing@B`, ..., `a@A`, `a@B`, ..., in the order of the columns of `metrics`."""
    return tuple(f"{what}@{cue}" for what in ("routing", *cells.policies) for cue in cells.cues)
