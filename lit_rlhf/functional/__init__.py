"""Pure functions on tensors: no model, no tokenizer, no Lightning. Imports torch alone.

Shapes: `B` sequences, `R` response width, `T` any width, `N` completions of all rankings, `V` vocabulary. Masks are
bool unless they are named `attention_mask`.
"""

from lit_rlhf.functional.advantages import gae, group_relative, leave_one_out
from lit_rlhf.functional.best_of_n import best_of_n_kl, expected_best_of_k
from lit_rlhf.functional.calibration import expected_calibration_error, reliability_curve
from lit_rlhf.functional.ensemble import (
    AGGREGATIONS,
    Aggregation,
    aggregate_scores,
    ensemble_mean,
    ensemble_mean_minus_std,
    ensemble_min,
)
from lit_rlhf.functional.grouped import correlation, grouped_mean, quantile_bins
from lit_rlhf.functional.importance_sampling import truncated_importance_weights
from lit_rlhf.functional.kl import k1, k2, k3
from lit_rlhf.functional.kl_rewards import kl_penalized_rewards
from lit_rlhf.functional.logprobs import logit_chunks, scaled_logits, token_entropy, token_logprobs
from lit_rlhf.functional.masked import (
    masked_mean,
    masked_sum,
    mean_and_variance,
    moments,
    whiten,
)
from lit_rlhf.functional.padding import last_token_index, mask_through_first_stop, pad_left, pad_right, position_ids
from lit_rlhf.functional.ppo import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss, explained_variance
from lit_rlhf.functional.ranking import PairNormalizer, RankingLoss, ranking_loss, ranking_pairs
from lit_rlhf.functional.repetition import repeated_ngram_fraction
from lit_rlhf.functional.sampling_filters import apply_top_k_top_p, top_k_top_p_threshold

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "PairNormalizer",
    "PolicyLoss",
    "RankingLoss",
    "ValueLoss",
    "aggregate_scores",
    "apply_top_k_top_p",
    "best_of_n_kl",
    "clipped_policy_loss",
    "clipped_value_loss",
    "correlation",
    "ensemble_mean",
    "ensemble_mean_minus_std",
    "ensemble_min",
    "expected_best_of_k",
    "expected_calibration_error",
    "explained_variance",
    "gae",
    "group_relative",
    "grouped_mean",
    "k1",
    "k2",
    "k3",
    "kl_penalized_rewards",
    "last_token_index",
    "leave_one_out",
    "logit_chunks",
    "mask_through_first_stop",
    "masked_mean",
    "masked_sum",
    "mean_and_variance",
    "moments",
    "pad_left",
    "pad_right",
    "position_ids",
    "quantile_bins",
    "ranking_loss",
    "ranking_pairs",
    "reliability_curve",
    "repeated_ngram_fraction",
    "scaled_logits",
    "token_entropy",
    "token_logprobs",
    "top_k_top_p_threshold",
    "truncated_importance_weights",
    "whiten",
]
