"""Length-controlled win rate: the win rate if both completions were equally long (after Dubois et al., 2024)."""

from collections.abc import Sequence
from math import fsum, sqrt

import torch

RIDGE = 1e-3  # penalty on the length coefficient alone: keeps it finite if length decides every comparison
MAX_STEPS = 100


def length_controlled_win_rate(preferences: Sequence[float], differences: Sequence[float]) -> float:
    """Return the win rate at a length difference of 0.

    A logistic regression predicts the preferences from a constant and the length difference,

        P(win) = sigmoid(theta + phi * tanh(difference / s)),   s = standard deviation of the differences,

    and the result is sigmoid(theta). The hyperbolic tangent limits the influence of a few very long completions. Ties
    count as half a win (a quasi-likelihood).

    Args:
        preferences: n verdicts: 1 = preferred to the baseline, 0.5 = tie, 0 = the baseline preferred.
        differences: n length differences, model minus baseline, in tokens.
    """
    n, rate = len(preferences), fsum(preferences) / len(preferences)
    mean = fsum(differences) / n
    spread = sqrt(fsum((value - mean) ** 2 for value in differences) / n) or max(map(abs, differences))
    if spread == 0 or rate in (0.0, 1.0):  # nothing to control for, or nothing to predict
        return rate
    y = torch.tensor(preferences, dtype=torch.float64)
    x = torch.stack([torch.ones_like(y), torch.tanh(torch.tensor(differences, dtype=torch.float64) / spread)], 1)
    if float(x[:, 1].min()) == float(x[:, 1].max()):  # a constant difference is collinear with the constant
        return rate
    ridge = torch.diag(torch.tensor([0.0, RIDGE * n], dtype=torch.float64))
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(MAX_STEPS):  # Newton's method; the loss is convex
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + ridge @ weights
        hessian = (x * (p * (1 - p)).clamp_min(1e-9)[:, None]).T @ x + ridge
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step * min(1.0, 4.0 / float(step.abs().max().clamp_min(1e-12)))
        if float(step.abs().max()) < 1e-12:
            break
    return float(torch.sigmoid(weights[0]))
