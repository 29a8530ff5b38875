"""Prompts with announcements and completions behind them, laid out for a model.

A long prompt is fed once: what follows it is laid out behind it as branches, which see the prompt and not each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.logits import BATCH_BYTES
from mixturelens.behaviour.prompts import Announcement, Prompts
from mixturelens.models.beginnings import BATCH_TOKENS, LONG
from mixturelens.spelling import Ids
from mixturelens.suite import Suite


@dataclass(frozen=True)
class Batch:
    """Some sequences in one forward, and which logits are read for which cell rows (the members).

    The last token of a row is never fed: nothing behind it is read. Sequences are padded on the right, which a causal
    model cannot see, so no mask is needed where no prompt is shared.
    """

    ids: Int[Tensor, "sequence pos"]
    members: Int[Tensor, " member"]
    """Rows of Cells."""
    sequence: Int[Tensor, " member"]
    at: Int[Tensor, "member step"]
    """Which of the logits that the model gives back are read."""
    targets: Int[Tensor, "member step"]
    announces: Bool[Tensor, "member step"]
    completes: Bool[Tensor, "member step"]
    row: Int[Tensor, "sequence pos"]
    """Which row of Cells a token belongs to; a shared prompt's, to the first of its rows."""
    place: Int[Tensor, "sequence pos"]
    """And where it stands there."""
    also: Mapping[str, Tensor]
    """What else the model is told: which logits are wanted, and who sees whom."""


@dataclass(frozen=True)
class _Fed:
    tokens: list[int]
    starts: dict[int, int]
    """Row -> where in the sequence that begins which follows its prompt."""


