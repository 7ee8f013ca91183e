"""A scorer behind HTTP: batches as JSON, retries with a growing pause, a clear end where it does not answer.

A request is `POST {"prompts": [...], "responses": [...], "rows": [...]}` and its answer `{"scores": [...]}`, one
number a response. Under `send_ids` the request has `prompt_ids` and `response_ids` as well.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.experience import Episodes

WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 60.0  # seconds
LARGEST_ANSWER = 2**26  # bytes
LARGEST_SCORE = 3e38  # of float32


class RemoteReward:
    """Scores by an HTTP server; see `lit_rlhf.rewards.remote` for what is sent and answered.

    A connection that fails, a timeout, and the status codes 408, 425, 429, 500, 502, 503 and 504 are tried again; any
    other answer that is no list of finite numbers, one each, ends the run at once. `prepare` sends an empty batch,
    whose answer must have no scores: a wrong address or token shows before anything is loaded.

    Args:
        url: where to post; without a user name or password.
        batch_size: episodes a request.
        concurrency: requests at the same time, on each rank.
        timeout: seconds to wait for a connection, and for an answer to go on.
        retries: tries after the first.
        backoff: seconds before the second try; doubled for every further one, up to a minute. A `Retry-After` of the
            server counts instead, up to a minute.
        token_variable: environment variable with a bearer token; where it is not set, none is sent.
        send_ids: send the token ids too, for a server with the policy's tokenizer.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        token_variable: str = "LIT_RLHF_REWARD_TOKEN",
        send_ids: bool = False,
    ) -> None:
        self.url, self.shown = url, without_credentials(url)
        if min(batch_size, concurrency) < 1 or timeout <= 0 or min(retries, backoff) < 0:
            raise UserError(
                f"reward {self.shown}: batch_size and concurrency must be at least 1, timeout positive, retries and "
                f"backoff not negative; got {batch_size}, {concurrency}, {timeout}, {retries} and {backoff}"
            )
        self.batch_size, self.concurrency, self.timeout = batch_size, concurrency, timeout
        self.retries, self.backoff, self.send_ids = retries, backoff, send_ids
        self.token_variable = token_variable
        self.opener = build_opener(NoRedirect)
        self.dice = random.Random()  # spreads the ranks' further tries; no result depends on it

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Ask for the scores of nothing."""
        empty: dict[str, list[Any]] = {"prompts": [], "responses": [], "rows": []}
        self.ask(empty | ({"prompt_ids": [], "response_ids": []} if self.send_ids else {}))

    def score(self, episodes: Episodes) -> Tensor:
        """See `RewardSource.score`."""
        threads = ThreadPoolExecutor(self.concurrency)
        try:
            parts = list(threads.map(self.ask, self.requests(episodes)))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return torch.tensor([score for part in parts for score in part], device=episodes.input_ids.device)

    def requests(self, episodes: Episodes) -> Iterator[dict[str, list[Any]]]:
        """Yield what is posted, batch by batch."""
        for start in range(0, len(episodes.responses), self.batch_size):
            rows = slice(start, start + self.batch_size)
            request: dict[str, list[Any]] = {
                "prompts": episodes.prompts[rows],
                "responses": episodes.responses[rows],
                "rows": episodes.rows[rows],
            }
            if self.send_ids:
                ids = [episodes.token_ids(row) for row in range(len(episodes.responses))[rows]]
                request |= {"prompt_ids": [prompt for prompt, _ in ids], "response_ids": [rest for _, rest in ids]}
            yield request

    def ask(self, request: dict[str, list[Any]]) -> list[float]:
        """Post one batch, as often as it takes, and return its scores.

        Raises:
            UserError: no answer after all tries, or an answer that no further try would mend.
        """
        body = json.dumps(request, default=str).encode()
        tries = self.retries + 1
        for number in range(1, tries + 1):
            try:
                return self.read(self.post(body), len(request["responses"]))
            except HTTPError as refusal:
                problem, wait = f"it answered {refusal.code} {refusal.reason}", retry_after(refusal)
                if refusal.code not in WORTH_ANOTHER_TRY:
                    raise UserError(f"reward {self.shown}: {problem}{self.hint(refusal.code)}") from None
            except (URLError, OSError, HTTPException) as failure:  # refused, unknown, timed out, hung up
                reason = failure.reason if isinstance(failure, URLError) else failure
                timed_out = isinstance(reason, TimeoutError)
                problem = f"no answer within {self.timeout:g} s" if timed_out else f"{reason or type(reason).__name__}"
                wait = None
            if number < tries:
                pause = self.backoff * 2 ** (number - 1) * self.dice.uniform(0.5, 1.0)
                time.sleep(min(pause if wait is None else wait, LONGEST_PAUSE))
        raise UserError(
            f"reward {self.shown}: {problem}, {tries} times; is the server up? Raise timeout, retries or backoff, or "
            "lower batch_size"
        )

    def post(self, body: bytes) -> bytes:
        """Post once and return what came back."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        token = os.environ.get(self.token_variable)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        with self.opener.open(Request(self.url, body, headers, method="POST"), timeout=self.timeout) as answer:
            content: bytes = answer.read(LARGEST_ANSWER)
        return content

    def read(self, content: bytes, count: int) -> list[float]:
        """Return the scores of an answer.

        Raises:
            UserError: it is not what was agreed.
        """
        try:
            answer = json.loads(content)
        except ValueError:
            raise UserError(f"reward {self.shown}: the answer is no JSON: {content[:60]!r}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise UserError(f'reward {self.shown}: the answer must be {{"scores": [...]}}, got {content[:60]!r}')
        if len(scores) != count:
            raise UserError(f"reward {self.shown}: {len(scores)} scores for {count} responses; return one each")
        for place, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= LARGEST_SCORE:
                raise UserError(f"reward {self.shown}: score {place} of {count} is {score!r:.40}, no finite number")
        return [float(score) for score in scores]

    def hint(self, code: int) -> str:
        """Return what to mend where the server says no."""
        if code in (401, 403):
            state = "set" if os.environ.get(self.token_variable) else "not set"
            return f"; the bearer token comes from the environment variable {self.token_variable}, which is {state}"
        return "; give the address it moved to" if 300 <= code < 400 else "; check the address and what it expects"


class NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: the token would go to an address that nobody named, and a POST become a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Refuse; the status code becomes an error."""


def without_credentials(url: str) -> str:
    """Return the address as messages may show it: without the query, which may hold a key.

    Raises:
        UserError: it is no http address, or names a user or a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("reward: the url of a RemoteReward must begin with http:// or https:// and name a host")
    place = parts.netloc.rpartition("@")[2]
    if "@" in parts.netloc:
        raise UserError(
            f"reward: the url of {place} holds a user name or password, which would be written to config.yaml; put a "
            "bearer token into the environment variable that token_variable names"
        )
    return f"{parts.scheme}://{place}{parts.path}"


def retry_after(refusal: HTTPError) -> float | None:
    """Return the seconds that the server asks to wait, or None where it does not say."""
    text = (refusal.headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):  # absent, or no date
        return None
