"""VLLMRewardModel against a fake of vLLM's pooling APIs, which serves a tiny reward model."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import SequenceClassifierReward, VLLMRewardModel
from tests.helpers.reward_models import CLASSIFIERS
from tests.helpers.services import Reply, Request, Service, serve
from tests.rewards.test_sequence_classifier import make_episodes

CPU = torch.device("cpu")


class FakeVLLM:
    """Answers like vLLM: rows in any order, each with its index."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def __call__(self, request: Request, before: int = 0) -> Reply:
        """Score each row of a request alone."""
        payload, path = request.payload, request.path.rpartition("/")[2]
        assert payload["model"] == "rm" and payload["use_activation"] is False
        if path == "score":
            pairs = zip(payload["text_1"], payload["text_2"])
            rows = [dict(self.tokenizer(*pair, return_tensors="pt")) for pair in pairs]
        else:
            rows = [{"input_ids": torch.tensor([ids])} for ids in payload["input"]]
        outputs = [self.model(**row).logits[0].tolist() for row in rows]
        keys = {
            "classify": lambda each: {"probs": each, "label": "x", "num_classes": len(each)},
            "pooling": lambda each: {"data": [[9.0] * len(each), each]},
            "score": lambda each: {"score": each[0]},
        }
        data = [{"index": index, **keys[path](each)} for index, each in enumerate(outputs)]
        return Reply({"data": list(reversed(data))})


def make_reward(service: Service, endpoint: str, tokenizer: Any, **settings: Any) -> VLLMRewardModel:
    url = f"{service.url}/v1/{endpoint}"
    return VLLMRewardModel("rm", url, tokenizer=tokenizer, **{"retries": 1, "pause": 0.01, **settings})


@pytest.mark.parametrize(
    ("name", "endpoint", "template"),
    [
        ("qwen2", "classify", None),
        ("qwen2", "pooling", None),
        ("gpt2", "classify", "concat"),
        ("bert", "score", "pair"),
    ],
)
def test_a_served_model_scores_like_the_model_itself(name, endpoint, template, tokenizer):
    config, own = CLASSIFIERS[name]()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    local = SequenceClassifierReward(model, template, tokenizer=own)
    local.prepare(tokenizer, CPU)
    with serve(FakeVLLM(model, own)) as service:
        reward = make_reward(service, endpoint, own, template=template, batch_size=2)
        reward.prepare(tokenizer, CPU)
        scores = reward.score(make_episodes())
    assert len(service.requests) == 1 + 3, "one text to try it out, then batches of two"
    torch.testing.assert_close(scores, local.score(make_episodes()), atol=1e-5, rtol=1e-5)


def test_a_label_of_several_is_chosen(tokenizer):
    config, own = CLASSIFIERS["qwen2"]()
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config)
    local = SequenceClassifierReward(model, label=1, tokenizer=own)
    local.prepare(tokenizer, CPU)
    with serve(FakeVLLM(model, own)) as service:
        reward = make_reward(service, "classify", own, label=1)
        reward.prepare(tokenizer, CPU)
        torch.testing.assert_close(reward.score(make_episodes()), local.score(make_episodes()), atol=1e-5, rtol=1e-5)
        with pytest.raises(UserError, match="'rm' has 2 labels; set label to the index of one"):
            make_reward(service, "classify", own).prepare(tokenizer, CPU)


def test_wrong_addresses_and_answers_are_refused_at_the_start(tokenizer):
    own = CLASSIFIERS["qwen2"]()[1]
    with pytest.raises(UserError, match=r"must end in one of /classify, /pooling, /score"):
        VLLMRewardModel("rm", "http://127.0.0.1:1/v1/models")
    for url, template in (("http://h/classify", "pair"), ("http://h/score", None)):
        with pytest.raises(UserError, match="template 'pair' and an address that ends in /score go together"):
            VLLMRewardModel("rm", url, template)
    for body, reason in (
        ({"data": []}, "0 scores for 1 responses"),
        ({"detail": "no model"}, "malformed response: KeyError: 'data'"),
        ({"data": [{"index": 0, "probs": [None]}]}, "score 0 of 1 is None"),
    ):
        with (
            serve(lambda request, before, body=body: Reply(body)) as service,
            pytest.raises(UserError, match=reason),
        ):
            make_reward(service, "classify", own).prepare(tokenizer, CPU)
