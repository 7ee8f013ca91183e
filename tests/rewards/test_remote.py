"""RemoteReward against a server on the loopback interface, with all its failures."""

import math
from datetime import datetime
from typing import Any

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import RemoteReward
from tests.helpers.episodes import PROMPTS, RESPONSES, make_episodes
from tests.helpers.services import Reply, Request, Service, refused_url, serve

CPU = torch.device("cpu")
TOKEN = "s3cret-t0ken"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_RLHF_REWARD_TOKEN", raising=False)


def make_reward(service: Service, **settings: Any) -> RemoteReward:
    return RemoteReward(f"{service.url}/score", **{"retries": 2, "pause": 0.01, "timeout": 1.0, **settings})


def score_by_words(request: Request, before: int = 0) -> Reply:
    """Score a response by its number of words, minus a tenth of its prompt's."""
    pairs = zip(request.payload["prompts"], request.payload["responses"])
    return Reply({"scores": [len(response.split()) - len(prompt.split()) / 10 for prompt, response in pairs]})


def test_batches_are_posted_and_scores_are_in_order(tokenizer):
    episodes = make_episodes(tokenizer)
    expected = [len(r.split()) - len(p.split()) / 10 for p, r in zip(episodes.prompts, episodes.responses)]
    for batch_size, requests in ((1, 4), (3, 2), (64, 1)):
        with serve(score_by_words) as service:
            scores = make_reward(service, batch_size=batch_size).score(episodes)
            assert scores.tolist() == pytest.approx(expected) and scores.dtype == torch.float32
            assert len(service.requests) == requests
    (request,) = service.requests
    assert request.path == "/score" and set(request.payload) == {"prompts", "responses", "rows"}
    assert request.payload["rows"] == episodes.rows
    assert request.headers["Content-Type"] == "application/json" and "Authorization" not in request.headers


def test_token_ids_are_sent_with_send_ids(tokenizer):
    with serve(score_by_words) as service:
        reward = make_reward(service, send_ids=True)
        reward.prepare(tokenizer, CPU)
        reward.score(make_episodes(tokenizer))
    first, second = (request.payload for request in service.requests)
    assert (first["prompt_ids"], first["response_ids"]) == ([], [])
    assert (second["prompt_ids"], second["response_ids"]) == (PROMPTS, RESPONSES)


def test_rows_may_hold_values_that_json_has_no_type_for(tokenizer):
    with serve(score_by_words) as service:
        make_reward(service).score(make_episodes(tokenizer, [1])._replace(rows=[{"when": datetime(2022, 3, 4)}]))
    assert service.requests[0].payload["rows"] == [{"when": "2022-03-04 00:00:00"}]


