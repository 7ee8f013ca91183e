"""Several adapters on one base, and a reward model's adapter out of its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedModel

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter, adapter_state_dict, add_lora, unique_adapter_name
from lit_rlhf.models.shared_backbone import hidden_states_with_adapter
from lit_rlhf.modules import RewardModule
from lit_rlhf.packing.packed_batch import PackedBatch, pack_batch
from lit_rlhf.rewards import LoRARewardModel, RewardModelScorer
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.small_runs import quiet_trainer, rankings, write_rows

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
CPU = torch.device("cpu")


def two_adapters(path: str, tokenizer: Any, checkpointing: bool = False) -> Any:
    """A model with the adapters "default" and "critic", both away from their start."""
    model = load_causal_lm(path, tokenizer, ModelLoadingConfig(gradient_checkpointing=checkpointing))
    add_lora(model, LoRA(rank=2))
    add_lora(model, LoRA(rank=3), "critic")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("default", "critic"):
            for weight in adapter_state_dict(model, name).values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def laid_out(model: PreTrainedModel) -> PackedBatch:
    """The rows as the model computes them, the first token of each its prompt."""
    ids, mask = pad_right(ROWS, 0)
    return pack_batch(ids, mask, ids.shape[1] - 1, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_each_adapter_computes_alone_and_none_is_frozen_by_the_switch(name, model_folders, tokenizer):
    model = two_adapters(model_folders[name], tokenizer).eval()
    rows = laid_out(model)
    policy, critic = (hidden_states_with_adapter(model, each, rows) for each in (None, "critic"))
    with active_adapter(model, None):
        base = hidden_states_with_adapter(model, None, rows)
    apart = [(one - other).abs().max() for one, other in ((policy, critic), (policy, base), (critic, base))]
    assert min(apart) > 1e-2
    torch.testing.assert_close(hidden_states_with_adapter(model, None, rows), policy)
    plain = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    torch.testing.assert_close(hidden_states_with_adapter(plain, None, rows), base)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if "lora_" in key}
    assert unique_adapter_name(model, "critic") == "critic_2" and unique_adapter_name(model, "reward") == "reward"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_both_adapters_get_their_own_gradient_from_one_backward_pass(checkpointing, llama, tokenizer):
    """Recomputation happens after the switch back: a block must then run under the adapter of its forward pass."""
    whole = two_adapters(llama, tokenizer, checkpointing).train()
    rows = laid_out(whole)
    critic = hidden_states_with_adapter(whole, "critic", rows)[:, :, 0].sum()
    policy = hidden_states_with_adapter(whole, None, rows)[:, :, 1].sum()
    (policy + 2 * critic).backward()
    alone = two_adapters(llama, tokenizer).train()
    for name, factor, column in ((None, 1, 1), ("critic", 2, 0)):
        (factor * hidden_states_with_adapter(alone, name, rows)[:, :, column].sum()).backward()
    for name in ("default", "critic"):
        expected = adapter_state_dict(alone, name)
        for key, weight in adapter_state_dict(whole, name).items():
            assert weight.grad.abs().max() > 0
            torch.testing.assert_close(weight.grad, expected[key].grad, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a reward model trained with LoRA."""
    folder = tmp_path_factory.mktemp("reward")
    data = ComparisonDataModule(write_rows(folder / "rows.jsonl", rankings(8)), micro_batch_size=4)
    module = RewardModule(llama, lambda p: torch.optim.Adam(p, lr=5e-2), adapter=LoRA(rank=2))
    keep = ModelCheckpoint(folder, filename="last")
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    module.model.center(0.25, 2.0)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def episodes() -> Episodes:
    ids, mask = pad_right([[0, *row] for row in ROWS], 0)
    mask[:, 0] = 0
    return Episodes(ids, mask, ["w1"] * 3, ["w2"] * 3, [{}] * 3, 2)


def policy(path: str, tokenizer: Any) -> Any:
    model = load_causal_lm(path, tokenizer, ModelLoadingConfig())
    add_lora(model, LoRA(rank=4))
    return model


def test_a_riding_reward_model_scores_as_its_export_does(trained, llama, tokenizer, tmp_path):
    export_checkpoint(trained, tmp_path)
    folder = RewardModelScorer(str(tmp_path))
    folder.prepare(tokenizer, CPU)
    expected = folder.score(episodes())
    assert expected.std() > 0.1
    riding, model = LoRARewardModel(str(trained), batch_size=2), policy(llama, tokenizer)
    riding.prepare(tokenizer, CPU)
    riding.attach(model, llama)
    torch.testing.assert_close(riding.score(episodes()), expected, atol=1e-5, rtol=1e-5)
    assert not any(weight.requires_grad for weight in adapter_state_dict(model, "reward").values())
    assert all(weight.requires_grad for weight in adapter_state_dict(model, "default").values())
    second = LoRARewardModel(str(trained))
    second.prepare(tokenizer, CPU)
    second.attach(model, llama)
    torch.testing.assert_close(second.score(episodes()), expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_ride_is_refused(trained, llama, model_folders, tokenizer, tmp_path):
    def ride(checkpoint: Path, model: Any, path: str, **settings: Any) -> None:
        reward = LoRARewardModel(str(checkpoint), **settings)
        reward.prepare(tokenizer, CPU)
        reward.attach(model, path)

    plain = load_causal_lm(llama, tokenizer, ModelLoadingConfig())
    with pytest.raises(UserError, match=r"set model\.adapter"):
        ride(trained, plain, llama)
    other = policy(llama, tokenizer)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match=r"another base than 'x' \(its weight 'model.layers.1.mlp.up_proj.weight'"):
        ride(trained, other, "x")
    with pytest.raises(UserError, match="trained on another base"):
        ride(trained, policy(model_folders["qwen2"], tokenizer), model_folders["qwen2"])
    with pytest.raises(UserError, match="there is no checkpoint"):
        ride(tmp_path / "nothing.ckpt", plain, llama)
    content = torch.load(trained, weights_only=True)
    for change, message in (
        ({"adapter": None}, "without an adapter, which shares no base; train the reward model with -c adapter/lora"),
        ({"module": "SFTModule"}, "a checkpoint of SFTModule, not of RewardModule"),
        ({"config": content["lit_rlhf"]["config"].replace("score_shift", "x")}, "no centring constants"),
        ({"four_bit_base": ["elsewhere", {}]}, "one is in 4 bits, the other is not"),
        (
            {"tokenizer": {k: v.replace('"w3"', '"v3"') for k, v in content["lit_rlhf"]["tokenizer"].items()}},
            "another tok",
        ),
    ):
        torch.save({**content, "lit_rlhf": {**content["lit_rlhf"], **change}}, tmp_path / "changed.ckpt")
        with pytest.raises(UserError, match=message):
            ride(tmp_path / "changed.ckpt", policy(llama, tokenizer), llama)
