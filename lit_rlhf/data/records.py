"""What a row means, before any tokenizer: the records that every format is turned into."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict


class Message(TypedDict):
    """One turn of a conversation; the role is "system", "user" or "assistant"."""

    role: str
    content: str


class Instruction(NamedTuple):
    """A task in words, and what it is to be done on."""

    instruction: str
    input: str = ""


# Text is taken as it is; an instruction and a conversation are put into words by a `PromptTemplate`.
Prompt = str | Instruction | list[Message]


class Demonstration(NamedTuple):
    """A prompt and the completion to be learnt."""

    prompt: Prompt
    completion: str
    fields: dict[str, Any] = {}  # all columns of the row, for a user's template
    origin: str = ""
    all_replies: bool = False  # whether the replies within the prompt, a conversation, are to be learnt as well


class Ranking(NamedTuple):
    """K completions of one prompt, ranked by one labeler."""

    prompt: Prompt
    completions: list[str]
    ranks: list[int]  # 0 = best; equal = tie
    labeler: str | None = None
    fields: dict[str, Any] = {}
    origin: str = ""


class PromptRow(NamedTuple):
    """A prompt to be answered."""

    prompt: Prompt
    fields: dict[str, Any] = {}
    origin: str = ""


class TextRow(NamedTuple):
    """A document."""

    text: str
    origin: str = ""


Record = Demonstration | Ranking | PromptRow | TextRow


def plain_text(prompt: Prompt) -> str:
    """A prompt as text and nothing else: instruction and input, or the turns, with blank lines between."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Instruction):
        return "\n\n".join(part for part in prompt if part)
    return "\n\n".join(message["content"] for message in prompt)


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as a conversation: text and instructions are one user turn."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": plain_text(prompt)}]
