"""A JSON client for HTTP services: retries with exponential backoff, time-outs, a rate limit, validated responses.

A request without a usable response returns `RequestFailed`, which the caller counts as missing; no value replaces it.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lit_rlhf.errors import UserError

Response = TypeVar("Response")

REFUSED_STATUS = (401, 403)  # the key is wrong, for every request
RETRYABLE_STATUS = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # a retry may succeed
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError)
READ_SIZE = 2**16  # bytes
MAX_PAUSE, MAX_RETRY_AFTER = 60.0, 600.0  # seconds: of the exponential backoff, and of a service's Retry-After


class RequestFailed(NamedTuple):
    """A request that got no usable response."""

    reason: str


class CredentialsRejected(UserError):
    """The service rejects the key, for every request."""


class NoRedirect(HTTPRedirectHandler):
    """Follows no redirects: credentials would be sent to another address, and a POST would become a GET."""

    def redirect_request(self, *args: Any) -> None:
        """Return None, which makes the status an error."""


class JSONClient:
    """Posts JSON to one address, or gets it from there.

    Args:
        url: the address.
        headers: in addition to the content type; credentials go here, and appear in no message.
        timeout: seconds per attempt.
        retries: further attempts after a temporary failure: no connection, a time-out, a retryable status such as 429
            or 503, or a malformed response.
        pause: seconds before the second attempt, doubled for each further one, at most 60. A longer `Retry-After` of
            the service is respected, up to ten minutes.
        rate: maximum requests per second, over all threads; None for no limit.
        parallel: number of parallel requests.
    """

    def __init__(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        pause: float = 1.0,
        rate: float | None = None,
        parallel: int = 4,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url: {url!r} is no http or https address")
        if "@" in urlsplit(url).netloc:
            raise UserError("url: it holds a user name or a password; credentials belong in environment variables")
        if timeout <= 0 or retries < 0 or parallel < 1 or (rate is not None and rate <= 0):
            raise UserError(
                f"{self.without_query(url)}: timeout and rate must be above 0, retries 0 or more, parallel 1 or more"
            )
        self.url, self.headers = url, {"Content-Type": "application/json", **(headers or {})}
        self.timeout, self.retries, self.pause, self.rate, self.parallel = timeout, retries, pause, rate, parallel
        self._lock, self._next_start = threading.Lock(), 0.0
        self._opener = build_opener(NoRedirect)

    @staticmethod
    def without_query(url: str) -> str:
        """Return the address without its query, which may hold a key."""
        return url.split("?")[0]

    def request(self, payload: Any, parse: Callable[[Any, Any], Response]) -> Response | RequestFailed:
        """Post a payload and return the parsed response, or why there is none.

        Args:
            payload: sent as JSON; None sends a GET request.
            parse: takes the decoded response and the payload; raises one of `MALFORMED` for a response to retry.

        Raises:
            CredentialsRejected: status 401 or 403.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            pause = min(self.pause * 2**attempt, MAX_PAUSE)
            try:
                self._wait_for_rate()
                return parse(self._send(payload), payload)
            except HTTPError as error:
                reason = f"status {error.code}"
                if error.code in REFUSED_STATUS:
                    raise CredentialsRejected(
                        f"{self.without_query(self.url)} rejects the request (status {error.code}): check the key"
                    ) from None
                if error.code not in RETRYABLE_STATUS:
                    return RequestFailed(reason)
                pause = max(pause, min(parse_retry_after(error), MAX_RETRY_AFTER))
            except TimeoutError:
                reason = f"no response within {self.timeout:g} s"
            except (OSError, HTTPException) as error:  # URLError among them
                inner = getattr(error, "reason", error)
                reason = f"no response within {self.timeout:g} s" if isinstance(inner, TimeoutError) else f"{inner}"
            except MALFORMED as error:
                reason = f"malformed response: {type(error).__name__}: {str(error)[:100]}"
            if attempt < self.retries:
                time.sleep(pause)
        return RequestFailed(f"{reason} ({self.retries + 1} attempts)")

    def request_all(
        self, payloads: Sequence[Any], parse: Callable[[Any, Any], Response]
    ) -> Iterator[Response | RequestFailed]:
        """Yield the response to each payload in order, with up to `parallel` requests at a time; see `request`.

        If the key is rejected or the caller stops, the remaining payloads are not sent.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            yield from pool.map(lambda payload: self.request(payload, parse), payloads)

    def _send(self, payload: Any) -> Any:
        body = None if payload is None else json.dumps(payload).encode()
        request = Request(self.url, body, self.headers, method="GET" if body is None else "POST")
        last = time.monotonic() + self.timeout
        with self._opener.open(request, timeout=self.timeout) as response:
            parts = []
            while part := response.read1(READ_SIZE):
                parts.append(part)
                if time.monotonic() > last:  # the time-out of `open` is per read, and some services send blanks
                    raise TimeoutError
            if response.length:  # a truncated number parses as a number
                raise HTTPException(f"a response that ends {response.length} bytes early")
        return json.loads(b"".join(parts))

    def _wait_for_rate(self) -> None:
        """Wait until the rate limit allows this request."""
        if self.rate is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 1.0 / self.rate
        time.sleep(max(0.0, start - time.monotonic()))


def parse_retry_after(error: HTTPError) -> float:
    """Return the seconds of the Retry-After header, 0 if there is none."""
    text = error.headers.get("Retry-After", "0")
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
