"""How the policies' log-weights move with the parameters that RL trains: the tangent kernel of S."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.behaviour.prompts import Prompts
from mixturelens.lab import theory
from mixturelens.lab.organism import Spec
from mixturelens.lab.theory import exact_path, group_pace, velocity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 1024
"""Tokens of the prompts that gradients are taken of at a time: bounds memory."""
AHEAD = 0.75
"""Where on the way from S to the ceiling the kernel is looked at again: the theory takes it for constant."""


class Network:
    """The parameters that RL trains (all, or those of an adapter), and how the policies' log-weights depend on them."""

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, cues: Sequence[str], frozen: set[str], device: str
    ) -> None:
        self.model, self.device = model, device
        self.prompts = [prompts.part([i for i, row in enumerate(prompts.rows) if row.cue == cue]) for cue in cues]
        self.trained = [p for name, p in model.named_parameters() if name not in frozen and p.requires_grad]

    def gradients(self) -> Float[np.ndarray, "cue policy parameter"]:
        """Gradient of the mean over prompts of each policy's log-weight."""
        found = []
        for prompts in self.prompts:
            some = max(1, TOKENS // max(map(len, prompts.contexts)))
            number = len(prompts.rows)
            total: Any = 0.0
            for start in range(0, number, some):
                part = prompts.part(list(range(start, min(start + some, number))))
                means = log_weights(self.model, part, self.device).sum(0) / number
                rows = [torch.autograd.grad(mean, self.trained, retain_graph=True) for mean in means]
                total = total + torch.stack([torch.cat([g.flatten() for g in row]).double() for row in rows])
            found.append(total)
        return torch.stack(found).cpu().numpy()

    @contextlib.contextmanager
    def moved(self, by: Float[np.ndarray, " parameter"]) -> Iterator[None]:
        """The network with other parameters, for as long as the block lasts."""
        kept = [p.detach().clone() for p in self.trained]
        pieces = torch.as_tensor(by).split([p.numel() for p in self.trained])
        with torch.no_grad():
            for parameter, piece in zip(self.trained, pieces, strict=True):
                parameter += piece.view_as(parameter).to(parameter)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.trained, kept, strict=True):
                    parameter.copy_(old)


def log_weights(model: PreTrainedModel, prompts: Prompts, device: str = "cpu") -> Float[Tensor, "prompt policy"]:
    """Log-probability that each known policy is announced, in any wording; can be differentiated."""
    found: list[list[Tensor]] = [[] for _ in range(prompts.shape[1] - 1)]
    for number, a in enumerate(prompts.announcements):
        spelled = [placed[number].ids for placed in prompts.placed]
        rows = [[*context, *ids] for context, ids in zip(prompts.contexts, spelled, strict=True)]
        longest, first = max(map(len, rows)), min(map(len, prompts.contexts)) - 1
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        keep = torch.arange(first, longest, device=device)  # nothing before it is asked for
        output = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=keep)
        logits = output.logits.double().log_softmax(-1)
        found[a.policy].append(
            torch.stack(
                [
                    logits[row, torch.arange(len(ids)) + len(context) - 1 - first, list(ids)].sum()
                    for row, (context, ids) in enumerate(zip(prompts.contexts, spelled, strict=True))
                ]
            )
        )
    return torch.stack([torch.stack(wordings).logsumexp(0) for wordings in found], -1)


@dataclass(frozen=True)
class Kernels:
    """Log-weights that a unit of theta under the trained cue moves in a step, as Adam takes it."""

    start: Float[np.ndarray, "cue policy policy"]
    ahead: Float[np.ndarray, "cue policy policy"]
    path: theory.WeightPath
    """Softmax drift through `start`: `time` is in steps, at the pace of one."""
    rescaled: float


def kernels_of(
    spec: Spec,
    state: Bootstrapped,
    network: Network,
    gradients: Float[np.ndarray, "cue policy parameter"],
    trained: int,
) -> Kernels:
    """The tangent kernel (Jacot et al. 2018, arXiv 1806.07572) of S, and of S moved along its own forecast.

    Adam's first step is rate x gradient / (|gradient| + epsilon): plain gradient descent where epsilon is far larger,
    steps of one size where it is far smaller. TRL's loss is a mean over tokens, and one of `max_new_tokens` chooses.
    """
    weights, right = state.weights[0, trained], state.right[0, trained]
    drift = group_pace(float(weights @ right), spec.rl.group) * velocity(weights, right)
    gradient = drift @ gradients[trained] / spec.max_new_tokens
    scale = spec.rl.learning_rate / (np.abs(gradient) + spec.rl.adam_epsilon) / spec.max_new_tokens
    start = np.einsum("cip,jp->cij", gradients * scale, gradients[trained])
    path = exact_path(weights, right, kernel=start[trained])
    with network.moved(scale * (path.shift[round(AHEAD * (len(path.shift) - 1))] @ gradients[trained])):
        there = network.gradients()
    ahead = np.einsum("cip,jp->cij", there * scale, there[trained])
    large = np.abs(gradient) > spec.rl.adam_epsilon
    return Kernels(start, ahead, path, float((gradient[large] ** 2).sum() / (gradient**2).sum()))


@dataclass(frozen=True)
class Bootstrapped:
    """S on bootstrap samples of the questions; the first is the sample itself."""

    weights: Float[np.ndarray, "draw cue policy"]
    right: Float[np.ndarray, "draw cue policy"]
    other: Float[np.ndarray, "draw cue"]
    """Weight of completions of no known policy."""
