"""One client for services behind HTTP: retries with growing pauses, a time limit, a rate, and answers that are checked.

A request that stays without a usable answer becomes a `NoAnswer`, which the caller counts as missing. Nothing is
ever made up in its place.
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

Answer = TypeVar("Answer")

REFUSED = (401, 403)  # the key is wrong for every request alike
RETRYABLE_STATUS = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # another try may succeed
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError)
READ_AT_ONCE = 2**16  # bytes
LONGEST_PAUSE, LONGEST_WISH = 60.0, 600.0  # seconds: of our own doubling, and that a service may ask for


class RequestFailed(NamedTuple):
    """What stands in place of an answer that did not come."""

    reason: str


class CredentialsRefused(UserError):
    """The service refuses the key, for this request and every other."""


class NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: credentials would go to an address that nobody named, and a POST become a GET."""

    def redirect_request(self, *args: Any) -> None:
        """Refuse; the status becomes an error."""


class JSONClient:
    """Posts JSON to one address, or gets it from there.

    Args:
        url: the address.
        headers: beside the content type; credentials belong here and never into a message.
        timeout: seconds that one try may take.
        retries: further tries after a failure that may pass: no connection, a time-out, status 408, 429 or 5xx, or an
            answer that makes no sense.
        pause: seconds before the second try; each further pause is twice as long, to 60 s. A longer `Retry-After` of
            the service is kept to, up to ten minutes.
        rate: most requests a second, over all threads; None for no limit.
        parallel: requests under way at once.
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
            raise UserError("url: it holds a user name or a password; a credential belongs into the environment")
        if timeout <= 0 or retries < 0 or parallel < 1 or (rate is not None and rate <= 0):
            raise UserError(
                f"{self.public(url)}: timeout and rate must be above 0, retries 0 or more, parallel 1 or more"
            )
        self.url, self.headers = url, {"Content-Type": "application/json", **(headers or {})}
        self.timeout, self.retries, self.pause, self.rate, self.parallel = timeout, retries, pause, rate, parallel
        self._lock, self._next_start = threading.Lock(), 0.0
        self._opener = build_opener(NoRedirect)

    @staticmethod
    def public(url: str) -> str:
        """The address without its query, which may hold a key."""
        return url.split("?")[0]

    def ask(self, payload: Any, parse: Callable[[Any, Any], Answer]) -> Answer | RequestFailed:
        """Post and return the parsed answer, or why there is none.

        Args:
            payload: what is sent as JSON; None asks by GET.
            parse: gets the decoded answer and the payload; raises one of `NONSENSE` on an answer that makes no sense,
                which is tried again.

        Raises:
            CredentialsRefused: status 401 or 403.
        """
        reason = ""
        for attempt in range(self.retries + 1):
            pause = min(self.pause * 2**attempt, LONGEST_PAUSE)
            try:
                self._take_turn()
                return parse(self._send(payload), payload)
            except HTTPError as error:
                reason = f"status {error.code}"
                if error.code in REFUSED:
                    raise CredentialsRefused(
                        f"{self.public(self.url)} refuses the request (status {error.code}): check the key"
                    ) from None
                if error.code not in RETRYABLE_STATUS:
                    return RequestFailed(reason)
                pause = max(pause, min(retry_after(error), LONGEST_WISH))
            except TimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except (OSError, HTTPException) as error:  # URLError among them
                inner = getattr(error, "reason", error)
                reason = f"no answer within {self.timeout:g} s" if isinstance(inner, TimeoutError) else f"{inner}"
            except MALFORMED as error:
                reason = f"an answer that makes no sense: {type(error).__name__}: {str(error)[:100]}"
            if attempt < self.retries:
                time.sleep(pause)
        return RequestFailed(f"{reason} ({self.retries + 1} tries)")

    def ask_all(self, payloads: Sequence[Any], parse: Callable[[Any, Any], Answer]) -> Iterator[Answer | RequestFailed]:
        """Yield the answer to each payload, in their order, with up to `parallel` requests under way; see `ask`.

        Where a refusal is raised, or the caller stops, what was not sent yet stays unsent.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            yield from pool.map(lambda payload: self.ask(payload, parse), payloads)

    def _send(self, payload: Any) -> Any:
        body = None if payload is None else json.dumps(payload).encode()
        request = Request(self.url, body, self.headers, method="GET" if body is None else "POST")
        last = time.monotonic() + self.timeout
        with self._opener.open(request, timeout=self.timeout) as response:
            parts = []
            while part := response.read1(READ_AT_ONCE):
                parts.append(part)
                if time.monotonic() > last:  # the limit of `open` is that of one read, and some services send blanks
                    raise TimeoutError
            if response.length:  # a number that broke off is a number
                raise HTTPException(f"an answer that breaks off {response.length} bytes before its end")
        return json.loads(b"".join(parts))

    def _take_turn(self) -> None:
        """Wait until this request may start under the rate."""
        if self.rate is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 1.0 / self.rate
        time.sleep(max(0.0, start - time.monotonic()))


def retry_after(error: HTTPError) -> float:
    """Seconds that the service asks to wait; 0 where it does not say."""
    text = error.headers.get("Retry-After", "0")
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
