"""How prompt and response become the tokens that someone's reward model was trained on."""

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.records import Message, to_plain_text
from lit_rlhf.errors import UserError
from lit_rlhf.models.sequence_classifier import Features
from lit_rlhf.rollout.experience import Episodes
from lit_rlhf.suggestions import did_you_mean

FORMATS = ("chat", "pair", "concat", "response")


class ConversationFormat:
    """Renders the conversation of an episode, and encodes it with the reward model's own tokenizer.

    | template | text |
    |---|---|
    | `chat` | the conversation with the response as the last turn, by the tokenizer's chat template |
    | a jinja template | the same by this one; its variables are `messages`, `bos_token`, `eos_token` |
    | `pair` | prompt and response as a pair of texts, such as `[CLS] prompt [SEP] response [SEP]` |
    | `concat` | the prompt, immediately followed by the response |
    | `response` | the response alone |

    The last three add the special tokens that the tokenizer adds to a text; a chat template spells them itself.

    Args:
        tokenizer: The reward model's.
        template: See above; None is `chat`, for a tokenizer that has a chat template.
        max_length: Tokens of the longest row; a longer one loses its beginning. None: no limit.
        name: The reward, for messages.

    Raises:
        UserError: No such template, none is chosen for a tokenizer without one, or `max_length` is too short.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, max_length: int | None, name: str) -> None:
        choices = f"choose one of {', '.join(FORMATS)}, or a jinja template"
        if template is None and not tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template, so set template: {choices} (docs/rewards.md)")
        template = template or "chat"
        is_jinja = "{{" in template or "{%" in template
        if template not in FORMATS and not is_jinja:
            raise UserError(f"{name}: template {template!r} is unknown{did_you_mean(template, FORMATS)}; {choices}")
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(f"{name}: template is 'chat', and its tokenizer has no chat template; {choices}")
        if max_length is not None and max_length < 8:
            raise UserError(f"{name}: max_length must be at least 8, got {max_length}")
        self.tokenizer, self.name, self.max_length = copy.deepcopy(tokenizer), name, max_length
        self.tokenizer.truncation_side = "left"  # what was answered must not be cut off
        self.template, self.chat_template = template, template if is_jinja else None

    def encode(self, episodes: Episodes) -> tuple[list[Features], list[bool]]:
        """Return the tokens of each episode, and whether it lost its beginning."""
        special = self.template in FORMATS and self.template != "chat"
        if self.template == "pair":
            texts = [self.prompts(episodes), episodes.responses]
        else:
            texts = [[self._render(*each) for each in zip(episodes.conversations(), episodes.responses)]]
        rows = self._tokenize(texts, add_special_tokens=special)
        cut = [self.max_length is not None and len(row["input_ids"]) > self.max_length for row in rows]
        for index, row in enumerate(rows):
            if cut[index]:
                one = [[column[index]] for column in texts]
                limit: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
                (rows[index],) = self._tokenize(one, add_special_tokens=special, **limit)
            if not row["input_ids"]:
                raise UserError(f"{self.name}: the response {episodes.responses[index]!r:.80} has no token to score")
        return rows, cut

    def prompts(self, episodes: Episodes) -> list[str]:
        """Return the prompts as plain text: their turns, separated by blank lines."""
        return [to_plain_text(messages) for messages in episodes.conversations()]

    def _render(self, messages: list[Message], response: str) -> str:
        if self.template == "response":
            return response
        if self.template == "concat":
            return to_plain_text(messages) + response
        turns = [*messages, {"role": "assistant", "content": response}]
        try:
            return str(self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, tokenize=False))
        except Exception as error:  # a template is a program of its own: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.name}: its chat template refuses the conversation that begins "
                f"{messages[0]['content'][:40]!r}: {reason}"
            ) from error

    def _tokenize(self, texts: list[list[str]], **settings: Any) -> list[Features]:
        encoded = self.tokenizer(*texts, verbose=False, **settings)
        return [{name: encoded[name][index] for name in encoded} for index in range(len(texts[0]))]
