"""Scores, KL and length of samples: the KL against its definition, and of best-of-n against its bound."""

import json
from math import log

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.evaluated_model import BestOf, EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer
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
        reply = tiny.tokenizer(completion.text, return_tensors="pt").input_ids
        reply = torch.cat([reply, torch.tensor([[1] * completion.finished], dtype=torch.long)], 1)
        ids = torch.cat([start, reply], 1)
        with torch.no_grad():
            logprobs = [m.model(ids).logits[0, start.shape[1] - 1 : -1].log_softmax(-1) for m in (other, tiny)]
        own, theirs = (each.gather(1, reply[0][:, None]).sum() for each in logprobs)
        differences.append(float(own - theirs))
    assert metrics["KL"].value == pytest.approx(sum(differences) / COUNT, abs=1e-4)
    assert metrics["length"].value == pytest.approx(sum(each.num_tokens for each in completions) / COUNT)
    assert metrics["ended"].value == pytest.approx(sum(each.finished for each in completions) / COUNT)
    stripped = [each._replace(text=each.text.strip()) for each in completions]
    scores = RewardScorer(reward).score(list(zip(texts, stripped)), NO_CACHE)
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
