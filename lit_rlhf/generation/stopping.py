"""Where a response ends: at an end token of the model, at a further stop id, or with a stop string."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams

#: takes the ids of responses so far, (b, t); returns which of them end here by their text, (b,) bool
StopStringMatcher = Callable[[Tensor], Tensor]


def stop_token_ids(model: PreTrainedModel, sampling: SamplingParams) -> Tensor:
    """Return the tokens that end a response, (any number,) int64, on the model's device.

    The end token of its configuration, those of its generation configuration where there are several (chat models
    end a turn and a text with different ones), and `sampling.stop_ids`.

    Raises:
        UserError: a stop id that the model has not.
    """
    size = model.config.get_text_config().vocab_size
    strange = [token for token in sampling.stop_token_ids if not 0 <= token < size]
    if strange:
        raise UserError(f"sampling.stop_ids: {strange[0]} is not in the model's vocabulary of {size:,} tokens")
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = listed if isinstance(listed, list) else []
    ids = sorted({model.config.eos_token_id, *own, *sampling.stop_token_ids})
    return torch.tensor(ids, dtype=torch.long, device=model.device)


def stop_string_matcher(tokenizer: Tokenizer, sampling: SamplingParams) -> StopStringMatcher | None:
    """Return what finds the stop strings in responses, or None where there are none.

    The engines know ids only; this is where the tokenizer comes in. A string is looked for in the text of the last
    tokens, as many as it can be written with; special tokens have no text.
    """
    if not sampling.stop_strings:
        return None
    # a token that shows holds a byte or more; one more in front, whose leading space a decoder may strip
    window = max(len(text.encode()) for text in sampling.stop_strings) + 1
    hidden = set(tokenizer.all_special_ids)

    def ends(ids: Tensor) -> Tensor:
        tails = [[token for token in row if token not in hidden][-window:] for row in ids.tolist()]
        texts = tokenizer.batch_decode(tails)
        found = [any(stop in text for stop in sampling.stop_strings) for text in texts]
        return torch.tensor(found, device=ids.device)

    return ends


class StoppingCriteria:
    """Both together, for an engine: which rows end with the token drawn last.

    Args:
        model: the policy.
        sampling: its stop ids, and whether there are stop strings.
        matches_stop_string: `stop_string_matcher` of the tokenizer; needed where there are stop strings.
    """

    def __init__(
        self, model: PreTrainedModel, sampling: SamplingParams, matches_stop_string: StopStringMatcher | None = None
    ) -> None:
        if sampling.stop_strings and matches_stop_string is None:
            raise UserError("sampling.stop_strings: nothing here knows their tokens; use sampling.stop_ids")
        self.stop_token_ids, self.matches_stop_string = stop_token_ids(model, sampling), matches_stop_string

    def is_finished(self, ids: Tensor) -> Tensor:
        """Return which rows end with their last token, (b,) bool, of the ids of responses so far, (b, t)."""
        ended = torch.isin(ids[:, -1], self.stop_token_ids)
        return ended if self.matches_stop_string is None else ended | self.matches_stop_string(ids)
