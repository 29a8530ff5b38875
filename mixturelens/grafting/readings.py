"""What grafts are judged by: log-probabilities of announcements, and of what S usually does once one is in place.

One forward over prompt + announcement + usual completion gives both, and stays differentiable in the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.behaviour.likelihood import Model
from mixturelens.grafting.cells import Batch, Cells


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
