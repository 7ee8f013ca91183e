"""From prompts and completions to token ids: the same prompt ids in training, in scoring and in generation.

Prompt and completion are tokenized separately and then concatenated, so a prompt has the same ids whatever follows it,
and nothing is ever decoded and tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_rlhf.data.records import (
    CONTEXT_COLUMNS,
    Instruction,
    Message,
    Prompt,
    PromptInContext,
    to_messages,
    to_plain_text,
)
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("plain", "instruction", "chat")


class PromptTemplate:
    """Renders prompts to text, and encodes text to token ids.

    Without a `template`, text is used as it is ("plain"); an instruction or a conversation is rendered by the
    tokenizer's chat template if there is one ("chat"), else with the headings of `render_instruction_prompt`
    ("instruction"). Each can be chosen by name, and then applies to text as well, which becomes the instruction or the
    user's one message.

    Args:
        tokenizer: The model's tokenizer.
        template: None, "plain", "instruction", "chat", or a jinja template. Its variables are `prompt` (text),
            `instruction`, `input`, `messages`, and every column of the row. One that uses `add_generation_prompt` is a
            chat template: its variables are `messages`, `bos_token` and `eos_token`, and it decides how a reply ends.
            Turns of the columns `system` and `history` are within those variables, unless the template names such a
            column itself.

    Raises:
        UserError: The template has no known name, does not parse, or is "chat" for a tokenizer without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.bos_ids = find_bos_ids(tokenizer)
        self._name = template if template in _NAMES else None
        self._jinja = None if template is None or self._name else _jinja_template(template)
        if self._name == "chat" and not tokenizer.chat_template:
            raise UserError(
                "template: 'chat' needs a tokenizer with a chat template, this one has none; use 'instruction'"
            )
        self._is_chat_jinja = self._jinja is not None and "add_generation_prompt" in str(template)
        self._places_context = self._jinja is not None and bool(_find_variables(str(template)) & set(CONTEXT_COLUMNS))

    def render(self, prompt: Prompt, fields: dict[str, Any] | None = None, origin: str = "") -> str:
        """Render a prompt to the text that the model reads.

        Args:
            prompt: Text, an instruction or a conversation.
            fields: The row's columns, for a jinja template.
            origin: File and line of the row, for messages.

        Raises:
            UserError: The template fails on this row.
        """
        if self.is_chat(prompt):
            messages = to_messages(prompt)
            text = self._render_chat(messages, True, origin)
            for which, message in (("first", messages[0]), ("last", messages[-1])):
                turn = message["content"].strip()
                # a template may shorten an earlier reply (to leave out its reasoning), but no system or user turn
                if turn not in text and (which == "last" or message["role"] == "system"):
                    raise UserError(
                        f"{origin}: the chat template leaves out the {which} turn, which begins {turn[:40]!r}"
                    )
            return text
        if self._jinja is not None:
            return self._render_jinja(prompt, fields or {}, origin)
        if self._name == "plain" or (self._name is None and isinstance(prompt, str)):
            return to_plain_text(prompt)
        return render_instruction_prompt(prompt)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode rendered prompts, each with BOS before it if the tokenizer adds one to a text."""
        return [prepend_bos(ids, self.bos_ids) for ids in encode_texts(self.tokenizer, texts)]

    def encode_replies(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode the replies to prompts, each with a chat template's end of turn after it; EOS is not added."""
        chats = [self.is_chat(prompt) for prompt in prompts]
        end = encode_texts(self.tokenizer, [self.end_of_turn])[0] if any(chats) else []
        return [ids + end if chat else ids for ids, chat in zip(encode_texts(self.tokenizer, texts), chats)]

    def is_chat(self, prompt: Prompt) -> bool:
        """Return whether a prompt is rendered by a chat template."""
        by_default = self._name is None and not isinstance(prompt, str) and bool(self.tokenizer.chat_template)
        return self._is_chat_jinja or self._name == "chat" or (self._jinja is None and by_default)

    @cached_property
    def end_of_turn(self) -> str:
        """The text with which the chat template ends a reply, such as "<|im_end|>", whether or not a turn follows.

        Raises:
            UserError: The template leaves out a reply at the end of a conversation.
        """
        try:
            return self._find_end_of_turn([])
        except UserError:  # a template may need a system turn
            return self._find_end_of_turn([{"role": "system", "content": "Rules."}])

    def _find_end_of_turn(self, before: list[Message]) -> str:
        question: Message = {"role": "user", "content": "Question?"}
        reply: Message = {"role": "assistant", "content": "Reply."}
        complete = self._render_chat([*before, question, reply], False, "template")
        if reply["content"] not in complete:
            raise UserError("template: the chat template leaves out the last turn where that is a reply")
        end = complete.rpartition(reply["content"])[2].strip()
        continued = self._render_chat([*before, question, reply, question], True, "template")
        following = continued.partition(reply["content"])[2].lstrip()
        # some templates always write a generation prompt: that is not the end of a turn
        return end if following.startswith(end) else ""

    def _render_chat(self, messages: list[Message], add_generation_prompt: bool, origin: str) -> str:
        try:
            if self._jinja is not None:
                special_tokens = {name: getattr(self.tokenizer, name) or "" for name in ("bos_token", "eos_token")}
                return str(
                    self._jinja.render(messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens)
                )
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            which = "setting template" if self._jinja is not None else "tokenizer's chat template"
            raise UserError(f"{origin}: the {which} refuses this conversation: {_one_line(error)}") from error
        assert isinstance(text, str)
        return text

    def _render_jinja(self, prompt: Prompt, fields: dict[str, Any], origin: str) -> str:
        if isinstance(prompt, PromptInContext) and self._places_context:
            prompt = prompt.prompt
        instruction = prompt if isinstance(prompt, Instruction) else Instruction(to_plain_text(prompt))
        if isinstance(prompt, PromptInContext) and isinstance(prompt.prompt, Instruction):
            context = to_plain_text(prompt.context)
            instruction = Instruction(f"{context}\n\n{prompt.prompt.instruction}", prompt.prompt.input)
        variables = {
            **fields,
            "prompt": to_plain_text(prompt),
            "instruction": instruction.instruction,
            "input": instruction.input,
            "messages": to_messages(prompt),
        }
        assert self._jinja is not None
        try:
            return str(self._jinja.render(variables))
        except Exception as error:
            raise UserError(f"{origin}: the setting template fails on this row: {_one_line(error)}") from error


