"""Exact probabilities by teacher forcing, and completions drawn at temperature 1. The only hot path of behaviour.

A *context* is a prompt's token ids, perhaps with an announcement behind it. What models compute is in `logits`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.behaviour.logits import (
    END,
    Forwards,
    Ids,
    Kept,
    batches,
    entropy,
    forced_logits,
    grown,
    target_logprobs,
    token_kl,
)
from mixturelens.models.beginnings import BATCH_TOKENS, LONG, Growing, Model, Rows, cut, keeps

WIDE = 512
"""Width of a model from which a batch of samples holds BATCH_TOKENS; narrower ones spend their time between layers, and
get as many more tokens at once."""
USUAL_COMPLETION = 64
"""Tokens of a completion that are reckoned with when batches are cut."""


@dataclass(frozen=True)
class Completions:
    """Completions of many contexts, flat: `context[i]` is the row of the context that completion i belongs to.

    Tokens include the end token, if it was reached.
    """

    context: Int[np.ndarray, " completion"]
    tokens: list[list[int]]


def _padded_left(rows: Sequence[Ids], device: str) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Token ids, padded so that the last is in the last column, and which of them are real."""
    width = max(len(row) for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for k, row in enumerate(rows):
        ids[k, width - len(row) :] = torch.tensor(list(row))
        mask[k, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


_Node = tuple[Float[Tensor, " vocabulary"], Float[Tensor, ""], tuple[int, ...]]
"""Of a tree of literals: log-probabilities of the tokens that leave it here, log-probability of being here, where."""


class Scorer:
    """Probabilities and samples of models of one tokenizer; it holds end tokens, vocabulary and device."""

    def __init__(self, ends: Ids, vocabulary: int, device: str = "cpu") -> None:
        self.ends = tuple(ends)
        self.vocabulary = vocabulary
        self.device = device
        self._kept: Kept | None = None

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Keep what models compute at prompts for the length of a block, in which no model may change.

        Each prompt then goes through each model once.
        """
        outer, self._kept = self._kept, {} if self._kept is None else self._kept
        try:
            yield
        finally:
            self._kept = outer

    def forget(self) -> None:
        """Throw away what `once` has kept: to be called when the weights of a model have changed."""
        if self._kept is not None:
            self._kept.clear()

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
        for rows, (found,), targets in forced_logits(
            [model],
            [contexts[i] for i, _ in paths],
            [tuple(literals[i][k]) for i, k in paths],
            Forwards(self.vocabulary, self.device, self._kept),
        ):
            steps = target_logprobs(found, targets, self.ends)
            reached = steps.cumsum(1) - steps
            for row, path in enumerate(rows):
                i, k = paths[path]
                nodes = []
                for step in range(len(literals[i][k])):
                    node = tuple(literals[i][k][:step])
                    owner, children = branches[i][node]
                    if owner == k:
                        at = torch.tensor(children, device=self.device)
                        left = found.at(row, step).index_fill(0, at, -torch.inf)
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
        """Draw, for each context, the beginning of a completion that begins with none of the literals.

        It ends with the token at which the completion leaves the tree of literals, drawn by Gumbel-max over all such
        tokens.
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
        """Log-probability, in nats, of each whole continuation of its context; END in it stands for any end token."""
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
        for rows, found, targets in forced_logits(
            models,
            [contexts[same[0]] for same in shared],
            [continuations[same[0]] for same in shared],
            Forwards(self.vocabulary, self.device, self._kept),
        ):
            members = [i for row in rows for i in shared[row]]
            owner = torch.tensor([k for k, row in enumerate(rows) for _ in shared[row]], device=self.device)
            # one last token for each member, while all before it is the row's
            ending = [continuations[i][-1] if len(continuations[i]) else -100 for i in members]
            target = torch.tensor(ending, device=self.device)
            last = (targets != -100).sum(1).clamp(min=1) - 1
            heads = targets.scatter(1, last[:, None], -100)
            scores = []
            for logits in found:
                at = owner, last[owner]
                plain = logits.raw[*at, target.clamp(min=0)].double() - logits.total[at]
                ended = logits.ended(self.ends)[at]
                chosen = torch.where(target == END, ended, torch.where(target < 0, 0.0, plain))
                scores.append(target_logprobs(logits, heads, self.ends).sum(1)[owner] + chosen)
            kl = torch.zeros_like(scores[0])
            if len(found) > 1:
                kl = torch.where(targets == -100, 0.0, token_kl(*found)).sum(1)[owner]
            yield members, scores, kl

    def compare(
        self, after: Model, before: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
    ) -> tuple[
        Float[np.ndarray, " continuation"], Float[np.ndarray, " continuation"], Float[np.ndarray, " continuation"]
    ]:
        """Score each continuation of its context under R (`after`) and S (`before`).

        Returns log R, log S, and the sum over its tokens of KL(R || S) over the whole vocabulary, all in nats. The
        third is a Rao-Blackwellised KL of the sequence: its mean over continuations drawn from R is KL(R || S), with
        less variance than the mean of log R - log S.
        """
        log_after, log_before, kl = (np.zeros(len(contexts)) for _ in range(3))
        for members, (r, s), apart in self._along([after, before], contexts, continuations):
            for result, values in ((log_after, r), (log_before, s), (kl, apart)):
                result[members] = values.cpu().numpy()
        return log_after, log_before, kl

    def steps(
        self, before: Model, after: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
    ) -> list[Float[np.ndarray, "3 step"]]:
        """Three numbers before every token of each continuation, in bits: KL(R || S), entropy of S and entropy of R."""
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            alike.setdefault((tuple(context), tuple(continuation)), []).append(i)
        once = [same[0] for same in alike.values()]
        result: list[np.ndarray] = [np.zeros((3, 0))] * len(contexts)
        for rows, (s, r), _ in forced_logits(
            [before, after],
            [contexts[i] for i in once],
            [continuations[i] for i in once],
            Forwards(self.vocabulary, self.device, self._kept),
        ):
            found = (torch.stack([token_kl(r, s), entropy(s), entropy(r)]) / np.log(2)).cpu().numpy()
            for row, k in enumerate(rows):
                for i in alike[tuple(contexts[once[k]]), tuple(continuations[once[k]])]:
                    result[i] = found[:, row, : len(continuations[i])]
        return result

    def sample(
        self, model: Model, contexts: Sequence[Ids], number: int, max_new_tokens: Sequence[int], seed: int
    ) -> Completions:
        """Draw `number` completions a context at temperature 1, with no truncation of any kind.

        `max_new_tokens[i]` bounds those of context i. generation_config is not consulted.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        owner = [i for i in range(len(contexts)) for _ in range(number)]
        # interventions begin rows themselves
        goes_on = keeps(model) or getattr(model, "goes_on", False)
        if goes_on and min(map(len, contexts), default=0) >= LONG and max(max_new_tokens) > 0:
            return Completions(
                np.array(owner, dtype=int), self._drawn(model, contexts, number, max_new_tokens, generator)
            )
        tokens: list[list[int]] = [[] for _ in owner]
        # a limit that is generous costs nothing before it is used: most completions end long before it
        ahead = min(max(max_new_tokens, default=0), USUAL_COMPLETION)
        lengths = [len(contexts[i]) + ahead for i in owner]
        width = getattr(getattr(model, "config", None), "hidden_size", WIDE)
        most = BATCH_TOKENS * max(1, WIDE // width)
        for rows in batches(lengths, lengths, self.vocabulary, most):
            self._sample_batch(model, contexts, rows, owner, max_new_tokens, tokens, generator)
        return Completions(np.array(owner, dtype=int), tokens)

    def _drawn(
        self, model: Any, contexts: Sequence[Ids], number: int, limits: Sequence[int], generator: torch.Generator
    ) -> list[list[int]]:
        """Completions that go on from kept beginnings; those of a context that are alike so far are one row."""
        drawn: list[list[int]] = [[] for _ in range(len(contexts) * number)]
        going = [i for i, limit in enumerate(limits) if limit > 0]
        ahead = [min(limits[i], USUAL_COMPLETION) for i in going]
        waiting = [contexts[i] for i in going]
        begun = self._begun(model, waiting, ahead) if keeps(model) else model.begun(waiting, ahead)
        for some, rows in begun:
            members = [([going[n] * number + k for k in range(number)], limits[going[n]]) for n in some]
            self._draw_rows(rows, members, drawn, generator)
        return drawn

    def _begun(
        self, model: Model, contexts: Sequence[Ids], ahead: Sequence[int]
    ) -> Iterator[tuple[list[int], Growing]]:
        """(some of the contexts, rows that go on from them), where so many tokens are to come behind each."""
        kept = {} if self._kept is None else self._kept
        for part in grown([model], contexts, kept, self.device):
            behind = [kept[id(model)][tuple(contexts[i])] for i in part]
            for some in cut([each.length for each in behind], [ahead[i] for i in part]):
                yield [part[n] for n in some], Rows(model, [behind[n] for n in some], self.device)

    def _draw_rows(
        self,
        growing: Growing,
        rows: list[tuple[list[int], int]],
        drawn: list[list[int]],
        generator: torch.Generator,
    ) -> None:
        """`rows`: the completions that each row is alike for, and how many tokens they may have."""
        most = max(len(members) for members, _ in rows)
        for step in itertools.count(1):
            reached = growing.logits.double().softmax(-1).cumsum(-1)
            random = torch.rand(len(rows), most, generator=generator, dtype=torch.double, device=self.device)
            chosen = torch.searchsorted(reached, random * reached[:, -1:], right=True).clamp(max=reached.shape[1] - 1)
            going: dict[tuple[int, int], list[int]] = {}
            for row, (members, limit) in enumerate(rows):
                for member, token in zip(members, chosen[row].tolist(), strict=False):
                    drawn[member].append(token)
                    if token not in self.ends and step < limit:
                        going.setdefault((row, token), []).append(member)
            if not going:
                return
            rows = [(members, rows[row][1]) for (row, _), members in going.items()]
            growing.go_on([row for row, _ in going], [token for _, token in going])

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
        limit = torch.tensor([limits[owner[i]] for i in rows], device=self.device)
        ends = torch.tensor(self.ends, device=self.device)
        alive = limit > 0
        past, step_ids, steps = None, ids, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = bool((mask == 0).any())
        while bool(alive.any()):
            output = model(
                input_ids=step_ids,
                # rows of one length need no mask, and are then computed exactly as without a batch
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
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
        """Every completion of at most `max_new_tokens` tokens, and its log-probability in nats under each model at each
        context.

        The probabilities of the last token come from forwards over all beginnings that are one token shorter.
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
            for rows, found, _ in forced_logits(
                models, [context] * len(heads), fed, Forwards(self.vocabulary, self.device)
            ):
                for step, logits in zip(steps, found, strict=True):
                    step[rows] = logits.raw.double() - logits.total[..., None]
            for m, logprobs in enumerate(steps):
                taken = logprobs.gather(2, tokens[..., None])[..., 0].cumsum(1)
                reached = torch.cat([torch.zeros_like(taken[:, :1]), taken], dim=1)
                result[m, c] = (reached[head, depth] + logprobs[head, depth, token]).cpu().numpy()
        return completions, result

    def number_of_completions(self, max_new_tokens: int, most: int) -> int:
        """How many completions of at most so many tokens there are; counting stops beyond `most`."""
        inner, number, open_ended = self.vocabulary - len(self.ends), 0, 1
        for _ in range(max_new_tokens):
            number += open_ended * len(self.ends)
            open_ended *= inner
            if number + open_ended > most or not open_ended:
                break
        return number + open_ended
