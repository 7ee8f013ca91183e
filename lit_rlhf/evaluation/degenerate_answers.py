"""Degenerate answers to score against real ones: a reward model that prefers them will be exploited."""

import re
from typing import TYPE_CHECKING

from lit_rlhf.data.prompt_template import encode_texts, find_bos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEGENERATE_KINDS = {
    "empty": "nothing but the end token",
    "repeated_token": "the real answer's first token, repeated to the length of that answer",
    "repeated_sentence": "the real answer's first sentence three times",
    "thanks": "thanks, and no answer",
    "prompt_copied": "the prompt again",
    "refusal": "a refusal",
}
_SENTENCE_PATTERN = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


class DegenerateAnswers:
    """Builds the degenerate answers to a prompt.

    Args:
        tokenizer: of the reward model.
        thanks: text of an answer that only thanks.
        refusal: text of a refusal.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", thanks: str, refusal: str) -> None:
        self.tokenizer = tokenizer
        self.thanks, self.refusal = encode_texts(tokenizer, [thanks, refusal])
        self.bos_ids = find_bos_ids(tokenizer)

    def build(self, prompt_ids: list[int], best_ids: list[int], max_tokens: int) -> dict[str, list[int]]:
        """Return the token ids of each kind of answer, ending in the end token.

        Args:
            prompt_ids: token ids of the prompt.
            best_ids: token ids of the best real answer, including its end token, if any.
            max_tokens: maximum tokens of an answer, at least 1.
        """
        eos = self.tokenizer.eos_token_id
        starts_with_bos = prompt_ids[: len(self.bos_ids)] == self.bos_ids
        answers = {
            "empty": [],
            "repeated_token": best_ids[:1] * max(len(best_ids) - 1, 3),
            "repeated_sentence": self._repeat_first_sentence(best_ids),
            "thanks": self.thanks,
            "prompt_copied": prompt_ids[len(self.bos_ids) :] if starts_with_bos else prompt_ids,
            "refusal": self.refusal,
        }
        assert answers.keys() == DEGENERATE_KINDS.keys()
        return {kind: [*ids[: max_tokens - 1], eos] for kind, ids in answers.items()}

    def _repeat_first_sentence(self, best_ids: list[int]) -> list[int]:
        text = self.tokenizer.decode(best_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        match = _SENTENCE_PATTERN.match(text)
        sentence = (match.group() if match else text).strip()
        return encode_texts(self.tokenizer, [" ".join([sentence] * 3)])[0]
