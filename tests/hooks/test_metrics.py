"""Log-odds of the next token: a logit difference for single tokens, of probabilities for sets."""

from __future__ import annotations

import pytest
import torch

from mixturelens.hooks.metrics import log_odds

LOGITS = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * 3


def test_one_token_each_is_the_logit_difference():
    odds = log_odds([[0], [1], [2], [3]], [[5], [6], [7], [8]], 9)
    expected = LOGITS[range(4), range(4)] - LOGITS[range(4), range(5, 9)]
    torch.testing.assert_close(odds(LOGITS), expected)


def test_sets_are_log_odds_of_their_probabilities():
    odds = log_odds([[0, 4], [1], [2, 3, 8], [3]], [[5], [6, 7], [1, 0], [0, 1, 2, 4, 5, 6, 7, 8]], 9)
    p = LOGITS.double().softmax(-1)
    expected = [
        (p[row][list(up)].sum() / p[row][list(down)].sum()).log().item()
        for row, (up, down) in enumerate(
            [([0, 4], [5]), ([1], [6, 7]), ([2, 3, 8], [1, 0]), ([3], [0, 1, 2, 4, 5, 6, 7, 8])]
        )
    ]
    assert odds(LOGITS).tolist() == pytest.approx(expected, abs=1e-5)


def test_without_a_foil_it_is_the_log_probability():
    odds = log_odds([[0], [1, 2], [2], [3]], [[], [], [5], []], 9)
    logprobs = LOGITS.log_softmax(-1)
    found = odds(LOGITS)
    assert found[0].item() == pytest.approx(logprobs[0, 0].item(), abs=1e-5)
    assert found[1].item() == pytest.approx(logprobs[1, 1:3].logsumexp(-1).item(), abs=1e-5)
    assert found[2].item() == pytest.approx((LOGITS[2, 2] - LOGITS[2, 5]).item(), abs=1e-5)
    assert found[3].item() <= 0


def test_of_some_rows():
    odds = log_odds([[0], [1], [2], [3]], [[5], [6], [7], []], 9)
    rows = torch.tensor([3, 1, 1])
    torch.testing.assert_close(odds(LOGITS[rows], rows), odds(LOGITS)[rows])
    torch.testing.assert_close(odds(LOGITS[1:3], slice(1, 3)), odds(LOGITS)[1:3])


@pytest.mark.parametrize("foil", [[[5], [6], [7], [8]], [[], [5, 6], [], [0]]])
def test_gradients_flow(foil: list[list[int]]):
    logits = LOGITS.clone().requires_grad_()
    odds = log_odds([[0], [1, 2], [2], [3]], foil, 9)
    assert torch.autograd.gradcheck(odds, logits.double().detach().requires_grad_())
    odds(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0
