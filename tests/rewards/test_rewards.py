"""Rewards: a user's function, a weighted sum, and a reward model that scores the last token in any batch."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.rewards import FunctionReward, RewardModelScorer, WeightedSum
from tests.helpers.episodes import PROMPTS, RESPONSES, make_episodes

CPU = torch.device("cpu")
USER_FILE = """
import asyncio

LIMIT = 3


def brevity(prompts, responses, rows):
    return [-len(response.split()) for response in responses]


def index(prompts, responses, rows):
    return [row["index"] for row in rows]


def one_too_few(prompts, responses, rows):
    return [0.0] * (len(responses) - 1)


def no_numbers(prompts, responses, rows):
    return [None for _ in responses]


async def async_batch(prompts, responses, rows):
    await asyncio.sleep(0)
    return [2.0 * row["index"] for row in rows]


def single(prompt, response, row):
    return 10 * row["index"] + len(prompt.split())


RUNNING = []
NUM_RUNNING = []


async def async_single(prompt, response, row):
    RUNNING.append(row["index"])
    NUM_RUNNING.append(len(RUNNING))
    await asyncio.sleep(0.01 * (4 - row["index"]))  # the last finishes first
    RUNNING.remove(row["index"])
    return row["index"]
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of the user."""
    (tmp_path / "my_rewards.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def test_a_function_gets_texts_and_rows(user_folder, tokenizer):
    for name, expected in (("brevity", [-1.0, -4.0, -2.0, 0.0]), ("index", [0.0, 1.0, 2.0, 3.0])):
        reward = FunctionReward(f"my_rewards.{name}")
        reward.prepare(tokenizer, CPU)
        assert reward.score(make_episodes(tokenizer)).tolist() == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my_rewards.brevit", "my_rewards has no 'brevit' (did you mean 'brevity'?)"),
        ("my_reward.brevity", "there is no module 'my_reward' here"),
        ("brevity", "'brevity' is not a dotted path such as my_file.my_function"),
        ("my_rewards.LIMIT", "'my_rewards.LIMIT' is a int, not a function"),
    ],
)
def test_a_function_that_does_not_exist_is_refused_at_once(user_folder, path, expected):
    with pytest.raises(UserError) as refusal:
        FunctionReward(path)
    assert expected in str(refusal.value)


def test_missing_scores_and_scores_that_are_no_numbers_are_refused(user_folder, tokenizer):
    with pytest.raises(UserError, match=r"reward my_rewards\.one_too_few: 3 scores for 4 responses"):
        FunctionReward("my_rewards.one_too_few").score(make_episodes(tokenizer))
    with pytest.raises(UserError, match=r"reward my_rewards\.no_numbers: a score is no number"):
        FunctionReward("my_rewards.no_numbers").score(make_episodes(tokenizer))


def test_async_functions_and_functions_of_one_episode(user_folder, tokenizer):
    episodes = make_episodes(tokenizer)
    assert FunctionReward("my_rewards.async_batch").score(episodes).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert FunctionReward("my_rewards.single", batched=False).score(episodes).tolist() == [3.0, 11.0, 25.0, 32.0]
    for concurrency in (2, 8):
        reward = FunctionReward("my_rewards.async_single", batched=False, concurrency=concurrency)
        assert reward.score(episodes).tolist() == [0.0, 1.0, 2.0, 3.0]
        num_running = sys.modules["my_rewards"].NUM_RUNNING
        assert max(num_running) == min(concurrency, 4)
        num_running.clear()


def test_an_async_function_works_in_a_running_event_loop(user_folder, tokenizer):
    async def notebook_cell() -> list[float]:
        return FunctionReward("my_rewards.async_batch").score(make_episodes(tokenizer)).tolist()

    assert asyncio.run(notebook_cell()) == [0.0, 2.0, 4.0, 6.0]


def test_the_error_for_a_function_of_one_episode_names_the_setting(user_folder, tokenizer):
    (user_folder / "my_rewards.py").write_text("def one(prompt, response, row):\n    return 1.0\n")
    with pytest.raises(UserError, match=r"must return a list of scores, not 1\.0; .* set batched: false"):
        FunctionReward("my_rewards.one").score(make_episodes(tokenizer))


PARTS = """
def parts(prompts, responses, rows):
    return {"words": [len(response.split()) for response in responses], "index": [row["index"] for row in rows]}


async def part(prompt, response, row):
    return {"index": row["index"], "words": len(response.split())}


def plain(prompts, responses, rows):
    return [0.0 for _ in responses]


def fewer(prompts, responses, rows):
    return {"words": [1.0]}
