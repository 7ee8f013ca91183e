"""The HTTP client against a fake service: which failures are retried, given up, or user errors."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from urllib.error import HTTPError

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.http import CredentialsRejected, JSONClient, OpenConnections, RequestFailed
from tests.helpers.services import Reply, Service, refused_url, serve

FAST = {"pause": 0.01, "timeout": 1.0, "retries": 2}


def while_pausing(service: Service, act: Callable[[], None]) -> None:
    """Act half a second after a service has its first request, from another thread."""

    def wait() -> None:
        while not service.requests:
            time.sleep(0.01)
        time.sleep(0.5)
        act()

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture
def restored_sigint() -> Iterator[None]:
    """Python's own handler of SIGINT, which a process of pytest-xdist ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def value(answer, payload):
    return float(answer["value"])


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=429),
        Reply(status=503),
        Reply(b"<html>busy</html>"),
        Reply({"other": 1}),
        Reply({"value": "much"}),
        Reply(b"[" * 10**5),
        Reply(b'{"value": 1' + b"0" * 400 + b"}"),
        Reply(hang_up=True),
        Reply({"value": 1}, delay=1.5),
        Reply({"value": 1}, drip=0.1),
        Reply({"value": 1}, headers={"Content-Length": "99"}),
    ],
    ids=[
        "limit",
        "unavailable",
        "no-JSON",
        "no-value",
        "nonsense",
        "deep",
        "huge",
        "hung-up",
        "slow",
        "dripping",
        "broken-off",
    ],
)
def test_a_temporary_failure_is_retried_and_a_lasting_one_is_reported(failure) -> None:
    with serve(lambda request, before: Reply({"value": 7}) if before == 2 else failure) as service:
        assert JSONClient(service.url, **FAST).request({"text": "x"}, value) == 7.0
        assert len(service.requests) == 3
    with serve(lambda request, before: failure) as service:
        answer = JSONClient(service.url, **FAST).request({}, value)
        assert isinstance(answer, RequestFailed) and "(3 attempts)" in answer.reason
        assert len(service.requests) == 3


def test_a_truncated_number_is_no_response() -> None:
    with serve(lambda request, before: Reply(b"0.9", headers={"Content-Length": "4"})) as service:
        answer = JSONClient(service.url, **FAST).request({}, lambda answer, _: float(answer))
    assert answer == RequestFailed("a response that ends 1 bytes early (3 attempts)")


