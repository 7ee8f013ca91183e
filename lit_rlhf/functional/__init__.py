"""Pure tensor maths: no model, no tokenizer, no Lightning. Imports torch alone.

Shapes: `B` sequences, `R` response width, `T` any width, `N` completions of all rankings, `V` vocabulary. Masks are
bool unless they are named `attention_mask`.
"""

from lit_rlhf.functional.advantages import gae, group_relative, leave_one_out
from lit_rlhf.functional.best_of_n import best_of_each, best_of_n_kl
from lit_rlhf.functional.calibration import expected_calibration_error, reliability_curve
from lit_rlhf.functional.ensemble import (
    AGGREGATIONS,
    Aggregation,
    aggregate_scores,
    ensemble_lower_bound,
    ensemble_mean,
    ensemble_minimum,
)
from lit_rlhf.functional.grouped import correlation, grouped_mean, quantile_groups
from lit_rlhf.functional.kl import k1, k2, k3
from lit_rlhf.functional.logprobs import logit_chunks, scaled_logits, token_entropy, token_logprobs
from lit_rlhf.functional.masked import masked_mean, masked_sum, mean_and_variance, moments, rescale, whiten
from lit_rlhf.functional.packing import deal, pack, pass_cost
from lit_rlhf.functional.ppo import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss, explained_variance
from lit_rlhf.functional.ranking import PairNormalizer, RankingLoss, ranking_loss, ranking_pairs
from lit_rlhf.functional.repetition import repeated_share
from lit_rlhf.functional.segments import segment_mask, segment_positions
from lit_rlhf.functional.sequences import last_token_index, pad_left, pad_right, position_ids, through_first
from lit_rlhf.functional.shaping import penalised_rewards
from lit_rlhf.functional.truncation import restricted, support_threshold

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "PairNormalizer",
    "PolicyLoss",
    "RankingLoss",
    "ValueLoss",
    "aggregate_scores",
    "best_of_each",
    "best_of_n_kl",
    "clipped_policy_loss",
    "clipped_value_loss",
    "correlation",
    "deal",
    "ensemble_lower_bound",
    "ensemble_mean",
    "ensemble_minimum",
    "expected_calibration_error",
    "explained_variance",
    "gae",
    "group_relative",
    "grouped_mean",
    "k1",
    "k2",
    "k3",
    "last_token_index",
    "leave_one_out",
    "logit_chunks",
    "masked_mean",
    "masked_sum",
    "mean_and_variance",
    "moments",
    "pack",
    "pad_left",
    "pad_right",
    "pass_cost",
    "penalised_rewards",
    "position_ids",
    "quantile_groups",
    "ranking_loss",
    "ranking_pairs",
    "reliability_curve",
    "repeated_share",
    "rescale",
    "restricted",
    "scaled_logits",
    "segment_mask",
    "segment_positions",
    "support_threshold",
    "through_first",
    "token_entropy",
    "token_logprobs",
    "whiten",
]
