"""What all pages of a server share: who asks, headers, limits, and what an error looks like."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import Database, LabelerAccount
from lit_rlhf.labeling.pages import render_message

MAX_BODY = 2_000_000  # bytes of a form
MAX_FIELDS = 200
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Session(NamedTuple):
    """Who sent a request."""

    labeler: LabelerAccount
    cookie: str
    csrf: str  # the token of this session's forms
    is_new: bool  # whether the cookie is to be set


class Refusal(Exception):
    """A request that is answered by a message."""

    def __init__(self, status: int, heading: str, text: str, **values: Any) -> None:
        super().__init__(text)
        self.status, self.heading, self.text, self.values = status, heading, text, values


class Access:
    """Decides who a request is from.

    Args:
        database: Holds the secrets' hashes.
        only_labeler: Who works here without a link; None if each person has a link.
    """

    def __init__(self, database: Database, only_labeler: LabelerAccount | None) -> None:
        self.database = database
        self.only_labeler = only_labeler
        self.cookie_name = f"lit_rlhf_{database.read_setting('id')}"
        self._key = str(database.read_setting("key")).encode()

    def identify(self, request: Request) -> Session:
        """Return whose request this is.

        Raises:
            Refusal: The link's cookie is missing or no longer valid.
        """
        cookie = request.cookies.get(self.cookie_name, "")
        if self.only_labeler is not None:
            is_new = not cookie
            cookie = cookie or secrets.token_urlsafe(16)
            return Session(self.only_labeler, cookie, self._token(cookie), is_new)
        labeler = self.database.authenticate(cookie) if cookie else None
        if labeler is None:
            raise Refusal(
                401, "Please open your link", "This page needs the link that was made for you. Open it again."
            )
        return Session(labeler, cookie, self._token(cookie), False)

    def check_token(self, session: Session, form: dict[str, str]) -> None:
        """Refuse a form that this session's pages did not make."""
        if session.is_new or not hmac.compare_digest(session.csrf.encode(), form.get("csrf", "").encode()):
            raise Refusal(
                403,
                "Not sent from this page",
                "The form is not of this session: open the page again, then send it again.",
            )

    def log_in(self, secret: str) -> LabelerAccount:
        """Return whose link this is.

        Raises:
            Refusal: It is no one's.
        """
        labeler = self.database.authenticate(secret)
        if labeler is None:
            raise Refusal(401, "This link is not valid", "It may have been replaced by a newer one: ask for it.")
        return labeler

    def set_cookie(self, response: Response, value: str) -> None:
        """Keep a session in the browser, for this site's own requests alone."""
        response.set_cookie(self.cookie_name, value, max_age=90 * 86400, httponly=True, samesite="strict", path="/")

    def _token(self, cookie: str) -> str:
        return hmac.new(self._key, cookie.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form; of a field sent twice, the last.

    Raises:
        Refusal: The body is too long, or is no form.
    """
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise Refusal(415, "Not a form", "This address takes forms.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refusal(413, "Too long", f"A form holds at most {MAX_BODY:,} bytes. Go back and shorten the text.")
    try:
        fields = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace")
    except ValueError:
        raise Refusal(400, "Not a form", "The form cannot be read.") from None
    return dict(fields)


class _Guard:
    """Middleware: refuses unknown hosts, and adds the headers that every response has."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        host = Headers(scope=scope).get("host", "")
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if self.hosts is not None and name.strip("[]") not in self.hosts:
            # another site's name may have been pointed at this machine
            await PlainTextResponse("unknown host", 400)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)


def build_app(routes: Sequence[BaseRoute], hosts: Sequence[str] | None) -> Starlette:
    """Return an app of these pages, with the static files.

    Args:
        routes: The pages.
        hosts: Names under which the server may be asked; None: any.
    """
    static = Mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    return Starlette(
        routes=[*routes, static],
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers={Refusal: _answer_refusal, UserError: _answer_user_error, 404: _answer_missing},
    )


def _answer_refusal(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    if request.headers.get("accept") == "application/json":
        return PlainTextResponse(refusal.text, refusal.status)
    return HTMLResponse(render_message(refusal.heading, refusal.text, **refusal.values), refusal.status)


def _answer_user_error(request: Request, problem: Exception) -> Response:
    text = " ".join(str(problem).split())
    return HTMLResponse(render_message("The server cannot go on", text), 503)


def _answer_missing(request: Request, problem: Exception) -> Response:
    return HTMLResponse(render_message("No such page", "There is nothing at this address.", go="/"), 404)


def see_other(address: str) -> RedirectResponse:
    """Return the answer to a form: look there next."""
    return RedirectResponse(address, 303)


def page_of(function: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for pages that read the database, in a thread."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(function, request)

    return endpoint


def form_of(function: Callable[[Request, dict[str, str]], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for forms, which are read first and then handled in a thread."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(function, request, await read_form(request))

    return endpoint


def page(path: str, function: Callable[[Request], Response]) -> Route:
    """Return the route of a page."""
    return Route(path, page_of(function), methods=["GET"])


def form(path: str, function: Callable[[Request, dict[str, str]], Response]) -> Route:
    """Return the route of a form."""
    return Route(path, form_of(function), methods=["POST"])
