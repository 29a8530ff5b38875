"""What grafts are judged by: log-probabilities of announcements, and of what S usually does once one is in place.

One forward over prompt + announcement + usual completion gives both, and stays differentiable in the weights. A long
prompt is fed once: what follows it is laid out behind it as branches, which see the prompt and not each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.behaviour.forced import Labelled, label_completions
from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.logits import BATCH_BYTES
from mixturelens.behaviour.prompts import Announcement, Prompts, behind_announcements, room_behind
from mixturelens.contrasts import span_positions
from mixturelens.models.beginnings import BATCH_TOKENS, LONG, keeps
from mixturelens.spelling import Ids
from mixturelens.suite import Rule, Suite, wordings
from mixturelens.types import InputError

ROUNDING = 1e-4
"""Nats by which float32 may make two readings of the same differ."""


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


@dataclass(frozen=True)
class Readings:
    """What one model gives to announcements and completions; float64, differentiable in its weights."""

    announced: Float[Tensor, "prompt announcement"]
    """Log-probability of each announcement."""
    completed: Float[Tensor, "prompt announcement"]
    """Log-probability of the usual completion once it is in place."""
    owner: tuple[int, ...] | None = None
    """The policy of each announcement; None: each policy has one."""

    def part(self, prompts: Sequence[int]) -> Readings:
        """The readings of some of the prompts, by their number."""
        return Readings(self.announced[list(prompts)], self.completed[list(prompts)], self.owner)

    @property
    def log_c(self) -> Float[Tensor, "prompt policy"]:
        """Log-probability of announcing a policy, in any of its wordings."""
        return log_weights(self.announced, self.owner)

    @property
    def log_p(self) -> Float[Tensor, "prompt policy"]:
        """Log-probability of the usual completion once the policy is in place, mean over its wordings."""
        return torch.stack(
            [self.completed[:, columns].mean(1) for columns in wordings_of(self.owner, self.completed)], 1
        )

    @property
    def array(self) -> Float[np.ndarray, "two prompt announcement"]:
        """Announcements, and completions behind them, as they are kept on disk."""
        return torch.stack([self.announced, self.completed]).detach().cpu().numpy()


def readings_of(array: Float[np.ndarray, "two prompt announcement"], cells: Cells) -> Readings:
    """Readings of these cells, from the array that they were kept as."""
    announced, completed = torch.from_numpy(array).to(cells.device)
    return Readings(announced, completed, cells.owner)


def wordings_of(owner: tuple[int, ...] | None, table: Float[Tensor, "prompt announcement"]) -> list[list[int]]:
    """For each policy: the columns of a table that belong to its announcements. `owner` as in `log_weights`."""
    known = range(table.shape[1]) if owner is None else owner
    return [[k for k, m in enumerate(known) if m == policy] for policy in range(max(known) + 1)]


def log_weights(
    announced: Float[Tensor, "prompt announcement"], owner: tuple[int, ...] | None
) -> Float[Tensor, "prompt policy"]:
    """Log-probability that each policy is announced, in any of its wordings, from that of each announcement.

    `owner` names the policy of each column; None says that each announcement is a policy of its own.
    """
    return torch.stack([announced[:, columns].logsumexp(1) for columns in wordings_of(owner, announced)], 1)


def make_cells(
    prompts: Prompts,
    before_model: Model,
    scorer: Scorer,
    seed: int = 0,
) -> Cells:
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


def _seen(branch: Int[Tensor, "sequence pos"]) -> Bool[Tensor, "sequence 1 pos pos"]:
    """Who sees whom: all that is before, but for other branches than the prompt (0)."""
    before = torch.ones(*branch.shape[1:], *branch.shape[1:], dtype=torch.bool, device=branch.device).tril()
    kin = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])  # [sequence, from, to]
    return (before & kin)[:, None]


def method_of(suite: Suite) -> Literal["literal", "forced texts"]:
    """How grafts weigh policies: `literal`, or `forced texts` where any policy is a rule."""
    return "forced texts" if any(isinstance(shown, Rule) for shown in suite.policies.values()) else "literal"


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


def read(
    model: Model, cells: Cells, rows: Sequence[int] | None = None, told: Callable[[Batch], None] | None = None
) -> Readings:
    """What a model announces and completes on every row of the cells, from one forward (in batches of bounded memory)
    of anything called like a Hugging Face model.

    `rows` are numbers of prompts; None: all. `told` hears of every batch before the model does.
    Works under torch.func.functional_call, forward-mode AD and autograd.
    """
    if rows is not None:
        cells = cells.part(rows)
    announced, completed = _scores(model, cells, cells.batches, told)
    shape = (len(cells.prompts.rows), len(cells.announcements))
    return Readings(announced.view(shape), completed.view(shape), cells.owner)


def _padded(rows: Sequence[Sequence[int]], device: str) -> Int[Tensor, "row pos"]:
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
    return ids.to(device)


def read_weights(model: Model, cells: Cells) -> Float[Tensor, "prompt policy"]:
    """The policies' log-weights alone (`Readings.log_c`), at a fraction of the cost: completions are not fed."""
    announced, _ = _scores(model, cells, cells.announcement_batches)
    return log_weights(announced.view(len(cells.prompts.rows), len(cells.announcements)), cells.owner)


def _scores(
    model: Model, cells: Cells, batches: Sequence[Batch], told: Callable[[Batch], None] | None = None
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Log-probability of the announcement and of the completion of every row."""
    announced, completed = [], []
    for batch in batches:
        if told is not None:
            told(batch)
        logits = model(input_ids=batch.ids, use_cache=False, **batch.also).logits
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
