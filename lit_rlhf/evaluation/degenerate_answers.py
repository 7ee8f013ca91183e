"""Answers that say nothing, to be scored against real ones: a reward model that prefers them will be exploited."""

import re
from typing import TYPE_CHECKING

from lit_rlhf.data.prompt_template import bos_ids, encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {
    "empty": "nothing but the end token",
    "repeated_token": "the real answer's first token over and over, as long as that answer",
    "repeated_sentence": "the real answer's first sentence three times",
    "thanks": "thanks, and no answer",
    "prompt_copied": "the prompt again",
    "refusal": "a refusal",
}
_SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


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
        self.leading = bos_ids(tokenizer)

    def to(self, prompt: list[int], best: list[int], limit: int) -> dict[str, list[int]]:
        """Return kind -> token ids, each with an end token.

        Args:
            prompt: token ids of the prompt.
            best: of the best real answer, its end token included where it has one.
            limit: most tokens of an answer, at least 1.
        """
        eos = self.tokenizer.eos_token_id
        begun = prompt[: len(self.leading)] == self.leading
        answers = {
            "empty": [],
            "repeated_token": best[:1] * max(len(best) - 1, 3),
            "repeated_sentence": self._repeated_sentence(best),
            "thanks": self.thanks,
            "prompt_copied": prompt[len(self.leading) :] if begun else prompt,
            "refusal": self.refusal,
        }
        assert answers.keys() == KINDS.keys()
        return {kind: [*ids[: limit - 1], eos] for kind, ids in answers.items()}

    def _repeated_sentence(self, best: list[int]) -> list[int]:
        text = self.tokenizer.decode(best, skip_special_tokens=True)
        assert isinstance(text, str)
        sentence = _SENTENCE.match(text)
        first = (sentence.group() if sentence else text).strip()
        return encode_texts(self.tokenizer, [" ".join([first] * 3)])[0]