@dataclass(frozen=True)
class Cells:
    """One row per prompt x announcement (all wordings): prompt, announcement, and S's greedy completion behind it.

    Rows go prompt by prompt, and through `announcements` within a prompt.
    """

    prompts: Prompts
    completions: tuple[tuple[int, ...], ...]
    """Of each row, as far as it takes to show what it does: what follows that is style. All, where all of it is
    needed, with its end token, where S ends."""
    shown: tuple[bool, ...]
    """Of each row: whether that shows a behaviour or the right answer. Else it is style, too, that is told by it."""
    spans: tuple[dict[str, tuple[int, ...]], ...]
    """Of each prompt: name -> token positions."""
    grid: Grid
    seed: int = 0
    device: str = "cpu"
    shared: bool = False
    """Whether each prompt is fed once for all that may follow it."""

    @cached_property
    def digest(self) -> str:
        """Tells these cells from others: a hash of every row's tokens and of what each is."""
        said = (self.prompts.contexts, self.completions, self.announcements, self.shown)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    @property
    def suite(self) -> Suite:
        """The suite that the prompts are of."""
        return self.prompts.suite

    @property
    def announcements(self) -> tuple[Announcement, ...]:
        """Texts that put a policy in place: every wording of every policy."""
        return self.prompts.announcements

    @property
    def owner(self) -> tuple[int, ...]:
        """The policy of each announcement."""
        return tuple(a.policy for a in self.announcements)

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the known policies, in the suite's order."""
        return tuple(self.suite.policies)

    @property
    def cues(self) -> tuple[str, ...]:
        """The suite's cues, in its order."""
        return self.suite.cues

    @property
    def questions(self) -> tuple[str, ...]:
        """Ids of the questions, in the order of the prompts."""
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
        """Which policy the row puts in place, as a place in `policies`."""
        return np.tile([a.policy for a in self.announcements], len(self.prompts.rows))

    @cached_property
    def wording(self) -> Int[np.ndarray, " row"]:
        """Which of that policy's wordings puts it in place."""
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
        """Tokens of prompt, announcement and completion together."""
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
            shown=tuple(self.shown[i * count + a] for i in prompts for a in range(count)),
            spans=tuple(self.spans[i] for i in prompts),
            grid=grid_of(some, self.seed),
        )

    @cached_property
    def long(self) -> bool:
        """Whether it pays to read the logits behind prompts alone."""
        return min(map(len, self.prompts.contexts), default=0) >= LONG

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All rows, in batches of bounded memory."""
        return self._cut(self._fed(lambda row: self._tokens(row)[self.announced[row] : -1]), completes=True)

    @cached_property
    def announcement_batches(self) -> tuple[Batch, ...]:
        """Prompts and announcements alone; those that share all that is fed (of one token: the prompt) are fed once."""
        return self._cut(self._fed(lambda row: list(self.announcement(row)[:-1]), merge=True), completes=False)

    def _fed(self, behind: Callable[[int], list[int]], merge: bool = False) -> list[_Fed]:
        """Sequences of all rows, with what is fed behind a row's prompt; `merge`: of rows that feed the same, one."""
        found: dict[tuple[int, ...], _Fed] = {}
        for row in range(len(self)):
            prompt, more = self.prompts.contexts[self.prompt[row]], behind(row)
            own = () if self.shared else tuple(more) if merge else (row,)
            fed = found.setdefault((int(self.prompt[row]), *own), _Fed(list(prompt), {}))
            if fed.starts and not self.shared:
                fed.starts[row] = len(prompt)
                continue
            fed.starts[row] = len(fed.tokens)
            fed.tokens.extend(more)
        return list(found.values())

    def _cut(self, fed: list[_Fed], completes: bool) -> tuple[Batch, ...]:
        vocabulary = max(len(self.prompts.tokenizer), 1)  # type: ignore[arg-type]
        batches: list[Batch] = []
        batch: list[_Fed] = []
        first = 1 << 62
        for each in sorted(fed, key=lambda each: len(each.tokens)):
            first = min(first, int(self.announced[next(iter(each.starts))])) if self.long else 0
            rows = len(batch) + 1
            logits = rows * (len(each.tokens) - first + 1) * vocabulary * 8
            if batch and (rows * len(each.tokens) > BATCH_TOKENS or logits > BATCH_BYTES):
                batches.append(self._batch(batch, completes))
                batch, first = [], int(self.announced[next(iter(each.starts))]) if self.long else 0
            batch.append(each)
        return (*batches, self._batch(batch, completes))

    @torch.inference_mode(False)
    def _batch(self, batch: list[_Fed], completes: bool) -> Batch:
        rows = [row for fed in batch for row in fed.starts]
        sequence = [k for k, fed in enumerate(batch) for _ in fed.starts]
        start = np.array([at for fed in batch for at in fed.starts.values()])
        first = self.announced[rows]
        counts = (self.lengths if completes else self.placed)[rows] - first
        step = np.arange(int(counts.max(initial=1)))
        behind = np.minimum(step, counts[:, None] - 1)
        at = np.where(behind == 0, first[:, None] - 1, start[:, None] - 1 + behind)
        real = step < counts[:, None]
        announces = real & (first[:, None] + step < self.placed[rows][:, None])
        targets = self.ids.cpu().numpy()[np.array(rows)[:, None], first[:, None] + behind]
        ids = _padded([fed.tokens for fed in batch], self.device)
        row, branch, place = (np.zeros(ids.shape, dtype=int) for _ in range(3))
        for k, fed in enumerate(batch):
            owner = next(iter(fed.starts))
            row[k], place[k] = owner, np.arange(ids.shape[1])
            for number, (own, begin) in enumerate(sorted(fed.starts.items(), key=lambda item: item[1]), start=1):
                row[k, begin:], branch[k, begin:] = own if self.shared else owner, number if self.shared else 0
                place[k, begin:] = self.announced[own] + np.arange(ids.shape[1] - begin)
        place = np.minimum(place, self.ids.shape[1] - 1)  # of padding

        def on_device(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values), device=self.device)

        also: dict[str, Tensor] = {}
        if self.long:
            wanted, at = np.unique(at, return_inverse=True)
            also["logits_to_keep"] = on_device(wanted)
        if self.shared:
            also["position_ids"] = on_device(place)
            also["attention_mask"] = _seen(on_device(branch))
        return Batch(
            ids=ids,
            members=on_device(rows),
            sequence=on_device(sequence),
            at=on_device(at.reshape(real.shape)),
            targets=on_device(targets),
            announces=on_device(announces),
            completes=on_device(real & ~announces),
            row=on_device(row),
            place=on_device(place),
            also=also,
        )


def _padded(rows: Sequence[Sequence[int]], device: str) -> Int[Tensor, "row pos"]:
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
    return ids.to(device)


def _seen(branch: Int[Tensor, "sequence pos"]) -> Bool[Tensor, "sequence 1 pos pos"]:
    """Who sees whom: all that is before, but for other branches than the prompt (0)."""
    before = torch.ones(*branch.shape[1:], *branch.shape[1:], dtype=torch.bool, device=branch.device).tril()
    kin = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])  # [sequence, from, to]
    return (before & kin)[:, None]
