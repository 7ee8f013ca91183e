"""Services behind HTTP: what they answer is kept, why they do not is told. A language model behind an address."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, digest_of_texts
from lit_rlhf.http import JSONClient, RequestFailed

REQUEST = {"temperature": 0, "max_tokens": 512, "seed": 0}


def ask_for_rows(
    cache: Cache,
    label: str,
    key: Any,
    payloads: Sequence[Any],
    connect: Callable[[], JSONClient],
    parse: Callable[[Any, Any], Any],
) -> list[Any]:
    """Return what `parse` makes of the answer to each payload, as JSON gives it back; a `NoAnswer` where none came.

    What the cache knows is not asked again. How many answers did not come, and why, is printed.

    Args:
        cache: keeps the answers.
        label: for the progress bar and the message.
        key: what the answers depend on.
        payloads: one request each.
        connect: makes the client, if there is anything to ask.
        parse: see `JSONClient.ask`.
    """
    failed: dict[int, RequestFailed] = {}

    def compute(places: list[int]) -> Iterator[tuple[int, Any]]:
        for place, answer in zip(places, connect().ask_all([payloads[place] for place in places], parse)):
            if isinstance(answer, RequestFailed):
                failed[place] = answer
            yield place, None if place in failed else answer

    rows = cache.rows(label, key, len(payloads), compute)
    if failed:
        reasons = Counter(answer.reason for answer in failed.values()).most_common(3)
        told = "; ".join(f"{count:,} {reason}" for reason, count in reasons)
        print(f"{label}: {len(failed):,} of {len(payloads):,} without an answer: {told}", flush=True)
    return [failed.get(place, row) for place, row in enumerate(rows)]


class ChatCompletions:
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
        request: fields of a request beside model and messages, in place of `REQUEST`: a service may refuse some.
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
        request: dict[str, Any] | None = None,
    ) -> None:
        self.url, self.model, self.key = url, model, key
        self.timeout, self.retries, self.rate, self.parallel = timeout, retries, rate, parallel
        self.request = REQUEST if request is None else request

    def rows(self, kind: str, questions: Sequence[str], parse: Callable[[str], object], cache: Cache) -> list[Any]:
        """Return what `parse` makes of the text of each answer; see `ask_for_rows`.

        Args:
            kind: of question, as a part of what the cache knows the answers by.
            questions: one each.
            parse: raises ValueError on a text that makes no sense.
            cache: asks only what it does not know.

        Raises:
            UserError: the environment holds no key, or the service refuses it.
        """
        key = {kind: [self.url, self.model, self.request], "of": digest_of_texts(questions)}
        payloads = [
            {"model": self.model, "messages": [{"role": "user", "content": question}], **self.request}
            for question in questions
        ]
        return ask_for_rows(cache, kind, key, payloads, self._connect, lambda answer, _: parse(text_of(answer)))

    def check(self) -> None:
        """Raise early what `rows` would raise of address, settings and key; nothing is sent."""
        self._connect()

    def _connect(self) -> JSONClient:
        return JSONClient(
            f"{self.url.rstrip('/')}/chat/completions",
            {"Authorization": f"Bearer {read_key(self.key)}"} if self.key else {},
            timeout=self.timeout,
            retries=self.retries,
            rate=self.rate,
            parallel=self.parallel,
        )


def text_of(answer: Any) -> str:
    """Return the text of a chat completion."""
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the message holds no text")
    return text


def json_object(text: str) -> dict[str, Any]:
    """Return the first JSON object in a text; ValueError where there is none."""
    start = text.find("{")
    while start >= 0:
        try:
            found: dict[str, Any] = json.JSONDecoder().raw_decode(text, start)[0]
            return found
        except ValueError:
            start = text.find("{", start + 1)
    raise ValueError(f"no JSON object in {text[:80]!r}")


def read_key(name: str) -> str:
    """Return a key from the environment.

    Raises:
        UserError: it is not there.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} holds no key: set it, or name another one with `key`")
    return key
