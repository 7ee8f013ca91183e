"""A remote scorer against a server on the loopback interface that fails in every way a server can."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from episodes import PROMPTS, RESPONSES, episodes

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import RemoteReward
from lit_rlhf.rewards import remote as remote_module

TOKEN = "s3cret-t0ken"
Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Server(ThreadingHTTPServer):
    """Answers by a script: one reply a request, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Reply] = [lengths]
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up."""


class Handler(BaseHTTPRequestHandler):
    """Hands a request to the script."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((dict(self.headers), body))
        reply = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        reply(self, body)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


def answer(handler: BaseHTTPRequestHandler, code: int, content: bytes, **headers: str) -> None:
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def lengths(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Score a response by its number of words, less a tenth of its prompt's."""
    scores = [len(r.split()) - len(p.split()) / 10 for p, r in zip(body["prompts"], body["responses"])]
    answer(handler, 200, json.dumps({"scores": scores}).encode())


def refuse(code: int, **headers: str) -> Reply:
    return lambda handler, _: answer(handler, code, b"{}", **headers)


def say(content: Any) -> Reply:
    return lambda handler, _: answer(
        handler, 200, content if isinstance(content, bytes) else json.dumps(content).encode()
    )


def sleep(handler: BaseHTTPRequestHandler, _: Any) -> None:
    time.sleep(0.4)


def hang_up(handler: BaseHTTPRequestHandler, _: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("LIT_RLHF_REWARD_TOKEN", raising=False)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept between tries."""
    slept: list[float] = []
    # the server sleeps by the same module: only the source's name for it is replaced
    clock = type("Clock", (), {"sleep": staticmethod(slept.append)})
    monkeypatch.setattr(remote_module, "time", clock)
    return slept


def remote(server: Server, **settings: Any) -> RemoteReward:
    return RemoteReward(server.url, **{"retries": 2, "backoff": 0.5, "timeout": 5.0, **settings})


def test_batches_are_posted_and_come_back_in_order(server, tokenizer):
    given = episodes(tokenizer)
    expected = [len(r.split()) - len(p.split()) / 10 for p, r in zip(given.prompts, given.responses)]
    for batch_size, requests in ((1, 4), (3, 2), (64, 1)):
        server.requests.clear()
        scores = remote(server, batch_size=batch_size).score(given)
        assert scores.tolist() == pytest.approx(expected) and scores.dtype == torch.float32
        assert len(server.requests) == requests
    (headers, body) = server.requests[0]
    assert set(body) == {"prompts", "responses", "rows"}
    assert body["rows"] == given.rows
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers


def test_token_ids_are_sent_where_asked_for(server, tokenizer):
    remote(server, send_ids=True).score(episodes(tokenizer))
    assert server.requests[0][1]["prompt_ids"] == PROMPTS
    assert server.requests[0][1]["response_ids"] == RESPONSES


def test_rows_may_hold_what_json_does_not_know(server, tokenizer):
    given = episodes(tokenizer, [1])._replace(rows=[{"when": datetime(2022, 3, 4)}])
    remote(server).score(given)
    assert server.requests[0][1]["rows"] == [{"when": "2022-03-04 00:00:00"}]


def test_the_token_comes_from_the_environment_alone(server, tokenizer, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    remote(server, token_variable="MY_TOKEN").score(episodes(tokenizer))
    assert server.requests[0][0]["Authorization"] == f"Bearer {TOKEN}"


def test_prepare_asks_for_nothing_and_finds_a_server_that_says_no(server, tokenizer):
    remote(server).prepare(tokenizer, torch.device("cpu"))
    assert server.requests[0][1] == {"prompts": [], "responses": [], "rows": []}
    server.script = [refuse(404)]
    with pytest.raises(UserError, match="it answered 404 Not Found; check the address and what it expects"):
        remote(server).prepare(tokenizer, torch.device("cpu"))


@pytest.mark.parametrize(
    "fault",
    [refuse(500), refuse(503), refuse(429), refuse(408), hang_up, sleep],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_a_fault_that_passes_is_outlived(fault, server, tokenizer, pauses):
    server.script = [fault, fault, lengths]
    given = episodes(tokenizer)
    scores = remote(server, timeout=0.1 if fault is sleep else 5.0).score(given)
    assert len(scores) == 4 and len(server.requests) == 3
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1.0  # doubled, and spread by up to a half


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (refuse(500), "it answered 500 Internal Server Error, 3 times; is the server up?"),
        (refuse(429), "it answered 429 Too Many Requests, 3 times"),
        (hang_up, ", 3 times; is the server up?"),
        (sleep, "no answer within 0.1 s, 3 times; is the server up? Raise timeout"),
    ],
    ids=["500", "429", "hang_up", "timeout"],
)
def test_a_fault_that_stays_ends_in_one_line(fault, expected, server, tokenizer, pauses):
    server.script = [fault]
    with pytest.raises(UserError) as problem:
        remote(server, timeout=0.1 if fault is sleep else 5.0).score(episodes(tokenizer))
    assert str(problem.value).startswith(f"reward {server.url}: ") and expected in str(problem.value)
    assert len(server.requests) == 3 and len(pauses) == 2  # no pause behind the last


def test_nobody_listens(server, tokenizer, pauses):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=r"Connection refused, 3 times; is the server up\?"):
            RemoteReward(url, retries=2).prepare(tokenizer, torch.device("cpu"))


def test_the_server_says_when_to_come_back(server, tokenizer, pauses):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.script = [
        refuse(429, Retry_After="7"),
        refuse(503, Retry_After=later),
        refuse(429, Retry_After="86400"),
        refuse(429, Retry_After="soon"),
        lengths,
    ]
    remote(server, retries=4).score(episodes(tokenizer))
    assert pauses[0] == 7.0 and 28 <= pauses[1] <= 30 and pauses[2] == 60.0
    assert 2.0 <= pauses[3] <= 4.0  # what it says is no time: the usual pause


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>nonsense</html>", "the answer is no JSON: b'<html>nonsense</html>'"),
        (b"\xff\xfe", "the answer is no JSON"),
        ([1.0, 2.0, 3.0, 4.0], 'the answer must be {"scores": [...]}'),
        ({"rewards": [1.0]}, 'the answer must be {"scores": [...]}'),
        ({"scores": 1.0}, 'the answer must be {"scores": [...]}'),
        ({"scores": [1.0, 2.0, 3.0]}, "3 scores for 4 responses; return one each"),
        ({"scores": [1.0, 2.0, float("nan"), 4.0]}, "score 2 of 4 is nan, no finite number"),
        ({"scores": [1.0, float("inf"), 3.0, 4.0]}, "score 1 of 4 is inf, no finite number"),
        ({"scores": [1.0, 2.0, 3.0, "4.0"]}, "score 3 of 4 is '4.0', no finite number"),
        ({"scores": [None, 2.0, 3.0, 4.0]}, "score 0 of 4 is None, no finite number"),
        ({"scores": [True, 2.0, 3.0, 4.0]}, "score 0 of 4 is True, no finite number"),
        ({"scores": [10**400, 2.0, 3.0, 4.0]}, "score 0 of 4 is 1000"),
    ],
)
def test_an_answer_that_is_none_ends_the_run_at_once(content, expected, server, tokenizer, pauses):
    server.script = [say(content)]
    with pytest.raises(UserError) as problem:
        remote(server).score(episodes(tokenizer))
    assert expected in str(problem.value)
    assert len(server.requests) == 1 and not pauses


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_asked_again(code, server, tokenizer, pauses, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_REWARD_TOKEN", TOKEN)
    server.script = [refuse(code)]
    with pytest.raises(UserError, match=f"it answered {code} ") as problem:
        remote(server).score(episodes(tokenizer))
    assert len(server.requests) == 1 and not pauses
    if code in (401, 403):
        assert "environment variable LIT_RLHF_REWARD_TOKEN, which is set" in str(problem.value)
    assert TOKEN not in str(problem.value)


def test_a_redirect_is_refused_and_the_token_goes_nowhere_else(server, tokenizer, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_REWARD_TOKEN", TOKEN)
    for code in (301, 302, 307, 308):
        server.script, server.requests = [refuse(code, Location=server.url + "/elsewhere")], []
        with pytest.raises(UserError, match=f"it answered {code} .*; give the address it moved to"):
            remote(server).score(episodes(tokenizer))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://me:hunter2@host/score", "the url of host holds a user name or password"),
        ("ftp://host/score", "must begin with http:// or https://"),
        ("host:80", "must begin with http:// or https://"),
        ("http://", "and name a host"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret(url, expected):
    with pytest.raises(UserError) as problem:
        RemoteReward(url)
    assert expected in str(problem.value) and "hunter2" not in str(problem.value)


def test_a_key_in_the_query_is_not_shown(server, tokenizer):
    server.script = [refuse(404)]
    with pytest.raises(UserError, match=f"reward {server.url}: it answered 404") as problem:
        RemoteReward(f"{server.url}?key=hunter2").score(episodes(tokenizer))
    assert "hunter2" not in str(problem.value)


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"backoff": -1}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match="batch_size and concurrency must be at least 1"):
        RemoteReward("http://host", **wrong)
