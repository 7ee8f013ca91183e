"""Scores, KL and length of samples: the KL against its definition, and of best-of-n against its bound."""

import json
from math import log

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.evaluated_model import BestOf, EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.generation import Completion, decode_end
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer, ScoredText
from lit_rlhf.evaluation.suites.sample_scores import SampleScores
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model

NO_CACHE = Cache(None)
COUNT, LENGTH = 24, 5


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}"}) + "\n" for n in range(COUNT)))
    return str(path)


@pytest.fixture(scope="module")
def reward(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a reward model with a random head."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = load_tokenizer(llama, ModelLoadingConfig())
    load_scalar_model(llama, tokenizer, ModelLoadingConfig(), seed=4).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other(llama: str, tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    """The tiny model with a changed output layer."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return EvaluatedModel("other", ModelSpec(str(folder)), NO_CACHE)


def test_scores_kl_and_length_are_those_of_one_sample_per_prompt(
    tiny: EvaluatedModel, other: EvaluatedModel, prompts: str, reward: str
) -> None:
    suite = SampleScores(prompts, {"proxy": reward}, max_new_tokens=LENGTH)
    suite.check([tiny, other])
    metrics = suite.run(other, tiny).metrics
    texts = [f"w{n} w{n + 1}" for n in range(COUNT)]
    completions = other.generate(texts, SamplingParams(LENGTH, 1.0), (900, 1), ())
    differences = []
    for text, completion in zip(texts, completions):
        start = tiny.tokenizer(text, return_tensors="pt").input_ids
        reply = tiny.tokenizer(completion.text + completion.end, return_tensors="pt").input_ids
        assert (int(reply[0, -1]) == 1) == completion.finished
        ids = torch.cat([start, reply], 1)
        with torch.no_grad():
            logprobs = [m.model(ids).logits[0, start.shape[1] - 1 : -1].log_softmax(-1) for m in (other, tiny)]
        own, theirs = (each.gather(1, reply[0][:, None]).sum() for each in logprobs)
        differences.append(float(own - theirs))
    assert metrics["KL"].value == pytest.approx(sum(differences) / COUNT, abs=1e-4)
    assert metrics["length"].value == pytest.approx(sum(each.num_tokens for each in completions) / COUNT)
    assert metrics["ended"].value == pytest.approx(sum(each.finished for each in completions) / COUNT)
    stripped = [each._replace(text=each.text.strip()) for each in completions]
    scores = RewardScorer(reward).score(list(map(ScoredText, texts, stripped)), NO_CACHE)
    assert metrics["proxy score"].value == pytest.approx(sum(scores) / COUNT)
    assert suite.run(tiny, tiny).metrics["KL"].value == 0.0


def test_the_kl_of_best_of_n_is_its_upper_bound(tiny: EvaluatedModel, prompts: str, llama: str, reward: str) -> None:
    best = EvaluatedModel("best", ModelSpec(llama, best_of=BestOf(reward, n=4)), NO_CACHE)
    suite = SampleScores(prompts, {"proxy": reward}, max_new_tokens=LENGTH, limit=8)
    metrics, one = suite.run(best, tiny).metrics, suite.run(tiny, tiny).metrics
    assert metrics["KL"].value == pytest.approx(log(4) - 3 / 4)
    assert metrics["proxy score"].value > one["proxy score"].value


def test_a_suite_without_a_reward_model_is_refused() -> None:
    with pytest.raises(UserError, match="at least one reward model"):
        SampleScores("prompts.jsonl", {})


def test_the_kl_is_of_the_end_that_was_sampled(tiny: EvaluatedModel, reward: str, monkeypatch) -> None:
    pairs: list[tuple[str, str]] = []
    sampled = [Completion("w5", True, 3, end="<unk> <eos>"), Completion("w6", False, 1), Completion("", True, 1)]
    monkeypatch.setattr(EvaluatedModel, "generate", lambda *_: sampled)
    monkeypatch.setattr(tiny, "compute_loglikelihoods", lambda given: pairs.extend(given) or [])
    rows = [{"prompt": "w1"}, {"prompt": ""}, {"prompt": "w2", "system": "w9"}, {"prompt": "w3"}]
    result = SampleScores(rows, {"proxy": reward}).run(tiny, tiny)
    assert pairs[:2] == [("w1", "w5<unk> <eos>"), ("w2", "w6")]
    assert result.notes == ["1 rows skipped: empty prompt", "1 rows: column 'system' is not read by the format"]


def test_special_tokens_at_the_end_of_a_response_are_its_end(tokenizer) -> None:
    ids = tokenizer.encode("<unk> w5 <unk> <eos>")
    assert decode_end(tokenizer, ids) == "<unk> <eos>"
    assert decode_end(tokenizer, ids[:2]) == ""


def test_best_of_n_scores_the_end_of_turn_that_was_sampled(llama: str, reward: str, monkeypatch) -> None:
    best = EvaluatedModel("best", ModelSpec(llama, best_of=BestOf(reward, n=1)), NO_CACHE)
    sampled, scored = Completion("w5", True, 3, end="<unk> <eos>"), []
    monkeypatch.setattr(best, "_generate", lambda *_: [sampled])
    monkeypatch.setattr(best._best_of_scorer, "score_finite", lambda texts, _: scored.extend(texts) or [0.0])
    assert best.generate(["w1"], SamplingParams(LENGTH)) == [sampled]
    assert [(each.prompt, each.completion.text.strip()) for each in scored] == [("w1", "w5<unk>")]
