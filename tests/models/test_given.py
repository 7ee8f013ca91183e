"""Models given as objects: prepared like those of a folder, or refused in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, ModelLoadingConfig
from lit_rlhf.models.given import resolve_model
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model
from lit_rlhf.modules import PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards import FunctionReward, RewardModelScorer, resolve_reward
from lit_rlhf.rollout.invariants import active_dropouts
from tests.helpers.small_runs import quiet_trainer

LOADING = ModelLoadingConfig()


def score(prompts: list[str], responses: list[str], rows: list[Any]) -> list[float]:
    return [0.0] * len(responses)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"])
def test_an_object_computes_what_its_folder_does(name: str, model_folders: dict[str, str], tokenizer: Any) -> None:
    folder, ids = model_folders[name], torch.tensor([[4, 5, 6, 7]])
    given = AutoModelForCausalLM.from_pretrained(folder)
    dropouts = {key: 0.1 for key in given.config.to_dict() if "drop" in key}
    given = AutoModelForCausalLM.from_pretrained(folder, **dropouts)
    expected = load_causal_lm(folder, tokenizer, LOADING)
    own = load_causal_lm(given, tokenizer, LOADING)
    assert own is given and own.training and not list(active_dropouts(own))
    assert torch.equal(own(ids).logits, expected(ids).logits)  # in training mode
    assert own.config.to_dict() == expected.config.to_dict()
    scalar, reference = (load_scalar_model(each, tokenizer, LOADING, seed=3) for each in (given, folder))
    assert torch.equal(scalar(ids, torch.ones_like(ids)), reference(ids, torch.ones_like(ids)))
    assert scalar.head_is_new
    configs = (each.model.config.to_dict() for each in (scalar, reference))
    assert len({json.dumps(config | {"architectures": None}, sort_keys=True) for config in configs}) == 1
    with torch.no_grad():
        next(scalar.parameters()).add_(1.0)
    assert torch.equal(own(ids).logits, expected(ids).logits)  # the backbone was copied


def test_a_reward_model_is_prepared_in_place(llama: str, tokenizer: Any, tmp_path: Path) -> None:
    given = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    loaded = load_scalar_model(given, tokenizer, LOADING)
    assert loaded.model is given and not loaded.head_is_new
    wrapped = ScalarModel(given)
    wrapped.center(0.5, 2.0)
    assert load_scalar_model(wrapped, tokenizer, LOADING) is wrapped
    three = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    with pytest.raises(UserError, match="classifies into 3 labels"):
        load_scalar_model(three, tokenizer, LOADING)


def test_the_embedding_grows_and_frozen_weights_stay_frozen(llama: str, tmp_path: Path) -> None:
    own_tokenizer = load_tokenizer(llama, LOADING)
    own_tokenizer.pad_token = own_tokenizer.eos_token
    given = AutoModelForCausalLM.from_pretrained(llama)
    given.model.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(UserError, match="padding equal to its end token"):
        SFTModule(given, tokenizer=copy.deepcopy(own_tokenizer)).tokenizer  # noqa: B018
    module = SFTModule(given, tokenizer=own_tokenizer, loading=ModelLoadingConfig(pad_token="<new>"))
    rows, count = given.get_input_embeddings().weight.shape[0], len(own_tokenizer)
    module.configure_model()
    assert given.get_input_embeddings().weight.shape[0] == rows + 1 == count + 1
    own = SFTModule(AutoModelForCausalLM.from_pretrained(llama))
    own.sources["model"].model.embed_tokens.weight.requires_grad_(False)
    own.configure_model()
    trained = {id(p) for group in own.parameter_groups() for p in group["params"]}
    assert id(own.model.model.embed_tokens.weight) not in trained and len(trained) > 5


def test_other_objects_are_refused_in_one_line(llama: str, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    adapted = AutoModelForCausalLM.from_pretrained(llama)
    adapted.add_adapter(LoraConfig(target_modules="all-linear"))
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules="all-linear"))
    for given, message in (
        (3, "model: a int is neither a path nor a transformers.PreTrainedModel"),
        (torch.nn.Linear(2, 2), "model: a Linear is neither"),
        (peft, r"adapter=LoRA\(...\), or what merge_and_unload returns"),
        (adapted, r"it has an adapter already; give its base model and adapter=LoRA\(...\)"),
    ):
        with pytest.raises(UserError, match=message):
            SFTModule(given)
    quantized = AutoModelForCausalLM.from_pretrained(llama)
    quantized.is_quantized = True
    with pytest.raises(UserError, match=r"model: its weights are quantized; give the folder, and loading.quantization"):
        SFTModule(quantized)
    with pytest.raises(UserError, match=r"loading.dtype: the model is an object.*leave loading.dtype out"):
        SFTModule(model, loading=ModelLoadingConfig(dtype="bfloat16"))
    with pytest.raises(UserError, match=r"dropout: 0\.1 is set while a model is built"):
        SFTModule(model, dropout=0.1).configure_model()
    scalar = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    with pytest.raises(UserError, match="scores text and generates none"):
        SFTModule(scalar).configure_model()
    encoder = BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(UserError, match="BertForMaskedLM"):
        SFTModule(encoder, tokenizer=tokenizer).configure_model()
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(UserError, match="tokenizer: the LlamaForCausalLM object is from no folder; give tokenizer="):
        SFTModule(model)
    with pytest.raises(UserError, match="tokenizer: a list is neither a path nor a tokenizer of transformers"):
        SFTModule(model, tokenizer=["w1"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"loading.dtype: the model is an object"):
        RewardModelScorer(scalar, loading=ModelLoadingConfig(dtype=torch.float16))
    with pytest.raises(UserError, match=r"reward: a str is none; give a lit_rlhf.rewards.Reward such as"):
        PPOModule(llama, llama)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="reward: the class FunctionReward is none"):
        resolve_reward(FunctionReward)
    assert resolve_model(Path(llama), "model") == llama


def test_a_type_of_torch_is_kept_by_its_name() -> None:
    assert ModelLoadingConfig(dtype=torch.bfloat16) == ModelLoadingConfig(dtype="bfloat16")
    assert ModelLoadingConfig(dtype=torch.float16).torch_dtype == torch.float16
    with pytest.raises(UserError, match=r"loading.dtype: torch.int8 is none of float32, bfloat16, float16"):
        ModelLoadingConfig(dtype=torch.int8)


def test_rewards_are_functions_or_models(llama: str) -> None:
    assert isinstance(resolve_reward(score), FunctionReward)
    scorer = resolve_reward(ScalarModel(AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)))
    assert isinstance(scorer, RewardModelScorer)
    assert resolve_reward(scorer) is scorer
    assert FunctionReward(score).name.endswith("test_given.score")


def test_reference_and_critic_are_copies(llama: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    reward = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).requires_grad_(False)
    scorer = RewardModelScorer(reward, require_centered=False)
    module = PPOModule(model, scorer)
    module.configure_model()
    critic = module.critic.network  # type: ignore[union-attr]
    assert module.policy is model and scorer.model.model is reward
    shared = {p.data_ptr() for p in model.parameters()} | {p.data_ptr() for p in reward.parameters()}
    for copied in (module.frozen["reference"], critic):
        assert not shared & {p.data_ptr() for p in copied.parameters()}
    assert torch.equal(critic.model.score.weight, reward.score.weight)
    assert all(p.requires_grad for p in critic.parameters()) and not any(p.requires_grad for p in reward.parameters())
    assert not any(p.requires_grad for p in module.frozen["reference"].parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "critic"}


def test_with_an_adapter_the_reference_is_the_frozen_base(llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    module = PPOModule(model, score, adapter=LoRA(rank=2))
    module.configure_model()
    assert not module.frozen and not module.has_separate_reference
    critic = module.critic.network  # type: ignore[union-attr]
    names = [name for name, _ in critic.named_parameters() if "lora_A" in name]
    assert len(names) == len([name for name, _ in model.named_parameters() if "lora_A" in name])  # one adapter each
    ids = torch.tensor([[4, 5, 6]])
    plain = AutoModelForCausalLM.from_pretrained(llama).base_model(ids)[0]
    torch.testing.assert_close(critic.model.base_model(ids)[0], plain)


def test_a_trained_reward_module_hands_over_its_model(llama: str, tmp_path: Path) -> None:
    trained = RewardModule(llama)
    trained.configure_model()
    trained.model.center(0.25)
    module = PPOModule(llama, trained.model)
    module.configure_model()
    assert isinstance(module.reward, RewardModelScorer) and module.reward.model is trained.model
    assert quiet_trainer(tmp_path) is not None
    assert module.object_fingerprints["reward model 1"].startswith("weights ")
