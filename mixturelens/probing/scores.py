"""Scores of many probes at once on held-out questions, in every bootstrap sample: AUROC, accuracy, R2."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1 << 24
"""Comparisons of two rows that are held at a time."""


def auroc(
    scores: Float[Tensor, "probe row"],
    positive: Int[Tensor, " row"],
    question: Int[Tensor, " row"],
    counts: Int[np.ndarray, "draw question"],
) -> Float[np.ndarray, "draw probe"]:
    """Share of pairs (row of class 1, row of class 0) that a probe puts in this order; a tie counts half.

    Every pair is compared once, and counted by its two questions: a bootstrap sample weighs those counts. NaN where a
    sample lacks a class.

    >>> scores, one = torch.tensor([[0.1, 0.3, 0.3, 0.9]]), torch.tensor([0, 0, 1, 1])
    >>> float(auroc(scores, one, torch.arange(4), np.ones((1, 4), dtype=int))[0, 0])
    0.875
    """
    number = counts.shape[1]
    weights = torch.from_numpy(counts).double().to(scores.device)
    sides = [(positive == k).nonzero()[:, 0] for k in (1, 0)]
    owners = [torch.nn.functional.one_hot(question[at], number).to(scores.dtype) for at in sides]
    whole = (weights @ owners[0].double().sum(0)) * (weights @ owners[1].double().sum(0))
    result = torch.zeros(len(counts), len(scores), dtype=torch.double, device=scores.device)
    if (counts == 1).all():  # no sample but the rows themselves: ranks will do
        up, down = scores[:, sides[0]].contiguous(), scores[:, sides[1]].sort(1)[0]
        below = torch.searchsorted(down, up) + torch.searchsorted(down, up, right=True)
        found = below.double().sum(1) / 2 / max(1, len(sides[0]) * len(sides[1]))
        found = found.expand(len(counts), -1).cpu().numpy()
        return np.where((whole > 0).cpu().numpy()[:, None], found, np.nan)
    step = max(1, CHUNK // max(1, len(sides[0]) * len(sides[1])))
    for start in range(0, len(scores), step):
        up, down = (scores[start : start + step, at] for at in sides)
        order = (up[:, :, None] - down[:, None, :]).sign_()
        # sums of halves, exact in single precision
        table = (owners[0].T @ ((order @ owners[1]) + owners[1].sum(0))).double() / 2
        result[:, start : start + step] = ((weights @ table) * weights).sum(-1).T
    return np.where((whole > 0).cpu().numpy()[:, None], (result / whole.clamp(min=1)[:, None]).cpu().numpy(), np.nan)


def accuracy(
    scores: Float[Tensor, "probe row class"],
    label: Int[Tensor, " row"],
    question: Int[Tensor, " row"],
    counts: Int[np.ndarray, "draw question"],
) -> Float[np.ndarray, "draw probe"]:
    """Share of rows whose class has the greatest score, in every bootstrap sample of questions."""
    right = (scores.argmax(-1) == label).double()
    return _ratio(right, torch.ones_like(right), question, counts)


def r_squared(
    predicted: Float[Tensor, "probe row"],
    number: Float[Tensor, " row"],
    question: Int[Tensor, " row"],
    counts: Int[np.ndarray, "draw question"],
) -> Float[np.ndarray, "draw probe"]:
    """1 - (squared error) / (squared distance from the sample's own mean), in every bootstrap sample of questions.

    It is 0 for a probe that says the mean, and below 0 for a worse one.
    """
    middle = number.double() - number.double().mean()
    error = (predicted.double() - number.double()).square()
    rows = torch.ones_like(error[:1])
    mean = _ratio(middle[None], rows, question, counts)
    spread = _ratio(middle.square()[None], rows, question, counts) - mean**2
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 1 - _ratio(error, torch.ones_like(error), question, counts) / spread
    return np.where(spread > 0, found, np.nan)


def _ratio(
    part: Float[Tensor, "probe row"],
    whole: Float[Tensor, "probe row"],
    question: Int[Tensor, " row"],
    counts: Int[np.ndarray, "draw question"],
) -> Float[np.ndarray, "draw probe"]:
    """Ratio of two sums over rows, in every bootstrap sample of questions."""
    owner = torch.nn.functional.one_hot(question, counts.shape[1]).double()
    top, bottom = (counts @ (values @ owner).cpu().numpy().T for values in (part, whole))
    return np.where(bottom > 0, top / np.maximum(bottom, 1e-300), np.nan)
