"""What ends a response: an end token of the model, a stop token of the settings, or a stop string."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams

StopStringMatcher = Callable[[Tensor], Tensor]
"""Maps the ids of responses so far, (b, t), to which of them end with a stop string, (b,) bool."""


def stop_token_ids(model: PreTrainedModel, sampling: SamplingParams) -> Tensor:
    """Return the tokens that end a response, (any number,) int64, on the model's device.

    These are the end token of the model's config, those of its generation config where it lists several (chat models
    end a turn and a text with different ones), and `sampling.stop_token_ids`.

    Raises:
        UserError: a stop token outside the vocabulary.
    """
    size = model.config.get_text_config().vocab_size
    unknown = [token for token in sampling.stop_token_ids if not 0 <= token < size]
    if unknown:
        raise UserError(f"sampling.stop_token_ids: {unknown[0]} is not in the model's vocabulary of {size:,} tokens")
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = listed if isinstance(listed, list) else []
    ids = sorted({model.config.eos_token_id, *own, *sampling.stop_token_ids})
    return torch.tensor(ids, dtype=torch.long, device=model.device)


def stop_string_matcher(tokenizer: Tokenizer, sampling: SamplingParams) -> StopStringMatcher | None:
    """Return a function that finds the stop strings in responses, or None where there are none.

    Engines know token ids only; the tokenizer comes in here. The text of the last tokens is searched, of as many as a
    stop string can consist of; special tokens have no text.
    """
    if not sampling.stop_strings:
        return None
    # A visible token has at least one byte. One more token in front: a decoder may strip the first one's space.
    window = max(len(text.encode()) for text in sampling.stop_strings) + 1
    special = set(tokenizer.all_special_ids)

    def ends_with_stop_string(ids: Tensor) -> Tensor:
        tails = [[token for token in row if token not in special][-window:] for row in ids.tolist()]
        texts = tokenizer.batch_decode(tails)
        found = [any(stop in text for stop in sampling.stop_strings) for text in texts]
        return torch.tensor(found, device=ids.device)

    return ends_with_stop_string


class StoppingCriteria:
    """Decides which responses finish with their last token.

    Args:
        model: the policy.
        sampling: its stop tokens, and whether there are stop strings.
        matches_stop_string: of `stop_string_matcher`; needed where there are stop strings.
    """

    def __init__(
        self, model: PreTrainedModel, sampling: SamplingParams, matches_stop_string: StopStringMatcher | None = None
    ) -> None:
        if sampling.stop_strings and matches_stop_string is None:
            raise UserError("sampling.stop_strings: no tokenizer here to find them with; use sampling.stop_token_ids")
        self.stop_token_ids, self.matches_stop_string = stop_token_ids(model, sampling), matches_stop_string

    def is_stop_token(self, ids: Tensor) -> Tensor:
        """Return which of the tokens, of any shape, end a response."""
        return torch.isin(ids, self.stop_token_ids)

    def is_finished(self, ids: Tensor) -> Tensor:
        """Return which rows finish with their last token, (b,) bool, from the ids of responses so far, (b, t)."""
        finished = self.is_stop_token(ids[:, -1])
        return finished if self.matches_stop_string is None else finished | self.matches_stop_string(ids)
