"""Reward models of others: text in their own format, their own tokens, and the scores of plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models import pretrained
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import SequenceClassifierReward
from lit_rlhf.rewards.conversation_format import ConversationFormat
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.reward_models import CLASSIFIERS, decoder_tokenizer, encoder_tokenizer
from tests.helpers.small_runs import quiet_trainer

CPU = torch.device("cpu")
PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8", "w9", "w10 w11 w12"]
RESPONSES = ["w13 w14", "w15 w16 w17 w18 w19", "w20", "w21 w22 w23", "w24 w25"]


def make_episodes(order: list[int] | None = None, **changes: Any) -> Episodes:
    """Return conversations whose policy has a template of its own, which a reward model must not see."""
    order = list(range(len(PROMPTS))) if order is None else order
    ids = torch.ones(len(order), 2, dtype=torch.int64)
    messages: Any = [[{"role": "user", "content": PROMPTS[index]}] for index in order]
    prompts = [f"<user>{PROMPTS[index]}<assistant>" for index in order]
    responses = [RESPONSES[index] for index in order]
    return Episodes(ids, ids, prompts, responses, [{} for _ in order], 1, messages=messages)._replace(**changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write a classifier of every kind."""
    written = {}
    for name, build in CLASSIFIERS.items():
        config, tokenizer = build()
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("classifier")
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written[name] = str(folder)
    return written


def load(model: Any, policy_tokenizer: Any, **settings: Any) -> SequenceClassifierReward:
    """Return a prepared reward."""
    reward = SequenceClassifierReward(model, **settings)
    reward.prepare(policy_tokenizer, CPU)
    return reward


