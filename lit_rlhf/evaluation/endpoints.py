"""A language model behind an OpenAI-compatible HTTP address, asked one question at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, digest_of_texts
from lit_rlhf.http import JSONClient, NoAnswer

Answer = TypeVar("Answer")


class Endpoint:
    """The chat completions of a service: OpenAI's, or a server of vLLM, llama.cpp, Ollama and others.

    Args:
        url: up to and without `/chat/completions`, such as `http://localhost:8000/v1`.
        model: the model's name there.
        key: name of the environment variable that holds the key; None where none is needed. The key itself never
            stands in a recipe.
        timeout: seconds that one try may take.
        retries: further tries.
        rate: most requests a second; None for no limit.
        parallel: requests under way at once.
        max_tokens: of an answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        rate: float | None = None,
        parallel: int = 4,
        max_tokens: int = 512,
    ) -> None:
        self.url, self.model, self.key, self.max_tokens = url, model, key, max_tokens
        self.timeout, self.retries, self.rate, self.parallel = timeout, retries, rate, parallel

    @property
    def identity(self) -> str:
        """What its answers depend on."""
        return f"{self.url} {self.model}"

    def ask_all(self, questions: Sequence[str], parse: Callable[[str], Answer]) -> Iterator[Answer | NoAnswer]:
        """Yield what `parse` makes of each answer's text; it raises ValueError on one that makes no sense.

        Raises:
            UserError: the environment holds no key, or the service refuses it.
        """
        headers = {"Authorization": f"Bearer {read_key(self.key)}"} if self.key else {}
        client = JSONClient(
            f"{self.url.rstrip('/')}/chat/completions",
            headers,
            timeout=self.timeout,
            retries=self.retries,
            rate=self.rate,
            parallel=self.parallel,
        )
        return client.ask_all([self._payload(question) for question in questions], lambda a: parse(text_of(a)))

    def rows(
        self, label: str, kind: str, questions: Sequence[str], parse: Callable[[str], object], cache: Cache
    ) -> list[Any]:
        """Return what `parse` makes of each answer, as JSON gives it back; None where no usable answer came.

        Args:
            label: for the progress bar.
            kind: of question, as a part of what the cache knows the answers by.
            questions: one each.
            parse: see `ask_all`.
            cache: asks only what it does not know.
        """

        def compute(places: list[int]) -> Iterator[tuple[int, object]]:
            answers = self.ask_all([questions[place] for place in places], parse)
            for place, answer in zip(places, answers):
                yield place, None if isinstance(answer, NoAnswer) else answer

        return cache.rows(label, {kind: self.identity, "of": digest_of_texts(questions)}, len(questions), compute)

    def _payload(self, question: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens, "seed": 0}


def text_of(answer: Any) -> str:
    """Return the text of a chat completion."""
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the message holds no text")
    return text


def read_key(name: str) -> str:
    """Return a key from the environment.

    Raises:
        UserError: it is not there.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} holds no key: set it, or name another one with `key`")
    return key
