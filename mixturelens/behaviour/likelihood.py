"""Exact probabilities by teacher forcing, and completions drawn at temperature 1. The only hot path of behaviour.

A *context* is a prompt's token ids, perhaps with an announcement behind it. Models are Hugging Face causal language
models, or anything that is called like one. Logits are taken to float64 before any logarithm, so that the probability
of everything *but* a literal is right even when the literal has probability 1 - 1e-9.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Model = Callable[..., Any]
Ids = Sequence[int]

END = -1
"""In a literal: any of the model's end tokens."""

LONG = 32
"""Tokens from which it pays to keep a beginning that rows share; those of small organisms are recomputed."""
KEPT_BYTES = 2 << 30
"""Bound on the keys and values that are kept."""
BATCH_BYTES = 256 << 20
"""Bound on the float64 logits of one batch."""
USUAL_COMPLETION = 64
"""Tokens of a completion that are reckoned with when batches are cut."""
BATCH_TOKENS = 4096
"""Bound on the tokens of one batch: larger ones fall out of the cache and are slower on a CPU."""


@dataclass(frozen=True)
class Completions:
    """Completions of many contexts, flat: `context[i]` is the row of the context that completion i belongs to.

    Tokens include the end token, if it was reached.
    """

    context: Int[np.ndarray, " completion"]
    tokens: list[list[int]]


