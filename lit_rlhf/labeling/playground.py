"""A chat with one or two models in a browser: streamed responses, and a vote that becomes a comparison."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from random import Random
from time import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from lit_rlhf.data.records import Message
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.answers import PREFERENCES, clean_text, flip_preference
from lit_rlhf.labeling.database import Database, ImportedAnswer, LabelerAccount, NewTask
from lit_rlhf.labeling.pages import render_page
from lit_rlhf.labeling.tasks import Content
from lit_rlhf.labeling.web import Access, Refusal, build_app, form, page, see_other

MAX_MESSAGE = 20_000  # characters
MAX_CONVERSATIONS = 100  # kept in memory
POLL_SECONDS = 0.03

# writes the response to a conversation in parts, by calling the function with each
Responder = Callable[[list[Message], Callable[[str], None]], None]


class _StreamedReply:
    """A response while it is written."""

    def __init__(self) -> None:
        self.text, self.error, self.done = "", "", False

    def add(self, part: str) -> None:
        self.text += part


class _Conversation:
    """Turns so far, and the responses to the last one, in the order in which they are shown."""

    def __init__(self, count: int) -> None:
        self.turns: list[Message] = []
        self.replies: list[_StreamedReply] = []
        self.shown = list(range(count))  # shown[i] is the number of the model at place i
        self.revealed: list[str] = []  # after the vote: which model was at which place
        self.started = time()

    def is_repeated(self) -> bool:
        """Return whether both responses are complete and the same text, between which there is no choice."""
        if len(self.replies) < 2 or not all(reply.done for reply in self.replies):
            return False
        first, second = (reply.text.strip() for reply in self.replies)
        return bool(first) and first == second


class _Playground:
    def __init__(
        self, database: Database, labeler: LabelerAccount, models: Sequence[tuple[str, Responder]], seed: int
    ) -> None:
        self.database, self.labeler, self.models = database, labeler, list(models)
        self.access = Access(database, labeler)
        self._random = Random(seed)
        self._conversations: OrderedDict[str, _Conversation] = OrderedDict()
        # a model writes one response at a time, also where both are samples of it
        self._locks = {respond: threading.Lock() for _, respond in models}

    def _find(self, number: str) -> _Conversation:
        if number not in self._conversations:
            raise Refusal(404, "No such conversation", "The server was started again: begin a new one.", go="/")
        return self._conversations[number]

    def _takes_vote(self, conversation: _Conversation) -> bool:
        """Return whether the conversation goes on with a vote: two responses that are not the same text."""
        return len(self.models) == 2 and not conversation.is_repeated()

    def show(self, request: Request) -> Response:
        session = self.access.identify(request)
        number = request.query_params.get("c", "")
        conversation = self._find(number) if number else _Conversation(len(self.models))
        text = render_page(
            "chat",
            csrf=session.csrf,
            number=number,
            conversation=conversation,
            pair=len(self.models) == 2,
            all_done=all(reply.done for reply in conversation.replies),
            can_vote=all(reply.done and reply.text.strip() for reply in conversation.replies),
            takes_vote=self._takes_vote(conversation),
            names=list(dict.fromkeys(name for name, _ in self.models)),
            max_message=MAX_MESSAGE,
        )
        response = HTMLResponse(text)
        if session.is_new:
            self.access.set_cookie(response, session.cookie)
        return response

    def send(self, request: Request, fields: dict[str, str]) -> Response:
        session = self.access.identify(request)
        self.access.check_token(session, fields)
        message = clean_text(fields.get("message", ""))
        if not message.strip() or len(message) > MAX_MESSAGE or "\0" in message:
            raise Refusal(422, "Not sent", f"A message has 1 to {MAX_MESSAGE:,} characters and no NUL.", lost=message)
        number = fields.get("c", "")
        if number:
            conversation = self._find(number)
        else:
            number, conversation = secrets.token_urlsafe(12), _Conversation(len(self.models))
            self._conversations[number] = conversation
            while len(self._conversations) > MAX_CONVERSATIONS:
                self._conversations.popitem(last=False)
        if conversation.replies:
            if self._takes_vote(conversation):
                raise Refusal(409, "Vote first", "Choose which response to go on with.", go=f"/?c={number}")
            if not conversation.replies[0].done:
                raise Refusal(409, "Not yet", "The model is still writing.", go=f"/?c={number}")
            self._continue_with(conversation, 0)
        conversation.turns.append({"role": "user", "content": message})
        self._random.shuffle(conversation.shown)
        conversation.revealed, conversation.started = [], time()
        conversation.replies = [_StreamedReply() for _ in self.models]
        for place, model in enumerate(conversation.shown):
            own = (model, list(conversation.turns), conversation.replies[place])
            threading.Thread(target=self._write, args=own, daemon=True).start()
        return see_other(f"/?c={number}")

    def _write(self, model: int, turns: list[Message], reply: _StreamedReply) -> None:
        try:
            respond = self.models[model][1]
            with self._locks[respond]:
                respond(turns, reply.add)
        except UserError as problem:
            reply.error = str(problem)
        except Exception as problem:  # shown on the page: the thread has no caller
            reply.error = f"{type(problem).__name__}: {problem}"
        finally:
            reply.done = True

    def _continue_with(self, conversation: _Conversation, place: int) -> None:
        conversation.turns.append({"role": "assistant", "content": conversation.replies[place].text})
        conversation.replies = []

    def vote(self, request: Request, fields: dict[str, str]) -> Response:
        session = self.access.identify(request)
        self.access.check_token(session, fields)
        number, value = fields.get("c", ""), fields.get("preference", "")
        conversation = self._find(number)
        if value not in PREFERENCES or len(conversation.replies) != 2 or conversation.is_repeated():
            raise Refusal(422, "No vote", "Choose the first, the second, a tie, or both bad.", go=f"/?c={number}")
        if not all(reply.done and reply.text.strip() for reply in conversation.replies):
            raise Refusal(409, "Not yet", "A vote takes two responses that are complete.", go=f"/?c={number}")
        by_model = [conversation.replies[conversation.shown.index(model)].text for model in range(2)]
        content: Content = {
            "fields": {"prompt": list(conversation.turns)},
            "prompt": list(conversation.turns),
            "completions": by_model,
            "models": [name for name, _ in self.models],
        }
        answer = ImportedAnswer(
            session.labeler.name,
            "answer",
            {"preference": flip_preference(value, conversation.shown)},
            round(time() - conversation.started, 3),
            list(conversation.shown),
        )
        key = f"chat-{number}-{len(conversation.turns)}"
        self.database.import_answers("compare", [NewTask(key, dict(content))], [[answer]])
        conversation.revealed = [self.models[model][0] for model in conversation.shown]
        self._continue_with(conversation, 1 if value == "second" else 0)
        return see_other(f"/?c={number}")

    async def stream(self, request: Request) -> Response:
        await run_in_threadpool(self.access.identify, request)
        conversation = self._find(request.path_params["number"])
        place = request.path_params["place"]
        if place >= len(conversation.replies):
            raise Refusal(404, "Nothing to stream", "That response is complete.")
        return StreamingResponse(_events(conversation.replies[place]), media_type="text/event-stream")


async def _events(reply: _StreamedReply) -> AsyncIterator[str]:
    """Yield what is new of a response, and its end."""
    sent = 0
    while True:
        done = reply.done  # before the text: nothing is added after it is true
        new = reply.text[sent:]
        if new:
            sent += len(new)
            yield f"data: {json.dumps(new)}\n\n"
        if done:
            yield f"event: end\ndata: {json.dumps(reply.error)}\n\n"
            return
        await asyncio.sleep(POLL_SECONDS)


def create_chat_app(
    database: Database,
    labeler: LabelerAccount,
    models: Sequence[tuple[str, Responder]],
    hosts: Sequence[str] | None,
    seed: int = 0,
) -> Starlette:
    """Return the app.

    Args:
        database: Takes the votes, as comparisons.
        labeler: Who votes.
        models: One or two: their names, and what writes their responses. The same twice is two samples of it.
        hosts: Names under which the server may be asked; None: any.
        seed: Of which model comes first.
    """
    playground = _Playground(database, labeler, models, seed)
    return build_app(
        [
            page("/", playground.show),
            form("/send", playground.send),
            form("/vote", playground.vote),
            Route("/stream/{number}/{place:int}", playground.stream, methods=["GET"]),
        ],
        hosts,
    )