def render_instruction_prompt(prompt: Prompt) -> str:
    """Render a prompt with plain headings, for models without a chat template.

    ```
    ### Instruction:
    {instruction}

    ### Input:                 (if there is one)
    {input}

    ### Response:
    ```
    The completion follows on the next line. In a conversation each user turn has the heading "Instruction" and each
    reply "Response"; a system turn has none.
    """
    if isinstance(prompt, PromptInContext):
        return "\n\n".join([*map(_render_turn, prompt.context), render_instruction_prompt(prompt.prompt)])
    if isinstance(prompt, list):
        parts = [_render_turn(message) for message in prompt]
    else:
        instruction, input_text = prompt if isinstance(prompt, Instruction) else Instruction(prompt)
        parts = [f"### Instruction:\n{instruction}"] + ([f"### Input:\n{input_text}"] if input_text else [])
    return "\n\n".join([*parts, "### Response:\n"])


def _render_turn(message: Message) -> str:
    heading = {"user": "### Instruction:\n", "assistant": "### Response:\n", "system": ""}[message["role"]]
    return heading + message["content"]


def _jinja_template(template: str) -> Any:
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if "{{" not in template and "{%" not in template:
        hint = did_you_mean(template, _NAMES) or f"; known are {', '.join(_NAMES)}"
        raise UserError(f"template: {template!r} names no template and holds no {{{{ … }}}}{hint}")
    try:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(f"template: line {error.lineno} does not parse as jinja: {error.message}") from error


def _find_variables(template: str) -> set[str]:
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(template))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts without adding special tokens; one that is spelled out in a text becomes that token."""
    if not texts:
        return []
    # verbose=False: no warning about long texts, which `TruncationPolicy` handles
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prepend_bos(ids: list[int], bos_ids: list[int]) -> list[int]:
    """Put BOS before the ids of a text, unless the text spells it already, as a chat template may."""
    return ids if ids[: len(bos_ids)] == bos_ids else bos_ids + ids


def find_bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a tokenizer puts before every text by default: [BOS] for Llama and OPT, [] for GPT-2.

    Raises:
        UserError: The tokenizer knows no text, or gives a text other ids when it adds special tokens.
    """
    probe = "a" if _encode_text(tokenizer, "a") else _find_text_token(tokenizer)
    bare = _encode_text(tokenizer, probe)
    encoded = tokenizer(probe, return_special_tokens_mask=True, verbose=False)
    complete = list(encoded["input_ids"])
    starts = [n for n in range(len(complete) - len(bare) + 1) if complete[n : n + len(bare)] == bare]
    if not starts:
        raise UserError(f"tokenizer: {probe!r} has the ids {bare} without special tokens, and {complete} with them")
    # several, where the text itself is encoded as BOS: an unknown token may be the same one
    added = list(encoded.get("special_tokens_mask", complete))
    return complete[: next((n for n in starts if all(added[:n]) and not any(added[n : n + len(bare)])), starts[0])]


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _find_text_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an entry of the vocabulary that is encoded as text, for a vocabulary that lacks common letters."""
    added = {str(each) for each in tokenizer.added_tokens_decoder.values()}
    for probe in sorted(set(tokenizer.get_vocab()) - added):
        if _encode_text(tokenizer, probe):
            return probe
    raise UserError("tokenizer: it encodes no entry of its own vocabulary")
