"""The labeling server: a page with the next task, the forms that answer it, and the overview."""

from __future__ import annotations

from typing import NamedTuple

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from lit_rlhf.errors import UserError
from lit_rlhf.labeling.answers import SKIP_REASONS, IncompleteAnswer, clean_text, fill_form, read_answer
from lit_rlhf.labeling.database import OWNER, Action, Database, Kind, LabelerAccount
from lit_rlhf.labeling.overview import build_overview
from lit_rlhf.labeling.pages import render_message, render_page, render_task
from lit_rlhf.labeling.text import render_markdown
from lit_rlhf.labeling.web import Access, Refusal, Session, build_app, form, page, see_other

_NOTES = {
    "surplus": (
        "The time for that task had run out and others had answered it. Your answer is kept, but not among its labels."
    ),
    "repeated": "That task was answered already; it counts once. To change an answer, use Undo.",
    "undone": "The last answer is taken back. Here is its task again.",
}


class LabelSettings(NamedTuple):
    """What a labeling server shows."""

    kind: Kind
    instructions: str  # Markdown
    only_labeler: LabelerAccount | None = None  # who works here without a link; None if each person has a link
    hosts: tuple[str, ...] | None = None  # names under which the server may be asked; None: any


def create_label_app(database: Database, settings: LabelSettings) -> Starlette:
    """Return the app."""
    server = _LabelServer(database, settings)
    return build_app(
        [
            page("/", server.show_task),
            form("/answer", server.take_answer),
            form("/draft", server.keep_draft),
            form("/undo", server.undo),
            page("/instructions", server.show_instructions),
            page("/login/{secret}", server.log_in),
            page("/overview", server.show_overview),
        ],
        settings.hosts,
    )


