"""Answers that say nothing, to be scored against real ones: a reward model that prefers them will be exploited."""

import re
from typing import TYPE_CHECKING

from lit_rlhf.data.prompt_template import find_bos_ids, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEGENERATE_KINDS = {
    "empty": "nothing but the end token",
    "repeated_token": "the real answer's first token over and over, as long as that answer",
    "repeated_sentence": "the real answer's first sentence three times",
    "thanks": "thanks, and no answer",
    "prompt_copied": "the prompt again",
    "refusal": "a refusal",
}
_SENTENCE_PATTERN = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


class DegenerateAnswers:
    """Makes the degenerate answers to a prompt.

    Args:
        tokenizer: the reward model's.
        thanks: the words of thanks.
        refusal: the words of a refusal.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", thanks: str, refusal: str) -> None:
        self.tokenizer = tokenizer
        self.thanks, self.refusal = encode_texts(tokenizer, [thanks, refusal])
        self.bos_ids = find_bos_ids(tokenizer)

    def build(self, prompt_ids: list[int], best_ids: list[int], max_tokens: int) -> dict[str, list[int]]:
        """Return kind -> token ids, each with an end token.

        Args:
            prompt: token ids of the prompt.
            best: of the best real answer, its end token included where it has one.
            limit: most tokens of an answer, at least 1.
        """
        eos = self.tokenizer.eos_token_id
        begun = prompt_ids[: len(self.bos_ids)] == self.bos_ids
        answers = {
            "empty": [],
            "repeated_token": best_ids[:1] * max(len(best_ids) - 1, 3),
            "repeated_sentence": self._repeat_first_sentence(best_ids),
            "thanks": self.thanks,
            "prompt_copied": prompt_ids[len(self.bos_ids) :] if begun else prompt_ids,
            "refusal": self.refusal,
        }
        assert answers.keys() == DEGENERATE_KINDS.keys()
        return {kind: [*ids[: max_tokens - 1], eos] for kind, ids in answers.items()}

    def _repeat_first_sentence(self, best_ids: list[int]) -> list[int]:
        text = self.tokenizer.decode(best_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        sentence = _SENTENCE_PATTERN.match(text)
        first = (sentence.group() if sentence else text).strip()
        return encode_texts(self.tokenizer, [" ".join([first] * 3)])[0]
