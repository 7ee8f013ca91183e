"""Reward sources: a user's function, a weighted sum, and a reward model, read at the right token in any batch."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.rewards import FunctionReward, RewardModelScorer, WeightedSum
from tests.helpers.episodes import PROMPTS, RESPONSES, episodes

CPU = torch.device("cpu")
MINE = """
import asyncio

LIMIT = 3


def brevity(prompts, responses, rows):
    return [-len(response.split()) for response in responses]


def place(prompts, responses, rows):
    return [row["place"] for row in rows]


def one_short(prompts, responses, rows):
    return [0.0] * (len(responses) - 1)


def undecided(prompts, responses, rows):
    return [None for _ in responses]


async def later(prompts, responses, rows):
    await asyncio.sleep(0)
    return [2.0 * row["place"] for row in rows]


def of_one(prompt, response, row):
    return 10 * row["place"] + len(prompt.split())


RUNNING = []
MOST = []


async def of_one_later(prompt, response, row):
    RUNNING.append(row["place"])
    MOST.append(len(RUNNING))
    await asyncio.sleep(0.01 * (4 - row["place"]))  # the last is the first to end
    RUNNING.remove(row["place"])
    return row["place"]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's own file."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def test_a_function_of_the_users_own_gets_texts_and_rows(mine, tokenizer):
    for name, expected in (("brevity", [-1.0, -4.0, -2.0, 0.0]), ("place", [0.0, 1.0, 2.0, 3.0])):
        source = FunctionReward(f"my_rewards.{name}")
        source.prepare(tokenizer, CPU)
        assert source.score(episodes(tokenizer)).tolist() == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my_rewards.brevit", "my_rewards has no 'brevit' (did you mean 'brevity'?)"),
        ("my_reward.brevity", "there is no module 'my_reward' here"),
        ("brevity", "'brevity' is not a dotted path such as my_file.my_function"),
        ("my_rewards.LIMIT", "'my_rewards.LIMIT' is a int, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(mine, path, expected):
    with pytest.raises(UserError) as refusal:
        FunctionReward(path)
    assert expected in str(refusal.value)


def test_scores_that_are_missing_or_no_numbers_are_refused(mine, tokenizer):
    with pytest.raises(UserError, match=r"reward my_rewards\.one_short: 3 scores for 4 responses"):
        FunctionReward("my_rewards.one_short").score(episodes(tokenizer))
    with pytest.raises(UserError, match=r"reward my_rewards\.undecided: a score is no number"):
        FunctionReward("my_rewards.undecided").score(episodes(tokenizer))


def test_a_function_may_be_async_and_may_take_one_episode(mine, tokenizer):
    given = episodes(tokenizer)
    assert FunctionReward("my_rewards.later").score(given).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert FunctionReward("my_rewards.of_one", batched=False).score(given).tolist() == [3.0, 11.0, 25.0, 32.0]
    for concurrency in (2, 8):
        source = FunctionReward("my_rewards.of_one_later", batched=False, concurrency=concurrency)
        assert source.score(given).tolist() == [0.0, 1.0, 2.0, 3.0]
        most = sys.modules["my_rewards"].MOST
        assert max(most) == min(concurrency, 4)
        most.clear()


def test_an_async_function_is_waited_for_where_a_loop_is_running(mine, tokenizer):
    async def notebook() -> list[float]:
        return FunctionReward("my_rewards.later").score(episodes(tokenizer)).tolist()

    assert asyncio.run(notebook()) == [0.0, 2.0, 4.0, 6.0]


def test_a_function_of_one_episode_given_a_batch_is_told_so(mine, tokenizer):
    (mine / "my_rewards.py").write_text("def one(prompt, response, row):\n    return 1.0\n")
    with pytest.raises(UserError, match=r"must return a list of scores, not 1\.0; .* set batched: false"):
        FunctionReward("my_rewards.one").score(episodes(tokenizer))


def test_a_weighted_sum_is_one(mine, tokenizer):
    source = WeightedSum([FunctionReward("my_rewards.brevity"), FunctionReward("my_rewards.place")], [0.5, 10.0])
    source.prepare(tokenizer, CPU)
    assert source.score(episodes(tokenizer)).tolist() == [-0.5, 8.0, 19.0, 30.0]


def test_a_weighted_sum_needs_a_weight_for_every_source(mine):
    with pytest.raises(UserError, match="2 weights for 1 sources"):
        WeightedSum([FunctionReward("my_rewards.brevity")], [1.0, 2.0])
    with pytest.raises(UserError, match="0 weights for 0 sources"):
        WeightedSum([], [])


def test_a_source_may_ask_for_the_token_ids_of_a_row(tokenizer):
    given = episodes(tokenizer)
    assert [given.token_ids(row) for row in range(4)] == list(zip(PROMPTS, RESPONSES))


@pytest.fixture(scope="module")
def reward_model(model_folders, tokenizer, tmp_path_factory) -> str:
    """A centred reward model's folder."""
    folder = tmp_path_factory.mktemp("reward_model")
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig())
    model.center(0.3, 2.0)
    export_model(model, tokenizer, folder)
    return str(folder)


def prepared(folder: str, tokenizer: Any, **settings: Any) -> RewardModelScorer:
    source = RewardModelScorer(folder, **settings)
    source.prepare(tokenizer, CPU)
    return source


def test_a_score_is_read_at_the_last_token_in_any_batch(reward_model, tokenizer):
    model = load_scalar_model(reward_model, tokenizer, ModelLoadingConfig()).eval()
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):  # one row, without padding: the last position of the raw scalar
        ids = torch.tensor([prompt + response])
        expected.append(float(model(ids, torch.ones_like(ids))[0, -1].detach()))
    for batch_size in (1, 3, 64):
        scores = prepared(reward_model, tokenizer, batch_size=batch_size).score(episodes(tokenizer))
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert not scores.requires_grad
    source = prepared(reward_model, tokenizer)
    for order in ([3, 1, 0, 2], [1, 3], [2]):
        scores = source.score(episodes(tokenizer, order))
        assert scores.tolist() == pytest.approx([expected[row] for row in order], abs=1e-5)


def test_what_stands_in_the_padding_does_not_matter(reward_model, tokenizer):
    source, given = prepared(reward_model, tokenizer), episodes(tokenizer)
    other = given._replace(input_ids=torch.where(given.attention_mask.bool(), given.input_ids, 9))
    torch.testing.assert_close(source.score(other), source.score(given), atol=1e-6, rtol=1e-6)


def test_a_reward_model_with_another_tokenizer_is_refused_before_it_is_loaded(reward_model, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_rlhf.rewards.reward_model.load_scalar_model", lambda *_: pytest.fail("it was loaded"))
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    other.add_tokens(["more"])
    with pytest.raises(UserError, match="has another tokenizer than the policy"):
        prepared(reward_model, other)


def test_an_uncentred_reward_model_is_refused_before_it_is_loaded_unless_accepted(llama, tokenizer, monkeypatch):
    accepted = prepared(llama, tokenizer, require_centered=False)
    assert torch.isfinite(accepted.score(episodes(tokenizer))).all()
    monkeypatch.setattr("lit_rlhf.rewards.reward_model.load_scalar_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"no centring constants .* callback CenterScores, or set .*require_centered"):
        prepared(llama, tokenizer)
