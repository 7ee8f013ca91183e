"""Reward sources: a user's function, a weighted sum, and a reward model, read at the right token in any batch."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left, pad_right
from lit_rlhf.models.export import export_model
from lit_rlhf.models.options import ModelOptions
from lit_rlhf.models.scalar import load_scalar_model
from lit_rlhf.rewards import PythonReward, RewardModelReward, WeightedSum
from lit_rlhf.rollout.experience import Episodes

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4]]
RESPONSES = [[14, 1], [15, 16, 17, 18], [19, 20, 1], [1]]
MINE = """
LIMIT = 3


def brevity(prompts, responses, rows):
    return [-len(response.split()) for response in responses]


def place(prompts, responses, rows):
    return [row["place"] for row in rows]


def one_short(prompts, responses, rows):
    return [0.0] * (len(responses) - 1)


def undecided(prompts, responses, rows):
    return [None for _ in responses]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's own file."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def episodes(tokenizer: Any, rows: list[int] | None = None) -> Episodes:
    """Prompts padded on the left, responses on the right."""
    rows = rows if rows is not None else list(range(4))
    prompts, prompt_mask = pad_left([PROMPTS[row] for row in rows], 0)
    responses, response_mask = pad_right([RESPONSES[row] for row in rows], 0)
    return Episodes(
        torch.cat([prompts, responses], 1),
        torch.cat([prompt_mask, response_mask], 1),
        [tokenizer.decode(PROMPTS[row]) for row in rows],
        [tokenizer.decode(RESPONSES[row], skip_special_tokens=True) for row in rows],
        [{"place": row} for row in rows],
    )


def test_a_function_of_the_users_own_gets_texts_and_rows(mine, tokenizer):
    for name, expected in (("brevity", [-1.0, -4.0, -2.0, 0.0]), ("place", [0.0, 1.0, 2.0, 3.0])):
        source = PythonReward(f"my_rewards.{name}")
        source.prepare(tokenizer, CPU)
        assert source.score(episodes(tokenizer)).tolist() == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my_rewards.brevit", "my_rewards has no 'brevit'; did you mean 'brevity'?"),
        ("my_reward.brevity", "there is no module 'my_reward' here"),
        ("brevity", "'brevity' is not a dotted path such as my_file.my_function"),
        ("my_rewards.LIMIT", "'my_rewards.LIMIT' is a int, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(mine, path, expected):
    with pytest.raises(UserError) as refusal:
        PythonReward(path)
    assert expected in str(refusal.value)


def test_scores_that_are_missing_or_no_numbers_are_refused(mine, tokenizer):
    with pytest.raises(UserError, match=r"reward my_rewards\.one_short: 3 scores for 4 responses"):
        PythonReward("my_rewards.one_short").score(episodes(tokenizer))
    with pytest.raises(UserError, match=r"reward my_rewards\.undecided: a score is no number"):
        PythonReward("my_rewards.undecided").score(episodes(tokenizer))


def test_a_weighted_sum_is_one(mine, tokenizer):
    source = WeightedSum([PythonReward("my_rewards.brevity"), PythonReward("my_rewards.place")], [0.5, 10.0])
    source.prepare(tokenizer, CPU)
    assert source.score(episodes(tokenizer)).tolist() == [-0.5, 8.0, 19.0, 30.0]


def test_a_weighted_sum_needs_a_weight_for_every_source(mine):
    with pytest.raises(UserError, match="2 weights for 1 sources"):
        WeightedSum([PythonReward("my_rewards.brevity")], [1.0, 2.0])
    with pytest.raises(UserError, match="0 weights for 0 sources"):
        WeightedSum([], [])


@pytest.fixture(scope="module")
def reward_model(model_folders, tokenizer, tmp_path_factory) -> str:
    """A centred reward model's folder."""
    folder = tmp_path_factory.mktemp("reward_model")
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelOptions())
    model.centre(0.3, 2.0)
    export_model(model, tokenizer, folder)
    return str(folder)


def prepared(folder: str, tokenizer: Any, **settings: Any) -> RewardModelReward:
    source = RewardModelReward(folder, **settings)
    source.prepare(tokenizer, CPU)
    return source


def test_a_score_is_read_at_the_last_token_in_any_batch(reward_model, tokenizer):
    model = load_scalar_model(reward_model, tokenizer, ModelOptions()).eval()
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
    monkeypatch.setattr("lit_rlhf.rewards.sources.load_scalar_model", lambda *_: pytest.fail("it was loaded"))
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    other.add_tokens(["more"])
    with pytest.raises(UserError, match="has another tokenizer than the policy"):
        prepared(reward_model, other)


def test_an_uncentred_reward_model_is_refused_before_it_is_loaded_unless_accepted(llama, tokenizer, monkeypatch):
    accepted = prepared(llama, tokenizer, uncentred="accept")
    assert torch.isfinite(accepted.score(episodes(tokenizer))).all()
    monkeypatch.setattr("lit_rlhf.rewards.sources.load_scalar_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"no centring constants .* callback CentreScores, or set .*uncentred"):
        prepared(llama, tokenizer)
