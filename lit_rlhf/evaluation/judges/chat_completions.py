"""Cached requests to HTTP services, and a client for OpenAI-compatible chat completions."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, hash_texts
from lit_rlhf.http import JSONClient, RequestFailed

DEFAULT_REQUEST = {"temperature": 0, "max_tokens": 512, "seed": 0}


def request_rows(
    cache: Cache,
    label: str,
    key: Any,
    payloads: Sequence[Any],
    make_client: Callable[[], JSONClient],
    parse: Callable[[Any, Any], Any],
) -> list[Any]:
    """Return the parsed response to each payload, after a JSON round trip; a `RequestFailed` if there is none.

    Cached responses are not requested again. The number of failures and the commonest reasons are printed.

    Args:
        cache: stores the parsed responses.
        label: for the progress bar and the message.
        key: everything that the responses depend on.
        payloads: one per request.
        make_client: creates the client; called only if a response is missing.
        parse: see `JSONClient.request`.
    """
    failed: dict[int, RequestFailed] = {}

    def compute(indices: list[int]) -> Iterator[tuple[int, Any]]:
        for index, response in zip(indices, make_client().request_all([payloads[index] for index in indices], parse)):
            if isinstance(response, RequestFailed):
                failed[index] = response
            yield index, None if index in failed else response

    rows = cache.get_or_compute_rows(label, key, len(payloads), compute)
    if failed:
        reasons = Counter(failure.reason for failure in failed.values()).most_common(3)
        summary = "; ".join(f"{count:,} {reason}" for reason, count in reasons)
        print(f"{label}: {len(failed):,} of {len(payloads):,} without an answer: {summary}", flush=True)
    return [failed.get(index, row) for index, row in enumerate(rows)]


class ChatCompletions:
    """Client for the chat completions of OpenAI or of a compatible server (vLLM, llama.cpp, Ollama and others).

    Args:
        url: base URL without `/chat/completions`, such as `http://localhost:8000/v1`.
        model: the model's name at the service.
        api_key_env: environment variable that holds the API key, which never belongs in a recipe; None if the service
            needs no key.
        timeout: seconds per try.
        retries: tries after the first.
        rate: maximum requests per second; None for no limit.
        parallel: concurrent requests.
        request: fields of a request in addition to model and messages. It replaces `DEFAULT_REQUEST`, some of whose
            fields a service may refuse.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 4,
        rate: float | None = None,
        parallel: int = 4,
        request: dict[str, Any] | None = None,
    ) -> None:
        self.url, self.model, self.api_key_env = url, model, api_key_env
        self.timeout, self.retries, self.rate, self.parallel = timeout, retries, rate, parallel
        self.request = DEFAULT_REQUEST if request is None else request

    def request_all(
        self, label: str, prompts: Sequence[str], parse: Callable[[str], object], cache: Cache
    ) -> list[Any]:
        """Return the parsed reply to each prompt; see `request_rows`.

        Args:
            label: kind of request; part of the cache key.
            prompts: one user message per request.
            parse: raises ValueError on a malformed reply.
            cache: stores the parsed replies.

        Raises:
            UserError: the environment holds no key, or the service refuses it.
        """
        key = {label: [self.url, self.model, self.request], "of": hash_texts(prompts)}
        payloads = [
            {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.request}
            for prompt in prompts
        ]

        def parse_reply(response: Any, _: Any) -> object:
            return parse(read_message_text(response))

        return request_rows(cache, label, key, payloads, self._make_client, parse_reply)

    def check(self) -> None:
        """Raise a UserError for a bad URL, bad settings or a missing key; nothing is sent."""
        self._make_client()

    def _make_client(self) -> JSONClient:
        return JSONClient(
            f"{self.url.rstrip('/')}/chat/completions",
            {"Authorization": f"Bearer {read_api_key(self.api_key_env)}"} if self.api_key_env else {},
            timeout=self.timeout,
            retries=self.retries,
            rate=self.rate,
            parallel=self.parallel,
        )


def read_message_text(response: Any) -> str:
    """Return the text of a chat completion."""
    text = response["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the message holds no text")
    return text


def parse_json_object(text: str) -> dict[str, Any]:
    """Return the first JSON object in a text; ValueError if there is none."""
    start = text.find("{")
    while start >= 0:
        try:
            value: dict[str, Any] = json.JSONDecoder().raw_decode(text, start)[0]
            return value
        except ValueError:
            start = text.find("{", start + 1)
    raise ValueError(f"no JSON object in {text[:80]!r}")


def read_api_key(name: str) -> str:
    """Return an API key from the environment.

    Raises:
        UserError: the variable is unset or empty.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} holds no key: set it, or name another one with `api_key_env`")
    return key
