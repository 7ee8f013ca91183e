"""From prompts and completions to token ids: the same prompt ids in training, in scoring and in generation.

Prompt and completion are tokenised separately and then joined, so a prompt has the same ids whatever follows it, and
nothing is ever decoded and tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_rlhf.data.records import Instruction, Message, Prompt, as_messages, plain_text
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("plain", "instruction", "chat")


class PromptTemplate:
    """Puts prompts into words, and words into token ids.

    Without a `template`, text is taken as it is ("plain"); an instruction or a conversation goes through the
    tokenizer's chat template where it has one ("chat"), else through the plain headed form of `instruction_prompt`
    ("instruction"). Either can be asked for by name, and then holds for text as well, which becomes the instruction or
    the user's one message.

    Args:
        tokenizer: The model's tokenizer.
        template: None, "plain", "instruction", "chat", or a jinja template. The template sees `prompt` (text),
            `instruction`, `input`, `messages`, and every column of the row. One that asks for `add_generation_prompt`
            is a chat template: it sees `messages`, `bos_token` and `eos_token`, and says how a reply ends.

    Raises:
        UserError: The template is of no known name, does not parse, or "chat" is asked of a tokenizer without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.leading = bos_ids(tokenizer)
        self._name = template if template in _NAMES else None
        self._jinja = None if template is None or self._name else _jinja_template(template)
        if self._name == "chat" and not tokenizer.chat_template:
            raise UserError(
                "template: 'chat' needs a tokenizer with a chat template, this one has none; use 'instruction'"
            )
        self._own_chat = self._jinja is not None and "add_generation_prompt" in str(template)

    def render(self, prompt: Prompt, fields: dict[str, Any] | None = None, origin: str = "") -> str:
        """The text that the model sees.

        Args:
            prompt: Text, an instruction or a conversation.
            fields: The row's columns, for a jinja template.
            origin: The row's place, for messages.

        Raises:
            UserError: The template fails on this row.
        """
        if self.is_chat(prompt):
            text = self._render_chat(as_messages(prompt), True, origin)
            asked = as_messages(prompt)[-1]["content"].strip()
            if asked not in text:
                raise UserError(f"{origin}: the chat template leaves out the last turn, which begins {asked[:40]!r}")
            return text
        if self._jinja is not None:
            return self._render_jinja(prompt, fields or {}, origin)
        if self._name == "plain" or (self._name is None and isinstance(prompt, str)):
            return plain_text(prompt)
        return instruction_prompt(prompt)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered prompts, begun with what the tokenizer begins a text with (a BOS token, or nothing)."""
        return [self._begun(ids) for ids in encode_texts(self.tokenizer, texts)]

    def _begun(self, ids: list[int]) -> list[int]:
        # a chat template writes its own BOS into the text: it must not be doubled
        count = len(self.leading)
        return ids if ids[:count] == self.leading else self.leading + ids

    def encode_replies(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the replies to prompts, each with what a chat template ends it with; EOS is not added."""
        chats = [self.is_chat(prompt) for prompt in prompts]
        end = encode_texts(self.tokenizer, [self.end_of_turn])[0] if any(chats) else []
        return [ids + end if chat else ids for ids, chat in zip(encode_texts(self.tokenizer, texts), chats)]

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether a prompt goes through a chat template."""
        by_kind = self._name is None and not isinstance(prompt, str) and bool(self.tokenizer.chat_template)
        return self._own_chat or self._name == "chat" or (self._jinja is None and by_kind)

    @cached_property
    def end_of_turn(self) -> str:
        """What the chat template ends a reply with, such as "<|im_end|>", at the end of a conversation and within one.

        Raises:
            UserError: The template leaves out a reply at the end of a conversation.
        """
        question: Message = {"role": "user", "content": "Question?"}
        reply: Message = {"role": "assistant", "content": "Reply."}
        closed = self._render_chat([question, reply], False, "template")
        if reply["content"] not in closed:
            raise UserError("template: the chat template leaves out the last turn where that is a reply")
        end = closed.rpartition(reply["content"])[2].strip()
        going_on = self._render_chat([question, reply, question], True, "template")
        within = going_on.partition(reply["content"])[2].lstrip()
        # a generation prompt that is written without being asked for is no end of a turn
        return end if within.startswith(end) else ""

    def _render_chat(self, messages: list[Message], reply_follows: bool, origin: str) -> str:
        from jinja2 import TemplateError

        try:
            if self._jinja is not None:
                special = {name: getattr(self.tokenizer, name) or "" for name in ("bos_token", "eos_token")}
                return str(self._jinja.render(messages=messages, add_generation_prompt=reply_follows, **special))
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_follows)
        except (TemplateError, ValueError) as error:
            whose = "setting template" if self._jinja is not None else "tokenizer's chat template"
            raise UserError(f"{origin}: the {whose} refuses this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _render_jinja(self, prompt: Prompt, fields: dict[str, Any], origin: str) -> str:
        from jinja2 import TemplateError

        instruction = prompt if isinstance(prompt, Instruction) else Instruction(plain_text(prompt))
        words = {
            **fields,
            "prompt": plain_text(prompt),
            "instruction": instruction.instruction,
            "input": instruction.input,
            "messages": as_messages(prompt),
        }
        assert self._jinja is not None
        try:
            return str(self._jinja.render(words))
        except TemplateError as error:
            raise UserError(f"{origin}: the setting template fails on this row: {error}") from error


def instruction_prompt(prompt: Prompt) -> str:
    """A prompt under plain headings, for models without a chat template.

    ```
    ### Instruction:
    {instruction}

    ### Input:                 (where there is one)
    {input}

    ### Response:
    ```
    The completion follows on the next line. In a conversation each user turn is under "Instruction" and each reply
    under "Response"; a system turn comes first, without a heading.
    """
    if isinstance(prompt, list):
        parts = [_headed_turn(message) for message in prompt]
    else:
        instruction, material = prompt if isinstance(prompt, Instruction) else Instruction(prompt)
        parts = [f"### Instruction:\n{instruction}"] + ([f"### Input:\n{material}"] if material else [])
    return "\n\n".join([*parts, "### Response:\n"])


def _headed_turn(message: Message) -> str:
    heading = {"user": "### Instruction:\n", "assistant": "### Response:\n", "system": ""}[message["role"]]
    return heading + message["content"]


def _jinja_template(template: str) -> Any:
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if "{{" not in template and "{%" not in template:
        near = get_close_matches(template, _NAMES, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_NAMES)}"
        raise UserError(f"template: {template!r} names no template and holds no {{{{ … }}}}; {mend}")
    try:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(f"template: line {error.lineno} does not parse as jinja: {error.message}") from error


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added. A special token spelled out in a text becomes that token."""
    if not texts:
        return []
    # verbose=False: long texts are the length policy's business, not a warning
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before every text of its own accord: [BOS] for Llama and OPT, [] for GPT-2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    raise AssertionError(f"{bare} is not within {whole}")
