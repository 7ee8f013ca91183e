"""A reward model's adapter, read from its checkpoint and attached to a policy with the same base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import export_checkpoint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import adapter_state_dict, add_lora
from lit_rlhf.modules import RewardModule
from lit_rlhf.rewards import LoRARewardModel, RewardModelScorer
from lit_rlhf.rollout.experience import Episodes
from tests.helpers.small_runs import quiet_trainer, rankings, write_rows

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
