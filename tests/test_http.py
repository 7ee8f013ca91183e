"""The HTTP client against a stand-in service: what is tried again, what is given up, what is the user's to mend."""

import time
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from urllib.error import HTTPError

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.http import CredentialsRefused, JSONClient, RequestFailed
from tests.helpers.services import Reply, serve

FAST = {"pause": 0.01, "timeout": 0.3, "retries": 2}


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
        Reply({"value": 1}, delay=0.5),
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
def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_no_answer(failure) -> None:
    with serve(lambda request, before: Reply({"value": 7}) if before == 2 else failure) as service:
        assert JSONClient(service.url, **FAST).ask({"text": "x"}, value) == 7.0
        assert len(service.requests) == 3
    with serve(lambda request, before: failure) as service:
        answer = JSONClient(service.url, **FAST).ask({}, value)
        assert isinstance(answer, RequestFailed) and "(3 tries)" in answer.reason
        assert len(service.requests) == 3


def test_a_number_that_broke_off_is_no_answer() -> None:
    with serve(lambda request, before: Reply(b"0.9", headers={"Content-Length": "4"})) as service:
        answer = JSONClient(service.url, **FAST).ask({}, lambda answer, _: float(answer))
    assert answer == RequestFailed("an answer that breaks off 1 bytes before its end (3 tries)")


def test_a_request_that_the_service_cannot_take_is_not_tried_again() -> None:
    with serve(lambda request, before: Reply(status=400)) as service:
        assert JSONClient(service.url, **FAST).ask({}, value) == RequestFailed("status 400")
        assert len(service.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_is_not_in_the_message(status) -> None:
    with (
        serve(lambda request, before: Reply(status=status)) as service,
        pytest.raises(UserError, match=f"refuses the request .status {status}.: check the key") as problem,
    ):
        JSONClient(f"{service.url}/v1?key=secret", {"Authorization": "Bearer secret"}, **FAST).ask({}, value)
    assert "secret" not in str(problem.value)


def test_no_service_at_all_is_no_answer() -> None:
    answer = JSONClient("http://127.0.0.1:9", **FAST).ask({}, value)
    assert isinstance(answer, RequestFailed) and "refused" in answer.reason.lower()


def test_the_service_may_ask_for_patience() -> None:
    replies = [Reply(status=429, headers={"Retry-After": "0.4"}), Reply({"value": 1})]
    with serve(lambda request, before: replies[before]) as service:
        assert JSONClient(service.url, **FAST).ask({}, value) == 1.0
        first, second = (request.time for request in service.requests)
        assert second - first >= 0.4


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds slept, none of which pass."""
    slept: list[float] = []
    monkeypatch.setattr("lit_rlhf.http.time.sleep", slept.append)
    return slept


def test_pauses_double_to_a_minute_whatever_failed(pauses) -> None:
    JSONClient("http://127.0.0.1:9", retries=8, timeout=0.3).ask({}, value)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("wish, kept", [("0.5", [1, 2]), ("90", [90, 90]), ("inf", [600, 600])])
def test_a_wish_for_patience_is_kept_to_where_it_is_longer_up_to_ten_minutes(pauses, monkeypatch, wish, kept) -> None:
    headers = Message()
    headers["Retry-After"] = wish

    def busy(self, payload):
        raise HTTPError(self.url, 429, "busy", headers, None)

    monkeypatch.setattr(JSONClient, "_send", busy)
    JSONClient("http://x", retries=2).ask({}, value)
    assert pauses == kept


def test_it_may_name_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # in whole seconds: 1 to 2 from now
    replies = [Reply(status=503, headers={"Retry-After": later}), Reply({"value": 1})]
    with serve(lambda request, before: replies[before]) as service:
        assert JSONClient(service.url, **FAST).ask({}, value) == 1.0
        first, second = (request.time for request in service.requests)
        assert second - first >= 0.8
    for nonsense in ("soon", "nan", ""):
        replies[0] = Reply(status=503, headers={"Retry-After": nonsense})
        with serve(lambda request, before: replies[before]) as service:
            assert JSONClient(service.url, **FAST).ask({}, value) == 1.0


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status) -> None:
    with serve(lambda request, before: Reply({"value": 1})) as elsewhere:
        away = Reply(status=status, headers={"Location": elsewhere.url})
        with serve(lambda request, before: away) as service:
            answer = JSONClient(service.url, {"Authorization": "Bearer secret"}, **FAST).ask({}, value)
        assert answer == RequestFailed(f"status {status}")
        assert not elsewhere.requests


def test_an_address_with_a_password_is_refused() -> None:
    with pytest.raises(UserError, match="holds a user name or a password") as problem:
        JSONClient("http://me:hunter2@x/score")
    assert "hunter2" not in str(problem.value)


def test_the_rate_holds_over_all_threads_and_answers_come_in_order() -> None:
    with serve(lambda request, before: Reply({"value": request.payload["n"]})) as service:
        client = JSONClient(service.url, rate=40.0, parallel=4, **FAST)
        start = time.monotonic()
        assert list(client.ask_all([{"n": n} for n in range(9)], value)) == list(range(9))
        assert time.monotonic() - start >= 8 / 40 - 0.01


def test_a_refused_key_leaves_the_rest_unsent() -> None:
    with serve(lambda request, before: Reply(status=401)) as service:
        with pytest.raises(CredentialsRefused):
            list(JSONClient(service.url, parallel=2, **FAST).ask_all([{"n": n} for n in range(50)], value))
        assert len(service.requests) < 25


@pytest.mark.parametrize("settings", [{"rate": 0}, {"timeout": 0}, {"parallel": 0}, {"retries": -1}])
def test_settings_that_cannot_be(settings) -> None:
    with pytest.raises(UserError, match="http://x"):
        JSONClient("http://x", **settings)
    with pytest.raises(UserError, match="no http or https address"):
        JSONClient("file:///etc")
