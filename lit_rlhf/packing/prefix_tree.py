"""Several sequences in one row: who sees whom, and where each token stands.

A prompt and the responses that each continue it are segments: every response names the prompt as its parent, so the
prompt is computed once for all of them. So is a ranking, a prompt and K completions. What names no parent sees nothing
of other segments.
"""

from torch import Tensor


def prefix_tree_mask(segment_ids: Tensor, parent_ids: Tensor) -> Tensor:
    """Who may attend to whom: causal, within a token's own segment and the segment that it continues.

    Args:
        segment_ids: (B, T) int64, the segment of each token, from 1 on; 0 is padding, which sees padding only, so that no
            row of the softmax is empty.
        parent_ids: (B, T) int64, the segment that the token's segment continues, which must lie before it; -1 for none.

    Returns:
        (B, 1, T, T) bool, True where the query (third dimension) sees the key (last one).
    """
    assert segment_ids.shape == parent_ids.shape and segment_ids.ndim == 2
    key = segment_ids.unsqueeze(1)  # (B, 1, T)
    related = (segment_ids.unsqueeze(2) == key) | (parent_ids.unsqueeze(2) == key)  # (B, T, T)
    return related.tril().unsqueeze(1)


def packed_position_ids(mask: Tensor, segment_ids: Tensor) -> Tensor:
    """The place of each token in its sequence: a completion goes on counting where its prompt ends.

    Args:
        mask: (B, 1, T, T) bool, of `prefix_tree_mask`.
        segment_ids: (B, T) int64.

    Returns:
        (B, T) int64, from 0 on; 0 on padding, whose count could exceed the model's positions.
    """
    seen = mask.sum(-1).squeeze(1)  # (B, T): itself included
    return (seen - 1).masked_fill(segment_ids == 0, 0)