"""


def test_a_function_of_parts_is_their_weighted_sum_and_logs_each(user_folder, tokenizer):
    (user_folder / "my_rewards.py").write_text(PARTS)
    for name, batched in (("parts", True), ("part", False)):
        reward = FunctionReward(f"my_rewards.{name}", batched, weights={"words": 0.5, "index": 10.0})
        assert reward.score(make_episodes(tokenizer)).tolist() == [0.5, 12.0, 21.0, 30.0]
        metrics = {name: scores.tolist() for name, scores in reward.metrics().items()}
        assert metrics == {"reward/words": [1.0, 4.0, 2.0, 0.0], "reward/index": [0.0, 1.0, 2.0, 3.0]}
    assert FunctionReward("my_rewards.plain").metrics() == {}


def test_parts_and_weights_that_do_not_match_are_refused(user_folder, tokenizer):
    (user_folder / "my_rewards.py").write_text(PARTS)

    def refuse(name: str, message: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            FunctionReward(f"my_rewards.{name}", **settings).score(make_episodes(tokenizer))

    weights = {"words": 1.0, "index": 1.0}
    refuse("parts", r"it returns a dict; set weights, such as \{words: 1.0, index: 1.0\}")
    refuse("part", r"it returns a dict; set weights, such as \{index: 1.0, words: 1.0\}", batched=False)
    refuse("plain", r"weights are of words, index, and it returned \[0.0", weights=weights)
    refuse("parts", "weights are of words, and it returned words, index", weights={"words": 1.0})
    refuse("fewer", "1 scores for 4 responses", weights={"words": 1.0})
    refuse("parts", "weights has no part", weights={})
    refuse("parts", "a part cannot be named 'kl': reward/kl is PPO's own metric", weights={"kl": 1.0})


def test_a_weighted_sum(user_folder, tokenizer):
    reward = WeightedSum([FunctionReward("my_rewards.brevity"), FunctionReward("my_rewards.index")], [0.5, 10.0])
    reward.prepare(tokenizer, CPU)
    assert reward.score(make_episodes(tokenizer)).tolist() == [-0.5, 8.0, 19.0, 30.0]


def test_a_weighted_sum_needs_one_weight_per_reward(user_folder):
    with pytest.raises(UserError, match="2 weights for 1 rewards"):
        WeightedSum([FunctionReward("my_rewards.brevity")], [1.0, 2.0])
    with pytest.raises(UserError, match="0 weights for 0 rewards"):
        WeightedSum([], [])


def test_token_ids_of_a_row_are_without_padding(tokenizer):
    episodes = make_episodes(tokenizer)
    assert [episodes.token_ids(row) for row in range(4)] == list(zip(PROMPTS, RESPONSES))


@pytest.fixture(scope="module")
def reward_model(model_folders, tokenizer, tmp_path_factory) -> str:
    """The folder of a centered reward model."""
    folder = tmp_path_factory.mktemp("reward_model")
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig())
    model.center(0.3, 2.0)
    export_model(model, tokenizer, folder)
    return str(folder)


def load_reward(folder: str, tokenizer: Any, **settings: Any) -> RewardModelScorer:
    reward = RewardModelScorer(folder, **settings)
    reward.prepare(tokenizer, CPU)
    return reward


def test_the_score_is_read_at_the_last_token_in_any_batch(reward_model, tokenizer):
    model = load_scalar_model(reward_model, tokenizer, ModelLoadingConfig()).eval()
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):  # one row, without padding: the last position of the raw scalar
        ids = torch.tensor([prompt + response])
        expected.append(float(model(ids, torch.ones_like(ids))[0, -1].detach()))
    for batch_size in (1, 3, 64):
        scores = load_reward(reward_model, tokenizer, batch_size=batch_size).score(make_episodes(tokenizer))
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert not scores.requires_grad
    reward = load_reward(reward_model, tokenizer)
    for order in ([3, 1, 0, 2], [1, 3], [2]):
        scores = reward.score(make_episodes(tokenizer, order))
        assert scores.tolist() == pytest.approx([expected[row] for row in order], abs=1e-5)


def test_token_ids_of_the_padding_have_no_effect(reward_model, tokenizer):
    reward, episodes = load_reward(reward_model, tokenizer), make_episodes(tokenizer)
    other = episodes._replace(input_ids=torch.where(episodes.attention_mask.bool(), episodes.input_ids, 9))
    torch.testing.assert_close(reward.score(other), reward.score(episodes), atol=1e-6, rtol=1e-6)


def test_a_reward_model_with_another_tokenizer_is_refused_before_it_is_loaded(reward_model, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_rlhf.rewards.reward_model.load_scalar_model", lambda *_: pytest.fail("it was loaded"))
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    other.add_tokens(["more"])
    with pytest.raises(UserError, match=r"has another tokenizer than the policy.*or SequenceClassifierReward, which"):
        load_reward(reward_model, other)


@pytest.mark.parametrize("pad_token", ["<eos>", None])
def test_the_padding_of_a_reward_models_tokenizer_does_not_matter(pad_token, reward_model, tokenizer, tmp_path):
    folder = Path(shutil.copytree(reward_model, tmp_path / "reward"))
    own = AutoTokenizer.from_pretrained(folder)
    own.pad_token = pad_token
    own.save_pretrained(folder)
    expected = load_reward(reward_model, tokenizer).score(make_episodes(tokenizer))
    assert torch.equal(load_reward(str(folder), tokenizer).score(make_episodes(tokenizer)), expected)


def test_a_reward_model_with_more_tokens_than_the_policy_scores_the_same_ids_alike(reward_model, tokenizer, tmp_path):
    """As one of GPT-J, whose tokenizer is GPT-2's with more tokens, scores a policy of GPT-2."""
    loaded = load_scalar_model(reward_model, tokenizer, ModelLoadingConfig())
    wider = AutoTokenizer.from_pretrained(reward_model)
    wider.add_tokens(["<|extratoken_1|>", "<|extratoken_2|>"])
    wider.pad_token = "<|extratoken_2|>"
    loaded.model.resize_token_embeddings(len(wider), mean_resizing=False)
    export_model(loaded, wider, tmp_path / "wider")
    expected = load_reward(reward_model, tokenizer).score(make_episodes(tokenizer))
    scores = load_reward(str(tmp_path / "wider"), tokenizer).score(make_episodes(tokenizer))
    torch.testing.assert_close(scores, expected)


def test_a_reward_model_that_is_not_centered_is_refused_before_it_is_loaded_unless_allowed(
    llama, tokenizer, monkeypatch
):
    allowed = load_reward(llama, tokenizer, require_centered=False)
    assert torch.isfinite(allowed.score(make_episodes(tokenizer))).all()
    monkeypatch.setattr("lit_rlhf.rewards.reward_model.load_scalar_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"no centering constants .* callback CenterScores, or set .*require_centered"):
        load_reward(llama, tokenizer)