class _LabelServer:
    def __init__(self, database: Database, settings: LabelSettings) -> None:
        self.database, self.settings = database, settings
        self.access = Access(database, settings.only_labeler)
        self.instructions = render_markdown(settings.instructions)

    def _respond(self, session: Session, text: str, status: int = 200) -> Response:
        response = HTMLResponse(text, status)
        if session.is_new:
            self.access.set_cookie(response, session.cookie)
        return response

    def show_task(self, request: Request) -> Response:
        session = self.access.identify(request)
        if session.labeler.role == OWNER:
            return see_other("/overview")
        return self._show_task(session, note=_NOTES.get(request.query_params.get("note", "")))

    def _show_task(self, session: Session, note: str | None = None) -> Response:
        kind, labeler = self.settings.kind, session.labeler
        lease = self.database.claim(kind, labeler)
        undo = self.database.last_answer(kind, labeler)
        if lease is None:
            text = "There is no task left for you. Thank you."
            if self.settings.only_labeler:
                text += f" Export the answers: lit-rlhf label export {self.database.path} --to FILE"
            return self._respond(session, render_message("All done", text, undo=undo, csrf=session.csrf))
        return self._respond(session, self._render(session, lease, lease.draft or {}, undo, note, None))

    def _render(self, session, lease, filled, undo, note, error) -> str:  # type: ignore[no-untyped-def]
        work = self.database.labeler_progress(self.settings.kind, session.labeler)
        all_tasks = self.database.progress(self.settings.kind)
        if self.settings.only_labeler is not None:
            done, total = work.answered, max(all_tasks.labels_wanted + work.gold_tasks, work.answered)
            progress = f"{done:,} of {total:,}"
        else:
            done, total = all_tasks.labels, all_tasks.labels_wanted
            progress = f"{work.answered:,} by you · {done:,} of {total:,} in all"
        if work.median_seconds is not None:
            progress += f" · {work.median_seconds:.0f} s a task"
        return render_task(
            lease,
            filled,
            csrf=session.csrf,
            instructions=self.instructions,
            progress=progress,
            done=done,
            total=max(total, 1),
            undo=undo,
            note=note,
            error=error,
        )

    def take_answer(self, request: Request, fields: dict[str, str]) -> Response:
        try:
            return self._take_answer(request, fields)
        except UserError as problem:  # a full disk, a database that is held: nothing of the form is lost
            text = f"Your answer is not kept yet. {' '.join(str(problem).split())}"
            message = render_message("Not kept", text, form=fields, action="/answer")
            return HTMLResponse(message, 503)

    def _take_answer(self, request: Request, fields: dict[str, str]) -> Response:
        session = self.access.identify(request)
        self.access.check_token(session, fields)
        token = fields.get("lease", "")
        action: Action = "skip" if fields.get("action") == "skip" else "answer"
        lease = self.database.find_lease(token, session.labeler)
        seconds = _read_seconds(fields.get("seconds", ""))
        if lease is None:  # answered before, or never given; `submit` says which
            return self._go_on(self.database.submit(token, session.labeler, action, {}, seconds), fields)
        try:
            if action == "skip":
                reason = fields.get("reason", "")
                if reason not in SKIP_REASONS:
                    raise IncompleteAnswer("To skip the task, choose why: open Skip again.")
                content = {"reason": reason}
            else:
                content = read_answer(lease, fields)
        except IncompleteAnswer as missing:
            undo = self.database.last_answer(self.settings.kind, session.labeler)
            return self._respond(session, self._render(session, lease, fields, undo, None, str(missing)), 422)
        return self._go_on(self.database.submit(token, session.labeler, action, content, seconds), fields)

    def _go_on(self, outcome: str, fields: dict[str, str]) -> Response:
        if outcome == "unknown":
            lost = clean_text(fields.get("completion", ""))
            text = "This task is not assigned to you in this database. Go on to the next one."
            return HTMLResponse(render_message("Not your task", text, lost=lost or None), 409)
        return see_other("/" + (f"?note={outcome}" if outcome in _NOTES else ""))

    def keep_draft(self, request: Request, fields: dict[str, str]) -> Response:
        session = self.access.identify(request)
        self.access.check_token(session, fields)
        kept = {name: clean_text(value) for name, value in fields.items() if name not in ("csrf", "lease", "action")}
        is_kept = self.database.keep_draft(fields.get("lease", ""), session.labeler, kept)
        if request.headers.get("accept") == "application/json":
            return Response(status_code=204 if is_kept else 409)
        if not is_kept:
            raise Refusal(
                409, "The draft is not kept", "The time for this task has run out.", lost=kept.get("completion")
            )
        return see_other("/")

    def undo(self, request: Request, fields: dict[str, str]) -> Response:
        session = self.access.identify(request)
        self.access.check_token(session, fields)
        answer = fields.get("answer", "")
        last = self.database.last_answer(self.settings.kind, session.labeler)
        if last is None or answer != str(last):  # undone before, in another window
            return see_other("/")
        own = self.database.find_answer(last)
        self.database.undo(last, session.labeler, fill_form(own.kind, own.content, own.shown))
        return see_other("/?note=undone")

    def show_instructions(self, request: Request) -> Response:
        session = self.access.identify(request)
        return self._respond(session, render_page("instructions", instructions=self.instructions))

    def log_in(self, request: Request) -> Response:
        secret = request.path_params["secret"]
        labeler = self.access.log_in(secret)
        # a page, not a redirect: a browser would not send a strict cookie along with one that began at another site
        response = HTMLResponse(render_message(f"Hello {labeler.name}", "One moment.", go="/"))
        self.access.set_cookie(response, secret)
        return response

    def show_overview(self, request: Request) -> Response:
        session = self.access.identify(request)
        if session.labeler.role != OWNER and self.settings.only_labeler is None:
            raise Refusal(403, "Not for labelers", "This page is for whoever runs the labeling.")
        overview = build_overview(self.database, self.settings.kind)
        live = request.query_params.get("live") != "0"
        return self._respond(session, render_page("overview", overview=overview, live=live))


def _read_seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value >= 0 else None  # false for nan
