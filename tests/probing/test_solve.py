"""The solver against scikit-learn, its oracle: the same objective, on any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from mixturelens.probing.solve import Probe, fit_logistic, fit_ridge
from mixturelens.types import InputError


def planted(sites: int, rows: int, features: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of different sizes, one of them constant, and labels that they carry in part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sites, rows, features, generator=generator, dtype=torch.double)
    x = x @ torch.randn(sites, features, features, generator=generator, dtype=torch.double)
    x = x * torch.logspace(-2, 2, features, dtype=torch.double) + 3.0
    x[:, :, 1] = 7.0
    logits = x[0] @ torch.randn(features, classes, generator=generator, dtype=torch.double)
    y = (logits / logits.std() + torch.randn(rows, classes, generator=generator, dtype=torch.double)).argmax(1)
    return x, torch.stack([y, y[torch.randperm(rows, generator=generator)]])


def loss(weights: np.ndarray, bias: np.ndarray, z: np.ndarray, y: np.ndarray, c: float) -> float:
    """scikit-learn's objective, written out."""
    logits = z @ weights.T + bias
    if len(weights) == 1:
        logits = np.hstack([np.zeros_like(logits), logits])
    top = logits.max(1)
    logs = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(y)), y]
    return float(c * logs.sum() + (weights**2).sum() / 2)


def standardised(probe: Probe, x: torch.Tensor, site: int) -> np.ndarray:
    return ((x[site] - probe.mean[site]) * probe.scale[site]).double().numpy()


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("rows", "features"), [(120, 10), (30, 50)])
@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
def test_logistic_is_scikit_learns(classes: int, rows: int, features: int, c: float):
    x, y = planted(2, rows, features, classes)
    assert int(y.max()) == classes - 1
    probe = fit_logistic(x, y, c, tolerance=1e-9)
    for site in range(len(x)):
        z = standardised(probe, x, site)
        assert not z[:, 1].any()
        for k, labels in enumerate(y.numpy()):
            oracle = LogisticRegression(C=c, tol=1e-10, max_iter=10000).fit(z, labels)
            mine = loss(probe.weights[site, k].numpy(), probe.bias[site, k].numpy(), z, labels, c)
            assert mine == pytest.approx(loss(oracle.coef_, oracle.intercept_, z, labels, c), rel=1e-6)
            found = probe.scores(x)[site, k].numpy()
            guess = found[:, 0] > 0 if classes == 2 else found.argmax(1)
            assert np.mean(guess == labels) == pytest.approx(oracle.score(z, labels), abs=0.01)
            if classes == 2:
                np.testing.assert_allclose(found[:, 0], oracle.decision_function(z), atol=0.02)


@pytest.mark.parametrize("classes", [2, 5])
def test_single_precision_and_separable_labels_are_close_enough(classes: int):
    x, y = planted(3, 200, 32, classes)
    x[..., :classes] = torch.nn.functional.one_hot(y[0], classes) * 5.0  # separable, and still regularised
    exact, single = fit_logistic(x, y, tolerance=1e-10), fit_logistic(x.float(), y)
    for site in range(3):
        z = standardised(exact, x, site)
        for k, labels in enumerate(y.numpy()):
            values = [
                loss(p.weights[site, k].double().numpy(), p.bias[site, k].double().numpy(), z, labels, 1.0)
                for p in (exact, single)
            ]
            assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_a_problem_does_not_depend_on_its_neighbours():
    x, y = planted(4, 80, 6, 3)
    together = fit_logistic(x, y, tolerance=1e-12)
    alone = fit_logistic(x[2:3], y[1:], tolerance=1e-12)
    torch.testing.assert_close(together.weights[2:3, 1:], alone.weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "features"), [(60, 8), (20, 30)])
def test_ridge_is_scikit_learns(rows: int, features: int):
    x, _ = planted(2, rows, features, 2)
    y = torch.randn(3, rows, generator=torch.Generator().manual_seed(1), dtype=torch.double) + 5
    probe = fit_ridge(x, y, alpha=2.5)
    for site in range(2):
        z = standardised(probe, x, site)
        for k in range(3):
            oracle = Ridge(alpha=2.5).fit(z, y[k].numpy())
            np.testing.assert_allclose(probe.weights[site, k, 0].numpy(), oracle.coef_, atol=1e-8)
            np.testing.assert_allclose(probe.scores(x)[site, k, :, 0].numpy(), oracle.predict(z), atol=1e-8)


def test_a_constant_site_says_so_and_predicts_the_shares():
    probe = fit_logistic(torch.full((1, 8, 3), 2.0), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]))
    assert probe.flat.tolist() == [True]
    assert not probe.weights.any()
    assert float(probe.bias) == pytest.approx(np.log(3), abs=1e-2)


def test_a_class_without_rows_is_refused():
    with pytest.raises(InputError, match="every class"):
        fit_logistic(torch.randn(1, 4, 2), torch.tensor([[0, 2, 0, 2]]))
    with pytest.raises(InputError, match="two classes"):
        fit_logistic(torch.randn(1, 4, 2), torch.tensor([[0, 0, 0, 0]]))