def test_the_token_comes_from_the_environment(tokenizer, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    with serve(score_by_words) as service:
        make_reward(service, api_key_env="MY_TOKEN").score(make_episodes(tokenizer))
    assert service.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_prepare_sends_an_empty_batch_and_finds_a_wrong_address(tokenizer):
    with serve(score_by_words) as service:
        make_reward(service).prepare(tokenizer, CPU)
    assert service.requests[0].payload == {"prompts": [], "responses": [], "rows": []}
    with serve(lambda request, before: Reply(status=404)) as service, pytest.raises(UserError) as error:
        make_reward(service).prepare(tokenizer, CPU)
    expected = f"reward {service.url}/score: status 404; is this the address, and is the server up?"
    assert str(error.value) == expected and len(service.requests) == 1


SCORES = [1.0, 2.0, 3.0]
FAILURES = {
    "500": (Reply(status=500), "status 500"),
    "429": (Reply(status=429, headers={"Retry-After": "0.02"}), "status 429"),
    "timeout": (Reply({"scores": [*SCORES, 4.0]}, delay=1.5), "no response within 1 s"),
    "hang up": (Reply(hang_up=True), ""),
    "no JSON": (Reply(b"<html>nonsense</html>"), "malformed response"),
    "a bare list": (Reply([*SCORES, 4.0]), 'it must be {"scores": [...]}'),
    "another name": (Reply({"rewards": [*SCORES, 4.0]}), 'it must be {"scores": [...]}'),
    "no list": (Reply({"scores": 1.0}), 'it must be {"scores": [...]}'),
    "too few": (Reply({"scores": SCORES}), "3 scores for 4 responses; return one each"),
    "too many": (Reply({"scores": [*SCORES, 4.0, 5.0]}), "5 scores for 4 responses"),
    "NaN": (Reply({"scores": [1.0, math.nan, 3.0, 4.0]}), "score 1 of 4 is nan, no finite number"),
    "infinity": (Reply({"scores": [*SCORES, -math.inf]}), "score 3 of 4 is -inf, no finite number"),
    "beyond float32": (Reply({"scores": [*SCORES, 10**400]}), "score 3 of 4 is 1000"),
    "text": (Reply({"scores": [*SCORES, "4.0"]}), "score 3 of 4 is '4.0', no finite number"),
    "null": (Reply({"scores": [None, 1.0, 1.0, 1.0]}), "score 0 of 4 is None, no finite number"),
    "true": (Reply({"scores": [*SCORES, True]}), "score 3 of 4 is True, no finite number"),
}


@pytest.mark.parametrize(("failure", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_temporary_failure_is_retried_and_a_lasting_one_ends_in_one_line(failure, reason, tokenizer):
    episodes = make_episodes(tokenizer)
    with serve(lambda request, before: score_by_words(request) if before == 2 else failure) as service:
        assert len(make_reward(service).score(episodes)) == 4
        assert len(service.requests) == 3
    with serve(lambda request, before: failure) as service, pytest.raises(UserError) as error:
        make_reward(service).score(episodes)
    line = str(error.value)
    assert line.startswith(f"reward {service.url}/score: ") and reason in line and "(3 attempts)" in line
    assert len(service.requests) == 3


def test_a_single_batch_without_scores_ends_the_run(tokenizer):
    episodes = make_episodes(tokenizer)
    bad_prompt = episodes.prompts[2]

    def answer(request: Request, before: int) -> Reply:
        return Reply(status=500) if bad_prompt in request.payload["prompts"] else score_by_words(request)

    with serve(answer) as service, pytest.raises(UserError, match="status 500"):
        make_reward(service, batch_size=1).score(episodes)


def test_a_server_that_is_down(tokenizer):
    refused = r"Connection refused.* \(3 attempts\); is this the address"
    with refused_url() as url, pytest.raises(UserError, match=refused):
        RemoteReward(url, retries=2, pause=0.01).prepare(tokenizer, CPU)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_rejected_token_is_reported_by_its_variable_and_not_shown(status, token, tokenizer, monkeypatch):
    if token:
        monkeypatch.setenv("LIT_RLHF_REWARD_TOKEN", token)
    with serve(lambda request, before: Reply(status=status)) as service, pytest.raises(UserError) as error:
        make_reward(service).score(make_episodes(tokenizer))
    assert str(error.value) == (
        f"reward {service.url}/score rejects the request (status {status}): check the key; it comes from the "
        f"environment variable LIT_RLHF_REWARD_TOKEN, which is {'set' if token else 'not set'}"
    )
    assert len(service.requests) == 1


def test_a_key_in_the_query_is_not_shown(tokenizer):
    with serve(lambda request, before: Reply(status=404)) as service, pytest.raises(UserError) as error:
        RemoteReward(f"{service.url}/score?key=hunter2").score(make_episodes(tokenizer))
    assert f"reward {service.url}/score: status 404" in str(error.value) and "hunter2" not in str(error.value)
    assert service.requests[0].path == "/score?key=hunter2"


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"parallel": 0}, {"timeout": 0}, {"retries": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))}"):
        RemoteReward("http://host", **settings)
