"""The language-modelling loss of a model on rows of text."""

from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import language_model_loss, position_ids


def text_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    loss_mask: Tensor,
    attention_mask: Tensor,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy over the targets, in nats, and how many there are.

    Args:
        model: a causal language model, or the strategy's wrapper of one.
        input_ids: (B, T) int64.
        loss_mask: (B, T) bool, True where the token is a target.
        attention_mask: (B, T), 1 = real token; or whatever the model takes to keep packed sequences apart.
        positions: (B, T) int64, for packed sequences; by default counted from each row's first real token.
    """
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask) if positions is None else positions,
        use_cache=False,
    ).logits  # (B, T, V)
    return language_model_loss(logits, input_ids, loss_mask)