def _batches(lengths: Sequence[int], starts: Sequence[int], vocabulary: int, models: int = 1) -> Iterator[list[int]]:
    """Rows sorted by length, cut so that the logits of a batch stay within the memory bound."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], starts[i]))
    batch: list[int] = []
    widest, first = 0, 1 << 62
    for i in order:
        widest_then, first_then = max(widest, lengths[i]), min(first, starts[i])
        rows = len(batch) + 1
        logits = rows * (widest_then - first_then + 1) * vocabulary * 8 * models
        if batch and (logits > BATCH_BYTES or rows * widest_then > BATCH_TOKENS):
            yield batch
            batch, widest_then, first_then = [], lengths[i], starts[i]
        batch.append(i)
        widest, first = widest_then, first_then
    if batch:
        yield batch


Kept = dict[tuple[int, tuple[tuple[int, ...], ...]], tuple[Any, Tensor]]
"""(model, beginnings of a batch) -> their keys and values, and the logits of the next token."""
Forced = Iterator[tuple[list[int], list[Float[Tensor, "row step vocabulary"]], Int[Tensor, "row step"]]]


def _forced_logprobs(
    models: Sequence[Model],
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    vocabulary: int,
    device: str,
    kept: Kept | None = None,
) -> Forced:
    """Log-probabilities at every step of each continuation, batch by batch, for every model.

    Yields (rows, one [row, step, vocabulary] float64 tensor a model, targets with -100 behind the end). Where rows
    share long beginnings, those are computed once, and their keys and values kept for what follows.
    """
    roots = _roots(contexts)
    shared = sum(len(root) for root in roots)
    behind = sum(len(contexts[i]) - len(root) + len(continuations[i]) for root, rows in roots.items() for i in rows)
    whole = sum(len(context) + len(c) for context, c in zip(contexts, continuations, strict=True))
    long = min(map(len, roots), default=0) >= LONG
    # a second call must pay, unless what it begins with is kept for others
    pays = (2 if kept is None else 1) * (shared + behind) < whole
    if long and pays and all(map(keeps, models)):
        kept = {} if kept is None else kept
        yield from _behind_roots(models, roots, contexts, continuations, vocabulary, device, kept)
    else:
        yield from _whole_rows(models, contexts, continuations, vocabulary, device)


def keeps(model: Model) -> bool:
    """Whether a model gives back keys and values, to go on from for several rows: a plain one, or a side of a base."""
    plain = isinstance(model, torch.nn.Module) or hasattr(model, "under")
    # recurrent models keep a state instead, and some keep nothing
    return plain and hasattr(getattr(model, "config", None), "use_cache") and not getattr(model, "_is_stateful", False)


def _roots(contexts: Sequence[Ids]) -> dict[tuple[int, ...], list[int]]:
    """Beginnings that contexts share -> the rows that begin so.

    A prompt is the beginning of itself with its announcements. Of two prompts that are alike for long it is not, where
    what they differ in would be read once a row instead of once.
    """
    roots: dict[tuple[int, ...], list[int]] = {}
    root: tuple[int, ...] = ()
    rows: list[int] = []
    for i in sorted(range(len(contexts)), key=lambda i: tuple(contexts[i])):
        context = tuple(contexts[i])
        common = next((k for k, (x, y) in enumerate(zip(root, context, strict=False)) if x != y), None)
        common = min(len(root), len(context)) if common is None else common
        if rows and len(rows) * (len(root) - common) + len(context) - common < common:
            root = root[:common]
        else:
            if rows:
                roots[root] = rows
            root, rows = context, []
        rows.append(i)
    if rows:
        roots[root] = rows
    return roots


def _behind_roots(
    models: Sequence[Model],
    roots: dict[tuple[int, ...], list[int]],
    contexts: Sequence[Ids],
    continuations: Sequence[Ids],
    vocabulary: int,
    device: str,
    kept: Kept,
) -> Forced:
    order = sorted(roots, key=len)
    for some in _batches([len(root) for root in order], [len(root) for root in order], vocabulary, len(models)):
        ids, mask = _padded_left([order[k] for k in some], device)
        padded = bool((mask == 0).any())
        length = mask.sum(1)
        outputs = []
        for model in models:
            key = id(model), tuple(order[k] for k in some)
            output = kept.get(key) or _begun(model, ids, mask if padded else None, (mask.cumsum(1) - 1).clamp(min=0))
            if sum(map(_bytes, kept.values())) + _bytes(output) <= KEPT_BYTES:
                kept[key] = output
            outputs.append(output)
        owned = [(k, i) for k, root in enumerate(some) for i in roots[order[root]]]
        after = [[*contexts[i], *continuations[i]][len(order[some[k]]) :] for k, i in owned]
        # keys and values are copied for every row: beginnings count as tokens, though not as logits
        begins = [len(order[some[k]]) for k, _ in owned]
        sizes = [begin + max(1, len(tokens)) for begin, tokens in zip(begins, after, strict=True)]
        for part in _batches(sizes, begins, vocabulary, len(models)):
            owner = torch.tensor([owned[n][0] for n in part], device=device)
            width = max(len(after[n]) for n in part) - 1  # the last token is never fed
            steps = max(1, *(len(continuations[owned[n][1]]) for n in part))
            targets = torch.full((len(part), steps), -100, dtype=torch.long)
            at = torch.zeros(len(part), steps, dtype=torch.long)
            fed = torch.zeros(len(part), max(width, 0), dtype=torch.long)
            for row, n in enumerate(part):
                k, i = owned[n]
                count, first = len(continuations[i]), len(contexts[i]) - len(order[some[k]])
                targets[row, :count] = torch.tensor(list(continuations[i]))
                at[row, :count] = first + torch.arange(count)
                tokens = [max(token, 0) for token in after[n][:width]]
                fed[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            fed, index = fed.to(device), at.to(device)[:, :, None]
            positions = length[owner][:, None] + torch.arange(max(width, 0), device=device)
            found = []
            with torch.inference_mode():
                for model, (past, last) in zip(models, outputs, strict=True):
                    logits = last[owner]
                    if width > 0:
                        mine = copy.deepcopy(past)
                        mine.batch_select_indices(owner)
                        seen = torch.cat([mask[owner], torch.ones_like(fed)], 1) if padded else None
                        more = model(
                            input_ids=fed,
                            attention_mask=seen,
                            position_ids=positions,
                            past_key_values=mine,
                            use_cache=True,
                        ).logits
                        logits = torch.cat([logits, more], 1)
                    steps_of = logits.gather(1, index.expand(-1, -1, logits.shape[-1]))
                    found.append(steps_of.double().log_softmax(-1))
            yield [owned[n][1] for n in part], found, targets.to(device)


@torch.inference_mode()
def _begun(model: Model, ids: Tensor, mask: Tensor | None, positions: Tensor) -> tuple[Any, Tensor]:
    """Keys and values behind beginnings, and the logits of the next token; rows of one length need no mask."""
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1:]


def _bytes(kept: tuple[Any, Tensor]) -> int:
    return sum(t.nbytes for layer in kept[0].layers for t in (layer.keys, layer.values) if t is not None)


def _padded_left(rows: Sequence[Ids], device: str) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids, padded so that the last is in the last column, and which of them are real."""
    width = max(len(row) for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for k, row in enumerate(rows):
        ids[k, width - len(row) :] = torch.tensor(list(row))
        mask[k, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _whole_rows(
    models: Sequence[Model], contexts: Sequence[Ids], continuations: Sequence[Ids], vocabulary: int, device: str
) -> Forced:
    """Rows padded on the right: a causal model cannot see the padding, so no mask and no position ids are needed."""
    starts = [len(context) for context in contexts]
    lengths = [start + len(c) for start, c in zip(starts, continuations, strict=True)]
    for rows in _batches(lengths, starts, vocabulary, len(models)):
        width = max(lengths[i] for i in rows)
        first = min(starts[i] for i in rows) - 1
        steps = max(1, *(len(continuations[i]) for i in rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full((len(rows), steps), -100, dtype=torch.long)
        at = torch.zeros(len(rows), steps, dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, : lengths[i]] = torch.tensor([*contexts[i], *(max(t, 0) for t in continuations[i])])
            count = len(continuations[i])
            targets[row, :count] = torch.tensor(list(continuations[i]))
            at[row, :count] = torch.arange(count) + starts[i] - 1 - first
        keep = torch.arange(first, width - 1) if width - 1 > first else torch.arange(first, width)
        found = []
        with torch.inference_mode():  # not around the yield: it would hold for the caller, too
            for model in models:
                logits = model(input_ids=ids.to(device), logits_to_keep=keep.to(device), use_cache=False).logits
                index = at.to(device)[:, :, None].expand(-1, -1, logits.shape[-1])
                found.append(logits.double().gather(1, index).log_softmax(-1))
        yield rows, found, targets.to(device)


def _ended(logprobs: Float[Tensor, "*batch vocabulary"], ends: Ids) -> Float[Tensor, "*batch"]:
    """Log-probability of any end token."""
    return logprobs[..., list(ends)].logsumexp(-1) if len(ends) else torch.full_like(logprobs[..., 0], -torch.inf)


def _target_logprobs(
    logprobs: Float[Tensor, "row step vocabulary"], targets: Int[Tensor, "row step"], ends: Ids
) -> Float[Tensor, "row step"]:
    """Log-probability of each target; END gathers every end token; 0 behind the end."""
    plain = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == END, _ended(logprobs, ends), torch.where(targets < 0, 0.0, plain))


_Node = tuple[Float[Tensor, " vocabulary"], Float[Tensor, ""], tuple[int, ...]]
"""Of a tree of literals: log-probabilities of the tokens that leave it here, log-probability of being here, where."""


class Scorer:
    """Probabilities and samples of one tokenizer's models: bundles what every call needs and nothing else."""

    def __init__(self, ends: Ids, vocabulary: int, device: str = "cpu") -> None:
        self.ends = tuple(ends)
        self.vocabulary = vocabulary
        self.device = device
        self._kept: Kept | None = None

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """While this lasts no model changes, so that each prompt goes through each of them once."""
        outer, self._kept = self._kept, {} if self._kept is None else self._kept
        try:
            yield
        finally:
            self._kept = outer

    def literals(
        self, model: Model, contexts: Sequence[Ids], literals: Sequence[Sequence[Ids]]
    ) -> tuple[list[Float[np.ndarray, " literal"]], Float[np.ndarray, " context"]]:
        """Log-probability that a completion begins with each literal, and that it begins with none of them.

        `literals[i]` are those of context i, none the beginning of another. The second result is the exact complement,
        from the tokens at which a completion leaves the tree of literals.
        """
        logprob = [np.zeros(len(group)) for group in literals]
        leaving: list[list[float]] = [[] for _ in contexts]
        for i, k, whole, nodes in self._paths(model, contexts, literals):
            logprob[i][k] = whole
            leaving[i] += [float(reached + left.logsumexp(-1)) for left, reached, _ in nodes]
        # where there are no literals, a completion always begins with none of them
        escaped = [np.logaddexp.reduce(v) if group else 0.0 for v, group in zip(leaving, literals, strict=True)]
        return logprob, np.array(escaped)

    def _paths(
        self, model: Model, contexts: Sequence[Ids], literals: Sequence[Sequence[Ids]]
    ) -> Iterator[tuple[int, int, float, list[_Node]]]:
        """(context, literal, log-probability of the literal, the nodes of the tree that it is the first to pass)."""
        branches = [self._branches(group) for group in literals]
        # one row a path through the tree is enough to visit every node
        paths = [(i, k) for i, group in enumerate(literals) for k in range(len(group))]
        for rows, (found,), targets in _forced_logprobs(
            [model],
            [contexts[i] for i, _ in paths],
            [tuple(literals[i][k]) for i, k in paths],
            self.vocabulary,
            self.device,
            self._kept,
        ):
            steps = _target_logprobs(found, targets, self.ends)
            reached = steps.cumsum(1) - steps
            for row, path in enumerate(rows):
                i, k = paths[path]
                nodes = []
                for step in range(len(literals[i][k])):
                    node = tuple(literals[i][k][:step])
                    owner, children = branches[i][node]
                    if owner == k:
                        left = found[row, step].index_fill(0, torch.tensor(children, device=found.device), -torch.inf)
                        nodes.append((left, reached[row, step], node))
                yield i, k, float(steps[row].sum()), nodes

    def _branches(self, literals: Sequence[Ids]) -> dict[tuple[int, ...], tuple[int, list[int]]]:
        """Node of the tree -> (the first literal through it, the tokens that stay in the tree)."""
        nodes: dict[tuple[int, ...], tuple[int, dict[int, None]]] = {}
        for k, literal in enumerate(literals):
            for step, token in enumerate(literal):
                _, taken = nodes.setdefault(tuple(literal[:step]), (k, {}))
                taken.update(dict.fromkeys(self.ends if token == END else (token,)))
        return {node: (first, list(taken)) for node, (first, taken) in nodes.items()}

    def escapes(
        self, model: Model, contexts: Sequence[Ids], literals: Sequence[Sequence[Ids]], seed: int
    ) -> list[list[int]]:
        """For each context, the beginning of a completion that is none of the literals, drawn given that it is none.

        It ends with the token at which the completion leaves the tree of literals (Gumbel-max over all such tokens).
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        best = [(-np.inf, [0])] * len(contexts)
        for i, _, _, nodes in self._paths(model, contexts, literals):
            for found, reached, node in nodes:
                scores = reached + found
                noise = -torch.empty_like(scores).exponential_(generator=generator).log()
                value, token = (scores + noise).max(0)
                if float(value) > best[i][0]:
                    best[i] = (float(value), [*node, int(token)])
        return [tokens for _, tokens in best]

    def sequences(
        self, model: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
    ) -> Float[np.ndarray, " continuation"]:
        """Log-probability of each whole continuation (END: any end token)."""
        result = np.zeros(len(contexts))
        for members, (scores,), _ in self._along([model], contexts, continuations):
            result[members] = scores.cpu().numpy()
        return result

    def _along(
        self, models: Sequence[Model], contexts: Sequence[Ids], continuations: Sequence[Ids]
    ) -> Iterator[tuple[list[int], list[Float[Tensor, " member"]], Float[Tensor, " member"]]]:
        """(continuations, log-probability of each under each model, token KL of the first model to the second).

        The last token of a continuation is never fed to a model, so those that differ in it alone share a row.
        """
        inputs: dict[tuple[tuple[int, ...], tuple[int, ...], int], list[int]] = {}
        for i, (context, c) in enumerate(zip(contexts, continuations, strict=True)):
            inputs.setdefault((tuple(context), tuple(c[:-1]), len(c)), []).append(i)
        shared = list(inputs.values())
        for rows, found, targets in _forced_logprobs(
            models,
            [contexts[same[0]] for same in shared],
            [continuations[same[0]] for same in shared],
            self.vocabulary,
            self.device,
            self._kept,
        ):
            members = [i for row in rows for i in shared[row]]
            owner = torch.tensor([k for k, row in enumerate(rows) for _ in shared[row]], device=self.device)
            # one last token for each member, while all before it is the row's
            ending = [continuations[i][-1] if len(continuations[i]) else -100 for i in members]
            target = torch.tensor(ending, device=self.device)
            last = (targets != -100).sum(1).clamp(min=1) - 1
            heads = targets.scatter(1, last[:, None], -100)
            scores = []
            for logprobs in found:
                final = logprobs[torch.arange(len(rows), device=self.device), last]
                plain = torch.where(target < 0, 0.0, final[owner, target.clamp(min=0)])
                chosen = torch.where(target == END, _ended(final, self.ends)[owner], plain)
                scores.append(_target_logprobs(logprobs, heads, self.ends).sum(1)[owner] + chosen)
            kl = torch.zeros_like(scores[0])
            if len(found) > 1:
                r, s = found
                per_token = (r.exp() * (r - s)).nan_to_num(0.0).sum(-1).clamp(min=0)
                kl = torch.where(targets == -100, 0.0, per_token).sum(1)[owner]
            yield members, scores, kl

    def compare(
        self, after: Model, before: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
    ) -> tuple[
        Float[np.ndarray, " continuation"], Float[np.ndarray, " continuation"], Float[np.ndarray, " continuation"]
    ]:
        """(log R, log S, sum over tokens of the full-vocabulary KL(R || S)) along each continuation.

        The third is a Rao-Blackwellised KL of the sequence: its mean over continuations drawn from R is
        KL(R || S), with less variance than the mean of log R - log S.
        """
        log_after, log_before, kl = (np.zeros(len(contexts)) for _ in range(3))
        for members, (r, s), token_kl in self._along([after, before], contexts, continuations):
            for result, values in ((log_after, r), (log_before, s), (kl, token_kl)):
                result[members] = values.cpu().numpy()
        return log_after, log_before, kl

    def sample(
        self, model: Model, contexts: Sequence[Ids], number: int, max_new_tokens: Sequence[int], seed: int
    ) -> Completions:
        """Draw `number` completions a context at temperature 1, with no truncation of any kind.

        `max_new_tokens[i]` bounds those of context i. generation_config is not consulted.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        owner = [i for i in range(len(contexts)) for _ in range(number)]
        tokens: list[list[int]] = [[] for _ in owner]
        # a limit that is generous costs nothing before it is used: most completions end long before it
        ahead = min(max(max_new_tokens, default=0), USUAL_COMPLETION)
        lengths = [len(contexts[i]) + ahead for i in owner]
        for rows in _batches(lengths, lengths, self.vocabulary):
            self._sample_batch(model, contexts, rows, owner, max_new_tokens, tokens, generator)
        return Completions(np.array(owner, dtype=int), tokens)

    @torch.inference_mode()
    def _sample_batch(
        self,
        model: Model,
        contexts: Sequence[Ids],
        rows: list[int],
        owner: Sequence[int],
        limits: Sequence[int],
        tokens: list[list[int]],
        generator: torch.Generator,
    ) -> None:
        ids, mask = _padded_left([contexts[owner[i]] for i in rows], self.device)
        width = ids.shape[1]
        limit = torch.tensor([limits[owner[i]] for i in rows], device=self.device)
        ends = torch.tensor(self.ends, device=self.device)
        alive = limit > 0
        past, step_ids, steps = None, ids, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = bool((mask == 0).any())
        # samples of one prompt share its keys and values
        first: dict[int, int] = {}
        copies = [first.setdefault(owner[i], len(first)) for i in rows]
        apart = [copies.index(k) for k in range(len(first))]
        share = width >= LONG and 2 * len(apart) <= len(rows) and keeps(model)
        while bool(alive.any()):
            given = apart if past is None and share else slice(None)
            output = model(
                input_ids=step_ids[given],
                # rows of one length need no mask, and are then computed exactly as without a batch
                attention_mask=mask[given] if padded else None,
                position_ids=positions[given],
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
            if past is None and share:
                output.past_key_values.batch_select_indices(torch.tensor(copies, device=self.device))
                output.logits = output.logits[copies]
            past = output.past_key_values
            drawn = torch.multinomial(output.logits[:, -1].double().softmax(-1), 1, generator=generator)
            steps.append(torch.where(alive, drawn[:, 0], END))
            alive = alive & ~torch.isin(drawn[:, 0], ends) & (len(steps) < limit)
            step_ids, positions = drawn, positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(drawn)], dim=1)
        if steps:
            drawn_rows = torch.stack(steps, dim=1).cpu().tolist()
            for row, i in enumerate(rows):
                tokens[i] = [token for token in drawn_rows[row] if token != END]

    def enumerate(
        self, models: Sequence[Model], contexts: Sequence[Ids], max_new_tokens: int
    ) -> tuple[list[list[int]], Float[np.ndarray, "model context completion"]]:
        """Every completion of at most `max_new_tokens` tokens, and its log-probability after each context.

        One forward over all beginnings that are one token short gives the last token's probabilities for free.
        """
        inner = [token for token in range(self.vocabulary) if token not in self.ends]
        heads = [list(head) for head in itertools.product(inner, repeat=max_new_tokens - 1)]
        # every node of the tree is read off the first beginning that passes through it
        completions: list[list[int]] = []
        at: list[tuple[int, int, int]] = []
        for depth in range(max_new_tokens):
            block = len(inner) ** (max_new_tokens - 1 - depth)
            for h in range(0, len(heads), block):
                last = depth == max_new_tokens - 1
                for token in range(self.vocabulary) if last else self.ends:
                    completions.append([*heads[h][:depth], token])
                    at.append((h, depth, token))
        head, depth, token = (torch.tensor(column, device=self.device) for column in zip(*at, strict=True))
        result = np.zeros((len(models), len(contexts), len(completions)))
        # beginnings go in with one token to spare, so that the step behind them is predicted too
        fed = [[*beginning, inner[0]] for beginning in heads]
        tokens = torch.tensor(fed, device=self.device)
        for c, context in enumerate(contexts):
            shape = (len(heads), max_new_tokens, self.vocabulary)
            steps = [torch.zeros(shape, dtype=torch.double, device=self.device) for _ in models]
            for rows, found, _ in _forced_logprobs(models, [context] * len(heads), fed, self.vocabulary, self.device):
                for step, logprobs in zip(steps, found, strict=True):
                    step[rows] = logprobs
            for m, logprobs in enumerate(steps):
                taken = logprobs.gather(2, tokens[..., None])[..., 0].cumsum(1)
                reached = torch.cat([torch.zeros_like(taken[:, :1]), taken], dim=1)
                result[m, c] = (reached[head, depth] + logprobs[head, depth, token]).cpu().numpy()
        return completions, result

    def number_of_completions(self, max_new_tokens: int, most: int) -> int:
        """How many completions there are of so many tokens; more than `most` are not counted to the end."""
        inner, number, open_ended = self.vocabulary - len(self.ends), 0, 1
        for _ in range(max_new_tokens):
            number += open_ended * len(self.ends)
            open_ended *= inner
            if number + open_ended > most or not open_ended:
                break
        return number + open_ended
