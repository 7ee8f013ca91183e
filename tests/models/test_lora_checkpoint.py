"""A reward model's adapter, read from its checkpoint and attached to a policy with the same base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from lit_rlhf.data import ComparisonDataModule, PromptDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right
from lit_rlhf.generation import SamplingParams
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import adapter_state_dict, add_lora
from lit_rlhf.models.lora_checkpoint import read_scalar_adapter
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.modules import LoRACritic, PPOConfig, PPOModule, RewardModule, SeparateCritic
from lit_rlhf.rewards import LoRARewardModel, RewardModelScorer
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.small_runs import full_weights, quiet_trainer, rankings, sgd, write_rows

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a reward model with LoRA and return its checkpoint."""
    folder = tmp_path_factory.mktemp("reward")
    data = ComparisonDataModule(write_rows(folder / "rows.jsonl", rankings(8)), micro_batch_size=4)
    module = RewardModule(llama, lambda p: torch.optim.Adam(p, lr=5e-2), adapter=LoRA(rank=2))
    checkpoint = ModelCheckpoint(folder, filename="last")
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    module.model.center(0.25, 2.0)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def checkpoint_with_base(checkpoint: Path, base: str, target: Path) -> Path:
    """Write a checkpoint as it was when it held the base."""
    content = torch.load(checkpoint, weights_only=True)
    del content["lit_rlhf"]["base"]
    weights = load_file(Path(base) / "model.safetensors")
    content["state_dict"] |= {
        f"model.model.{name}": weight for name, weight in weights.items() if "lm_head" not in name
    }
    torch.save(content, target)
    return target


def episodes() -> Episodes:
    ids, mask = pad_right([[0, *row] for row in ROWS], 0)
    mask[:, 0] = 0
    return Episodes(ids, mask, ["w1"] * 3, ["w2"] * 3, [{}] * 3, 2)


def policy(path: str, tokenizer: Any) -> Any:
    model = load_causal_lm(path, tokenizer, ModelLoadingConfig())
    add_lora(model, LoRA(rank=4))
    return model


def test_an_attached_reward_model_scores_like_its_export(trained, llama, tokenizer, tmp_path):
    export_checkpoint(trained, tmp_path)
    exported = RewardModelScorer(str(tmp_path))
    exported.prepare(tokenizer, CPU)
    expected = exported.score(episodes())
    assert expected.std() > 0.1
    attached, model = LoRARewardModel(str(trained), batch_size=2), policy(llama, tokenizer)
    attached.prepare(tokenizer, CPU)
    attached.attach(model, llama)
    torch.testing.assert_close(attached.score(episodes()), expected, atol=1e-5, rtol=1e-5)
    assert not any(weight.requires_grad for weight in adapter_state_dict(model, "reward").values())
    assert all(weight.requires_grad for weight in adapter_state_dict(model, "default").values())
    second = LoRARewardModel(str(trained))
    second.prepare(tokenizer, CPU)
    second.attach(model, llama)
    torch.testing.assert_close(second.score(episodes()), expected, atol=1e-5, rtol=1e-5)


def in_memory(checkpoint: Path) -> Any:
    """Return the reward model of a checkpoint, as after its training."""
    return RewardModule.load_from_checkpoint(
        checkpoint, optimizer=lambda p: torch.optim.Adam(p), map_location="cpu"
    ).model


def test_a_reward_model_in_memory_is_attached_as_its_checkpoint_is(trained, llama, model_folders, tokenizer):
    scores = []
    given = in_memory(trained)
    for source in (str(trained), trained, given):
        reward, model = LoRARewardModel(source), policy(llama, tokenizer)
        reward.prepare(tokenizer, CPU)
        reward.attach(model, llama)
        scores.append(reward.score(episodes()))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2]) and scores[0].std() > 0.1
    ids, mask = pad_right(ROWS, 0)
    torch.testing.assert_close(given.eval().score(ids, mask), scores[2], atol=1e-5, rtol=1e-5)  # as before
    with torch.no_grad():
        given.model.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    other = LoRARewardModel(given)
    other.prepare(tokenizer, CPU)
    with pytest.raises(UserError, match=r"another base .*\(its weight 'model.layers.1.mlp.up_proj.weight' differs\)"):
        other.attach(policy(llama, tokenizer), llama)
    plain = load_scalar_model(llama, tokenizer, ModelLoadingConfig())
    with pytest.raises(UserError, match="is of a reward model without an adapter, which shares no base"):
        LoRARewardModel(plain).prepare(tokenizer, CPU)
    with pytest.raises(UserError, match="reward: a LlamaForSequenceClassification is neither a checkpoint nor a"):
        LoRARewardModel(plain.model)  # type: ignore[arg-type]
    del given.model.config.score_shift
    with pytest.raises(UserError, match="no centering constants"):
        LoRARewardModel(given).prepare(tokenizer, CPU)


