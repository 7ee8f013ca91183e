"""Best-of-n sampling: expected score of the best of k responses, and its KL divergence from the policy."""

import torch
from torch import Tensor


def expected_best_of_k(scores: Tensor, values: Tensor | None = None) -> Tensor:
    """Estimate the expected score of the best of k responses from n >= k of them, without bias, for k = 1 .. n.

    With the scores of a prompt in ascending order, `s_(i)` is the best of `C(i - 1, k - 1)` of the `C(n, k)` subsets of
    k, so `E[max of k] = sum_i C(i - 1, k - 1) / C(n, k) * s_(i)`: the mean over all subsets (Chen et al., 2021, for
    scores of 0 and 1). k = 1 gives the mean, k = n the maximum.

    Args:
        scores: (B, n), of n independent responses to each of B prompts.
        values: (B, n), what to expect of the response with the highest score in place of the score itself, such as how
            good it really is; of responses with equal scores, the last one counts as the best.

    Returns:
        (B, n) float64: column k - 1 is the estimate for k.
    """
    n = scores.shape[1]
    order = scores.double().sort(dim=1, stable=True)  # equal scores: the same order in every call
    ascending = order.values if values is None else values.double().gather(1, order.indices)  # (B, n)
    i = torch.arange(1, n + 1, dtype=torch.float64, device=scores.device)  # ranks
    k = i[:, None]
    # log C(i - 1, k - 1) - log C(n, k); lgamma has a pole where i < k, and there the weight is 0
    above = torch.lgamma(i) - torch.lgamma(k) - torch.lgamma((i - k).clamp(min=0) + 1)
    subsets = torch.lgamma(i[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(i[-1] - k + 1)
    weights = torch.where(i >= k, (above - subsets).exp(), 0.0)  # (k, i)
    return ascending @ weights.T


def best_of_n_kl(n: Tensor) -> Tensor:
    """Bound KL(best of n || policy) by `log n - (n - 1) / n`, in nats per response (Stiennon et al., 2020).

    Exact if no two responses have equal scores; the KL is less if some do, or if the policy has few distinct responses
    (Beirami et al., 2024).

    Args:
        n: Any shape, at least 1.

    Returns:
        The same shape, float64.
    """
    n = n.double()
    return n.log() - (n - 1) / n