@torch.no_grad()
def plain_score(folder: str, tokenizer: Any, *texts: str, **settings: Any) -> float:
    """Return the first output of plain transformers for one text, or a pair."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return float(model(**tokenizer(*texts, return_tensors="pt", **settings)).logits[0, 0])


def chat_text(prompt: str, response: str) -> str:
    return f"<s>w26 {prompt} w27 {response} </s>"


PAIRS = ("deberta", "bert", "roberta")
CHATS = ("llama", "llama, padding equal to end", "mistral", "qwen2", "qwen3", "gemma2")


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_foreign_reward_model_scores_like_plain_transformers(name, batch_size, folders, tokenizer):
    template = "pair" if name in PAIRS else None if name in CHATS else "concat"
    own, expected = CLASSIFIERS[name]()[1], []
    reward = load(folders[name], tokenizer, template=template, batch_size=batch_size, tokenizer=own)
    for prompt, response in zip(PROMPTS, RESPONSES):
        if template == "pair":
            expected.append(plain_score(folders[name], own, prompt, response))
        elif template is None:
            expected.append(plain_score(folders[name], own, chat_text(prompt, response), add_special_tokens=False))
        else:
            expected.append(plain_score(folders[name], own, prompt + response))
    assert max(expected) - min(expected) > 1e-4
    for order in (list(range(5)), [3, 1, 4, 0, 2], [2], [1, 3]):
        scores = reward.score(make_episodes(order))
        assert scores.tolist() == pytest.approx([expected[index] for index in order], abs=1e-5)
        assert not scores.requires_grad and scores.dtype == torch.float32
    assert reward.metrics()["reward/truncated_fraction"].tolist() == [0.0, 0.0]
    assert not reward.uses_token_ids_only and reward.critic_init_path() is None


def test_every_template_is_the_text_that_it_says(tokenizer):
    encoder, decoder = encoder_tokenizer(), decoder_tokenizer()
    episodes = make_episodes([0])
    messages: Any = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    turns = (
        "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}{{ m.content }} {% endfor %}{{ eos_token }}"
    )
    for own, template, text in (
        (encoder, "pair", "[CLS] w1 w2 [SEP] w13 w14 [SEP]"),
        (encoder, "response", "[CLS] w13 w14 [SEP]"),
        (encoder, turns, "w4 w1 w2 w5 w13 w14 </s>"),
        (decoder, "concat", "<s> w1 w2 w13 w14"),
        (decoder, "chat", "<s> w26 w1 w2 w27 w13 w14 </s>"),
        (decoder, None, "<s> w26 w1 w2 w27 w13 w14 </s>"),
    ):
        spaced = episodes._replace(responses=[" w13 w14"]) if template == "concat" else episodes
        (row,), cut = ConversationFormat(own, template, None, "reward").encode(spaced)
        assert own.decode(row["input_ids"]) == text and cut == [False]
    long = episodes._replace(messages=[messages])
    (row,), _ = ConversationFormat(decoder, "chat", None, "reward").encode(long)
    assert decoder.decode(row["input_ids"]) == "<s> w26 w1 w27 w2 </s> w26 w3 w27 w13 w14 </s>"
    (row,), _ = ConversationFormat(encoder, "pair", None, "reward").encode(long)
    assert encoder.decode(row["input_ids"]) == "[CLS] w1 w2 w3 [SEP] w13 w14 [SEP]"
    (row,), _ = ConversationFormat(encoder, "pair", None, "reward").encode(
        episodes._replace(messages=None, prompts=["w7"])
    )
    assert encoder.decode(row["input_ids"]) == "[CLS] w7 [SEP] w13 w14 [SEP]"


def test_texts_over_the_limit_lose_their_beginning_and_are_counted(folders, tokenizer, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lit_rlhf.rewards.sequence_classifier.say_once", said.append)
    long = " ".join(f"w{index % 26}" for index in range(70))
    episodes = make_episodes([0, 1, 2])._replace(responses=["w1 w2", long, "w3"])
    for name, template in (("deberta", "pair"), ("llama", "chat"), ("gpt2", "concat")):
        reward = load(folders[name], tokenizer, template=template)
        assert torch.isfinite(reward.score(episodes)).all()
        assert reward.metrics()["reward/truncated_fraction"].tolist() == [0.0, 1.0, 0.0]
        reward.score(episodes)
        rows, _ = reward.format.encode(episodes)
        assert len(rows[1]["input_ids"]) == 64
        end = {"pair": " [SEP]", "chat": " </s>", "concat": ""}[template]
        assert reward.format.tokenizer.decode(rows[1]["input_ids"]).endswith(long[-30:] + end)
    assert len(said) == 3 and "1 of 3 texts have more than 64 tokens and lose their beginning" in said[0]
    short = load(folders["deberta"], tokenizer, template="pair", max_length=16)
    short.score(episodes)
    assert len(short.format.encode(episodes)[0][1]["input_ids"]) == 16


def test_a_label_of_several_and_functions_of_the_outputs(tokenizer, tmp_path):
    config, own = CLASSIFIERS["bert"]()
    config.id2label, config.label2id = {0: "bad", 1: "good", 2: "fine"}, {"bad": 0, "good": 1, "fine": 2}
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has 3 labels \(bad, good, fine\); choose one"):
        load(str(tmp_path), tokenizer, template="pair")
    raw = torch.stack(
        [load(str(tmp_path), tokenizer, template="pair", label=n).score(make_episodes()) for n in range(3)]
    )
    by_name = load(str(tmp_path), tokenizer, template="pair", label="good").score(make_episodes())
    assert torch.equal(by_name, raw[1])
    for function, expected in (("sigmoid", raw.sigmoid()), ("softmax", raw.softmax(0))):
        scores = load(str(tmp_path), tokenizer, template="pair", label=1, function_to_apply=function).score(
            make_episodes()
        )
        torch.testing.assert_close(scores, expected[1])


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("chosen", [None, "none", "sigmoid"])
def test_a_pipeline_scores_as_it_does_alone(labels, chosen, tokenizer, tmp_path):
    config, own = CLASSIFIERS["distilbert"]()
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config)
    settings = {} if chosen is None else {"function_to_apply": chosen}
    classifier = pipeline("text-classification", model=model, tokenizer=own, device="cpu", top_k=None, **settings)
    reward = load(classifier, tokenizer, template="response", label=0)
    expected = [
        next(each["score"] for each in classifier([text])[0] if each["label"] == "LABEL_0") for text in RESPONSES
    ]
    assert reward.score(make_episodes()).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_model_that_was_loaded_is_taken_as_it_is(folders, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(folders["deberta"])
    reward = load(model, tokenizer, template="pair", tokenizer=encoder_tokenizer())
    expected = load(folders["deberta"], tokenizer, template="pair").score(make_episodes())
    torch.testing.assert_close(reward.score(make_episodes()), expected)


def test_half_precision_scores_alike(folders, tokenizer):
    for name, template in (("deberta", "pair"), ("llama", None)):
        exact = load(folders[name], tokenizer, template=template).score(make_episodes())
        half = load(folders[name], tokenizer, template=template, loading=ModelLoadingConfig(dtype="bfloat16"))
        assert next(half.classifier.model.parameters()).dtype == torch.bfloat16
        torch.testing.assert_close(half.score(make_episodes()), exact, atol=0.1, rtol=0.1)


def test_settings_that_do_not_fit_are_refused_before_training(folders, llama, tokenizer, monkeypatch):
    def refuse(message: str, model: str = "deberta", **settings: Any) -> None:
        with pytest.raises(UserError, match=message):
            load(folders.get(model, model), tokenizer, **settings)

    refuse("has no chat template, so set template: choose one of chat, pair, concat, response")
    refuse("template is 'chat', and its tokenizer has no chat template", template="chat")
    refuse(r"template 'pairs' is unknown \(did you mean 'pair'\?\)", template="pairs")
    refuse("max_length is 65, and it can read 64 tokens", template="pair", max_length=65)
    refuse("max_length must be at least 8, got 3", template="pair", max_length=3)
    refuse("has no label 'good'; it has LABEL_0", template="pair", label="good")
    refuse("is a LlamaForCausalLM, not a sequence classifier", model=llama, template="concat")
    refuse("batch_size must be at least 1", template="pair", batch_size=0)
    template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"its chat template refuses the conversation that begins 'w1 w2': no"):
        load(folders["llama"], tokenizer, template=template).score(make_episodes())
    with pytest.raises(UserError, match="the response '' has no token to score"):
        bare = decoder_tokenizer(chat_template=None)
        bare.backend_tokenizer.post_processor = None
        ConversationFormat(bare, "response", None, "reward").encode(make_episodes([0])._replace(responses=[""]))


def test_ppo_against_a_foreign_reward_model(folders, llama, tmp_path, monkeypatch):
    """The policy's tokenizer has other ids; the critic starts from the policy."""
    monkeypatch.setattr(pretrained, "say_once", lambda line: None)
    reward = SequenceClassifierReward(folders["deberta"], template="pair")
    ppo = PPOConfig(rollout_batch_size=8, micro_batch_size=4)
    module = PPOModule(llama, reward, SamplingParams(4), ppo)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=PromptData())
    assert module.critic.network.head_is_new
    for sample in module.samples:
        expected = plain_score(folders["deberta"], encoder_tokenizer(), sample["prompt"], sample["response"])
        assert sample["score"] == pytest.approx(expected, abs=1e-5)
    trainer.save_checkpoint(Path(tmp_path) / "last.ckpt")
    stored = torch.load(Path(tmp_path) / "last.ckpt", weights_only=True)["lit_rlhf"]["fingerprints"]
    assert "reward model 1" in stored
