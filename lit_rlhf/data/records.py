"""What a row means, before any tokenizer: the records that every format is converted to."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict


class Message(TypedDict):
    """One turn of a conversation; the role is "system", "user" or "assistant"."""

    role: str
    content: str


class Instruction(NamedTuple):
    """A task description, and the input that it applies to."""

    instruction: str
    input: str = ""


# columns of the turns before a prompt
CONTEXT_COLUMNS = ("system", "system_prompt", "history")


class PromptInContext(NamedTuple):
    """A prompt, and the turns before it that other columns of its row hold: its `system` text, its `history`."""

    prompt: Instruction | list[Message]
    context: list[Message]


# Text is used as it is; the others are rendered by a `PromptTemplate`.
Prompt = str | Instruction | list[Message] | PromptInContext


class Demonstration(NamedTuple):
    """A prompt and the completion to train on."""

    prompt: Prompt
    completion: str
    fields: dict[str, Any] = {}  # all columns of the row, for a user's template
    origin: str = ""  # file and line of the row, for messages
    train_on_all_replies: bool = False  # whether the replies within the prompt, a conversation, are trained on as well


class Ranking(NamedTuple):
    """K completions of one prompt, ranked by one labeler."""

    prompt: Prompt
    completions: list[str]
    ranks: list[int]  # 0 = best; equal = tie
    labeler: str | None = None
    fields: dict[str, Any] = {}
    origin: str = ""


class PromptRow(NamedTuple):
    """A prompt to generate a response to."""

    prompt: Prompt
    fields: dict[str, Any] = {}
    origin: str = ""


class TextRow(NamedTuple):
    """A document."""

    text: str
    origin: str = ""


Record = Demonstration | Ranking | PromptRow | TextRow


def to_plain_text(prompt: Prompt) -> str:
    """Return a prompt as text alone: instruction and input, or the turns, separated by blank lines."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Instruction):
        return "\n\n".join(part for part in prompt if part)
    return "\n\n".join(message["content"] for message in to_messages(prompt))


def to_messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as a conversation: text and instructions become one user turn."""
    if isinstance(prompt, PromptInContext):
        return [*prompt.context, *to_messages(prompt.prompt)]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": to_plain_text(prompt)}]
