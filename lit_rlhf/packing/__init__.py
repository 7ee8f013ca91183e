"""Packing: several sequences per row, by attention masks or by variable-length attention; logits of some positions.

Imports torch, transformers and `lit_rlhf.functional`.
"""

from lit_rlhf.packing.attention_masks import (
    packed_model_inputs,
    packed_position_ids,
    packing_unsupported_reason,
    prefix_tree_mask,
    to_attention_mask,
    uses_sdpa,
)
from lit_rlhf.packing.bin_packing import forward_flops, pack_balanced, partition_balanced
from lit_rlhf.packing.packed_batch import (
    PackedBatch,
    length_bucketed_chunks,
    pack_batch,
    response_logits,
    same_prompt_as_previous,
)
from lit_rlhf.packing.rankings import RankingInputs, last_hidden_state, prefix_sharing_unsupported_reason
from lit_rlhf.packing.selective_logits import logits_at_positions
from lit_rlhf.packing.varlen_attention import varlen_inputs, varlen_unsupported_reason

__all__ = [
    "PackedBatch",
    "RankingInputs",
    "forward_flops",
    "last_hidden_state",
    "length_bucketed_chunks",
    "logits_at_positions",
    "pack_balanced",
    "pack_batch",
    "packed_model_inputs",
    "packed_position_ids",
    "packing_unsupported_reason",
    "partition_balanced",
    "prefix_sharing_unsupported_reason",
    "prefix_tree_mask",
    "response_logits",
    "same_prompt_as_previous",
    "to_attention_mask",
    "uses_sdpa",
    "varlen_inputs",
    "varlen_unsupported_reason",
]