@pytest.mark.parametrize("critic", ["of the reward", "given"])
def test_ppo_with_adapters_in_memory_is_that_of_their_checkpoints(critic, trained, llama, tmp_path):
    weights = []
    for source in (str(trained), in_memory(trained)):
        reward = LoRARewardModel(source)
        own = LoRACritic() if critic == "of the reward" else LoRACritic(source)
        sizes = PPOConfig(rollout_batch_size=8, micro_batch_size=4)
        module = PPOModule(
            llama, reward, SamplingParams(max_new_tokens=4), sizes, critic=own, adapter=LoRA(rank=2), optimizer=sgd(0.1)
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1)
        trainer.fit(module, PromptDataModule([{"prompt": f"w{n}"} for n in range(8)]))
        weights.append(full_weights(module))
    assert len(weights[0]) == len(weights[1])
    assert all(torch.equal(one, other) for one, other in zip(*weights))


def test_a_separate_critic_does_not_start_from_an_adapter(trained, llama):
    for source in (str(trained), in_memory(trained)):
        module = PPOModule(llama, LoRARewardModel(source), critic=SeparateCritic())
        with pytest.raises(UserError, match=r"critic: the reward .* is an adapter; a separate critic starts"):
            module.check_models()


def test_incompatible_adapters_are_refused(trained, llama, model_folders, tokenizer, tmp_path):
    def attach(checkpoint: Path, model: Any, path: str, **settings: Any) -> None:
        reward = LoRARewardModel(str(checkpoint), **settings)
        reward.prepare(tokenizer, CPU)
        reward.attach(model, path)

    plain = load_causal_lm(llama, tokenizer, ModelLoadingConfig())
    with pytest.raises(UserError, match=r"set model\.adapter"):
        attach(trained, plain, llama)
    changed = Path(shutil.copytree(llama, tmp_path / "changed"))
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"trained on another base than '{changed}', on '{llama}'"):
        attach(trained, policy(str(changed), tokenizer), str(changed))
    old = checkpoint_with_base(trained, llama, tmp_path / "old.ckpt")
    attach(old, policy(llama, tokenizer), llama)
    with pytest.raises(UserError, match=r"another base .*\(its weight 'model.layers.1.mlp.up_proj.weight' differs\)"):
        attach(old, policy(str(changed), tokenizer), str(changed))
    with pytest.raises(UserError, match="trained on another base"):
        attach(trained, policy(model_folders["qwen2"], tokenizer), model_folders["qwen2"])
    with pytest.raises(UserError, match="there is no checkpoint"):
        attach(tmp_path / "nothing.ckpt", plain, llama)
    content = torch.load(trained, weights_only=True)
    for changes, message in (
        ({"adapter": None}, "without an adapter, which shares no base; train the reward model with -c adapter/lora"),
        ({"module": "SFTModule"}, "a checkpoint of SFTModule, not of RewardModule"),
        ({"config": content["lit_rlhf"]["config"].replace("score_shift", "x")}, "no centering constants"),
        ({"base": ["elsewhere", {"quantization": "nf4"}]}, "one is in 4 bits, the other is not"),
        (
            {"tokenizer": {k: v.replace('"w3"', '"v3"') for k, v in content["lit_rlhf"]["tokenizer"].items()}},
            "another tok",
        ),
    ):
        torch.save({**content, "lit_rlhf": {**content["lit_rlhf"], **changes}}, tmp_path / "changed.ckpt")
        with pytest.raises(UserError, match=message):
            attach(tmp_path / "changed.ckpt", policy(llama, tokenizer), llama)


@pytest.mark.parametrize("part", ["lora_B", "score.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_that_holds_no_numbers_is_refused(value, part, trained, llama, tokenizer, tmp_path):
    content = torch.load(trained, weights_only=True)
    name = next(name for name in content["state_dict"] if part in name)
    content["state_dict"][name].flatten()[1] = value
    torch.save(content, tmp_path / "diverged.ckpt")
    reward = LoRARewardModel(str(tmp_path / "diverged.ckpt"))
    reward.prepare(tokenizer, CPU)
    with pytest.raises(UserError, match=r"the weight '[\w.]+' of '.*diverged.ckpt' holds NaN or infinity"):
        reward.attach(policy(llama, tokenizer), llama)


def test_the_adapter_is_the_average_if_there_is_one(trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    prefix, state = content["lit_rlhf"]["prefix"], content["state_dict"]
    averaged = {name: weight + 1 for name, weight in state.items() if name.startswith(prefix)}
    torch.save(content | {"average": {"weights": averaged, "updates": 3}}, tmp_path / "averaged.ckpt")
    weights = read_scalar_adapter(str(tmp_path / "averaged.ckpt")).weights
    assert weights.keys() == {name.removeprefix(prefix) for name in averaged}
    assert all(torch.equal(weight, averaged[prefix + name]) for name, weight in weights.items())
