"""A JSON client for HTTP services: retries with exponential backoff, time-outs, a rate limit, validated responses.

A request without a usable response returns `RequestFailed`, which the caller counts as missing; no value replaces it.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR, socket
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener
from weakref import WeakSet

from lit_rlhf.errors import UserError

Response = TypeVar("Response")

REFUSED_STATUS = (401, 403)  # the key is wrong, for every request
RETRYABLE_STATUS = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # a retry may succeed
MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError)
READ_SIZE = 2**16  # bytes
MAX_MESSAGE = 400  # characters of a service's own words in an error
MAX_PAUSE, MAX_RETRY_AFTER = 60.0, 600.0  # seconds: of the exponential backoff, and of a service's Retry-After


class RequestFailed(NamedTuple):
    """A request that got no usable response."""

    reason: str
    message: str = ""  # the service's own words, on one line; empty if it gave none


class CredentialsRejected(UserError):
    """The service rejects the key, for every request."""


class NoRedirect(HTTPRedirectHandler):
    """Follows no redirects: credentials would be sent to another address, and a POST would become a GET."""

    def redirect_request(self, *args: Any) -> None:
        """Return None, which makes the status an error."""


class OpenConnections:
    """The connections of a client, which another thread can break off while requests wait on them."""

    def __init__(self) -> None:
        self._sockets: WeakSet[socket] = WeakSet()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.reason: str | None = None  # why they were broken off
        connections = self

        class Tracked(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                connections.add(self.sock)

        class TrackedTLS(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                connections.add(self.sock)

        class Plain(HTTPHandler):
            def http_open(self, request: Request) -> Any:
                return self.do_open(Tracked, request)

        class TLS(HTTPSHandler):
            def https_open(self, request: Request) -> Any:
                return self.do_open(TrackedTLS, request)

        self.opener = build_opener(NoRedirect, Plain, TLS)

    def add(self, connected: socket) -> None:
        """Track a connection."""
        with self._lock:
            self._sockets.add(connected)
        if self.reason is not None:
            self.break_off(self.reason)

    def break_off(self, reason: str) -> None:
        """Shut down all connections, and every later one as soon as it is open."""
        self.reason = reason  # first: what a request then raises is not retried
        self._ended.set()
        with self._lock:
            for each in list(self._sockets):
                with suppress(OSError):
                    each.shutdown(SHUT_RDWR)

    def pause(self, seconds: float) -> None:
        """Wait, until `break_off` at most."""
        self._ended.wait(seconds)


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
        decode: turns the bytes of a response into what `parse` gets; by default they are JSON.
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
        decode: Callable[[bytes], Any] = json.loads,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"url: {url!r} is no http or https address")
        if "@" in urlsplit(url).netloc:
            raise UserError("url: it holds a user name or a password; credentials belong in environment variables")
        if timeout <= 0 or retries < 0 or parallel < 1 or (rate is not None and rate <= 0):
            raise UserError(
                f"{self.without_query(url)}: timeout and rate must be above 0, retries 0 or more, parallel 1 or more"
            )
        self.url, self.headers = url, {"Content-Type": "application/json"}
        for name, value in (headers or {}).items():
            self.headers[name] = value.strip()  # a key from a file may end in a newline
            if not (value.strip().isascii() and value.strip().isprintable()):  # http.client would print it
                raise UserError(f"{self.without_query(url)}: the header {name} cannot hold the key; is it damaged?")
        self.timeout, self.retries, self.pause, self.rate, self.parallel = timeout, retries, pause, rate, parallel
        self.decode = decode
        self._lock, self._next_start = threading.Lock(), 0.0
        self._connections = OpenConnections()

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
        reason = message = ""
        for attempt in range(self.retries + 1):
            if self._connections.reason is not None:
                return RequestFailed(self._connections.reason)
            pause, message = min(self.pause * 2**attempt, MAX_PAUSE), ""
            try:
                self._wait_for_rate()
                return parse(self._send(payload), payload)
            except HTTPError as error:
                reason = f"status {error.code}"
                if error.code in REFUSED_STATUS:
                    raise CredentialsRejected(
                        f"{self.without_query(self.url)} rejects the request (status {error.code}): check the key"
                    ) from None
                message = self._read_message(error)
                if error.code not in RETRYABLE_STATUS:
                    return RequestFailed(reason, message)
                pause = max(pause, min(parse_retry_after(error), MAX_RETRY_AFTER))
            except TimeoutError:
                reason = f"no response within {self.timeout:g} s"
            except (OSError, HTTPException) as error:  # URLError among them
                inner = getattr(error, "reason", error)
                reason = f"no response within {self.timeout:g} s" if isinstance(inner, TimeoutError) else f"{inner}"
            except MALFORMED as error:
                reason = f"malformed response: {type(error).__name__}: {str(error)[:100]}"
            if attempt < self.retries:
                self._connections.pause(pause)
        if self._connections.reason is not None:
            return RequestFailed(self._connections.reason)
        attempts = f" ({self.retries + 1} attempts)" if self.retries else ""
        return RequestFailed(reason + attempts, message)

    def break_off(self, reason: str) -> None:
        """End all requests, those under way and every later one, with `RequestFailed(reason)`; from any thread."""
        self._connections.break_off(reason)

    def request_all(
        self, payloads: Sequence[Any], parse: Callable[[Any, Any], Response]
    ) -> Iterator[Response | RequestFailed]:
        """Yield the response to each payload in order, with up to `parallel` requests at a time; see `request`.

        If the key is rejected or the caller stops, the remaining payloads are not sent.
        """
        try:
            with ThreadPoolExecutor(self.parallel) as pool:
                try:
                    yield from pool.map(lambda payload: self.request(payload, parse), payloads)
                except (KeyboardInterrupt, SystemExit):  # else the pool waits for all attempts and their pauses
                    self.break_off("the program was interrupted")
                    raise
        except (KeyboardInterrupt, SystemExit):
            self._connections = OpenConnections()  # a notebook goes on after an interrupt
            raise

    def _send(self, payload: Any) -> Any:
        body = None if payload is None else json.dumps(payload).encode()
        request = Request(self.url, body, self.headers, method="GET" if body is None else "POST")
        last = time.monotonic() + self.timeout
        with self._connections.opener.open(request, timeout=self.timeout) as response:
            parts = []
            while part := response.read1(READ_SIZE):
                parts.append(part)
                if time.monotonic() > last:  # the time-out of `open` is per read, and some services send blanks
                    raise TimeoutError
            if response.length:  # a truncated number parses as a number
                raise HTTPException(f"a response that ends {response.length} bytes early")
        return self.decode(b"".join(parts))

    def _read_message(self, error: HTTPError) -> str:
        """Return the words in the body of an error, without the credentials that some services repeat in it."""
        try:
            body = json.loads(error.read(READ_SIZE))
        except (OSError, HTTPException, *MALFORMED):
            return ""
        text = find_message(body)
        for name, value in self.headers.items():
            text = text if name == "Content-Type" else text.replace(value.removeprefix("Bearer "), "...")
        return " ".join(text.split())[:MAX_MESSAGE]

    def _wait_for_rate(self) -> None:
        """Wait until the rate limit allows this request."""
        if self.rate is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + 1.0 / self.rate
        self._connections.pause(max(0.0, start - time.monotonic()))


def find_message(body: Any) -> str:
    """Return the text of an error in JSON: `error.message` (OpenAI, vLLM), `error`, `message` or `detail` (FastAPI)."""
    for name in ("error", "message", "detail"):
        inner = body.get(name) if isinstance(body, dict) else None
        if inner:
            return inner if isinstance(inner, str) else find_message(inner) or json.dumps(inner)
    return ""


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