def test_a_bad_request_is_not_retried() -> None:
    with serve(lambda request, before: Reply(status=400)) as service:
        assert JSONClient(service.url, **FAST).request({}, value) == RequestFailed("status 400")
        assert len(service.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_ends_the_run_and_is_not_in_the_message(status) -> None:
    with (
        serve(lambda request, before: Reply(status=status)) as service,
        pytest.raises(UserError, match=f"rejects the request .status {status}.: check the key") as problem,
    ):
        JSONClient(f"{service.url}/v1?key=secret", {"Authorization": "Bearer secret"}, **FAST).request({}, value)
    assert "secret" not in str(problem.value)


def test_a_missing_service_is_reported() -> None:
    with refused_url() as url:
        answer = JSONClient(url, **FAST).request({}, value)
    assert isinstance(answer, RequestFailed) and "refused" in answer.reason.lower()


def test_retry_after_is_respected() -> None:
    replies = [Reply(status=429, headers={"Retry-After": "0.4"}), Reply({"value": 1})]
    with serve(lambda request, before: replies[before]) as service:
        assert JSONClient(service.url, **FAST).request({}, value) == 1.0
        first, second = (request.time for request in service.requests)
        assert second - first >= 0.4


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were requested; none is waited for."""
    slept: list[float] = []
    monkeypatch.setattr(OpenConnections, "pause", lambda _, seconds: slept.append(seconds))
    return slept


def test_pauses_double_to_a_minute_whatever_failed(pauses) -> None:
    with refused_url() as url:
        JSONClient(url, retries=8, timeout=0.3).request({}, value)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("seconds, expected", [("0.5", [1, 2]), ("90", [90, 90]), ("inf", [600, 600])])
def test_retry_after_is_respected_if_longer_up_to_ten_minutes(pauses, monkeypatch, seconds, expected) -> None:
    headers = Message()
    headers["Retry-After"] = seconds

    def busy(self, payload):
        raise HTTPError(self.url, 429, "busy", headers, None)

    monkeypatch.setattr(JSONClient, "_send", busy)
    JSONClient("http://x", retries=2).request({}, value)
    assert pauses == expected


def test_retry_after_may_be_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # 1 to 2 s from now
    replies = [Reply(status=503, headers={"Retry-After": later}), Reply({"value": 1})]
    with serve(lambda request, before: replies[before]) as service:
        assert JSONClient(service.url, **FAST).request({}, value) == 1.0
        first, second = (request.time for request in service.requests)
        assert second - first >= 0.8
    for nonsense in ("soon", "nan", ""):
        replies[0] = Reply(status=503, headers={"Retry-After": nonsense})
        with serve(lambda request, before: replies[before]) as service:
            assert JSONClient(service.url, **FAST).request({}, value) == 1.0


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status) -> None:
    with serve(lambda request, before: Reply({"value": 1})) as elsewhere:
        away = Reply(status=status, headers={"Location": elsewhere.url})
        with serve(lambda request, before: away) as service:
            answer = JSONClient(service.url, {"Authorization": "Bearer secret"}, **FAST).request({}, value)
        assert answer == RequestFailed(f"status {status}")
        assert not elsewhere.requests


def test_an_address_with_a_password_is_refused() -> None:
    with pytest.raises(UserError, match="holds a user name or a password") as problem:
        JSONClient("http://me:hunter2@x/score")
    assert "hunter2" not in str(problem.value)


def test_the_rate_limit_covers_all_threads_and_responses_are_in_order() -> None:
    with serve(lambda request, before: Reply({"value": request.payload["n"]})) as service:
        client = JSONClient(service.url, rate=40.0, parallel=4, **FAST)
        start = time.monotonic()
        assert list(client.request_all([{"n": n} for n in range(9)], value)) == list(range(9))
        assert time.monotonic() - start >= 8 / 40 - 0.01


def test_a_rejected_key_stops_further_requests() -> None:
    with serve(lambda request, before: Reply(status=401)) as service:
        with pytest.raises(CredentialsRejected):
            list(JSONClient(service.url, parallel=2, **FAST).request_all([{"n": n} for n in range(50)], value))
        assert len(service.requests) < 25


@pytest.mark.parametrize("settings", [{"rate": 0}, {"timeout": 0}, {"parallel": 0}, {"retries": -1}])
def test_invalid_settings(settings) -> None:
    with pytest.raises(UserError, match="http://x"):
        JSONClient("http://x", **settings)
    with pytest.raises(UserError, match="no http or https address"):
        JSONClient("file:///etc")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "too long", "code": 400}}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"detail": "too\n long"}, "too long"),
        ({"detail": [{"loc": ["body", "n"]}]}, '[{"loc": ["body", "n"]}]'),
        ({"message": "the key abcdefgh is odd"}, "the key ... is odd"),
        ({"message": "x" * 999}, "x" * 400),
        (b"<html>", ""),
        ({}, ""),
        ([1], ""),
    ],
)
@pytest.mark.parametrize("status", [400, 500])
def test_the_words_of_a_service_are_kept_without_the_key(status, body, message) -> None:
    with serve(lambda request, before: Reply(body, status=status)) as service:
        client = JSONClient(service.url, {"Authorization": "Bearer abcdefgh"}, **FAST)
        answer = client.request({}, value)
    assert isinstance(answer, RequestFailed) and answer.message == message
    assert answer.reason == ("status 400" if status == 400 else "status 500 (3 attempts)")


def test_requests_under_way_and_later_ones_can_be_broken_off() -> None:
    with serve(lambda request, before: Reply({"value": 1}, delay=20.0 if request.payload else 0.0)) as service:
        client = JSONClient(service.url, timeout=30.0, parallel=3)
        threading.Timer(0.3, client.break_off, ["enough"]).start()
        start = time.monotonic()
        answers = list(client.request_all([{"n": n} for n in range(9)], value))
        assert time.monotonic() - start < 5 and len(service.requests) == 3
        assert answers == [RequestFailed("enough")] * 9
        assert JSONClient(service.url).request({}, value) == 1.0, "another client goes on"


@pytest.mark.parametrize(
    "settings", [{"pause": 30.0}, {"rate": 1 / 30, "pause": 0.01}], ids=lambda each: next(iter(each))
)
def test_a_pause_is_broken_off(settings) -> None:
    """Before the next attempt, or for the rate limit."""
    with serve(lambda request, before: Reply(status=503)) as service:
        client = JSONClient(service.url, retries=1, **settings)
        start = time.monotonic()
        while_pausing(service, lambda: client.break_off("enough"))
        assert client.request({}, value) == RequestFailed("enough")
        assert time.monotonic() - start < 25 and len(service.requests) == 1


def test_what_is_read_may_be_another_format_than_json() -> None:
    with serve(lambda request, before: Reply(b"added")) as service:
        assert JSONClient(service.url, decode=bytes.decode).request({}, lambda text, _: text) == "added"


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_the_end_of_line_of_a_key_file_is_not_sent(end: str) -> None:
    with serve(lambda request, before: Reply({"value": 7})) as service:
        client = JSONClient(service.url, {"Authorization": f"Bearer secret-key{end}"}, **FAST)
        assert client.request({}, value) == 7.0


@pytest.mark.parametrize("key", ["secret\rkey", "secret\x00key", "secret\u20ackey"])
def test_a_key_that_no_header_can_hold_is_not_printed(key: str) -> None:
    with pytest.raises(UserError, match="the header Authorization cannot hold the key") as error:
        JSONClient("http://127.0.0.1:9", {"Authorization": f"Bearer {key}"})
    assert "secret" not in str(error.value)


def test_an_interrupt_does_not_wait_for_the_pauses_of_others(restored_sigint: None) -> None:
    with serve(lambda request, before: Reply(status=503, headers={"Retry-After": "30"})) as service:
        client, start = JSONClient(service.url, retries=3), time.monotonic()
        while_pausing(service, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            next(client.request_all([{}] * 4, value))
            time.sleep(60)  # the signal is late
        assert time.monotonic() - start < 25
    with serve(lambda request, before: Reply({"value": 7})) as service:
        client.url = service.url
        assert client.request({}, value) == 7.0, "a notebook goes on"
