"""Tensor parallelism: with data parallelism, in several architectures; models that cannot be split are refused."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from lit_rlhf.commands.support.compatibility import Setup, setup_unsupported_reason
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation import HuggingFaceGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading import load_config, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from lit_rlhf.rewards import NormalizedReward, Reward
from lit_rlhf.strategies import FSDP2Strategy, parallelize_tensors, tensor_parallel_plan
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, full_weights, quiet_trainer, sgd, write_rows
from tests.modules.test_two_ranks import ONE_OF_TWO, ONE_PROCESS, assert_same, train

SETTING = "trainer.strategy.tensor_parallel_size"


@pytest.mark.parametrize("stage", ["reward", "ppo_ptx"])
def test_two_by_two_ranks_equal_one_process(stage, llama, tmp_path):
    saved = tmp_path / "saved.ckpt"

    def run() -> object:
        strategy = FSDP2Strategy(save_distributed_checkpoint=True, tensor_parallel_size=2)
        return train(stage, llama, tmp_path, (3, 2, 4), strategy=strategy)

    expected = train(stage, llama, tmp_path, ONE_PROCESS, save=False)
    assert_same(on_ranks(run, tmp_path, 4), expected)
    # resume from the sharded checkpoint on one rank without tensor parallelism
    resumed = on_ranks(lambda: train(stage, llama, tmp_path, ONE_OF_TWO, saved, strategy=FSDP2Strategy()), tmp_path, 1)
    assert_same(resumed, expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt_neox"])
def test_a_split_model_has_the_logits_and_gradients_of_the_full_model(architecture, model_folders, tmp_path):
    ids = torch.randint(4, 32, (3, 9), generator=torch.Generator().manual_seed(0))

    def forward_backward(split: bool) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(model_folders[architecture])
        if split:
            dist.init_process_group("gloo")
            parallelize_tensors(model, init_device_mesh("cpu", (2,)))
        logits = model(input_ids=ids, use_cache=False).logits
        torch.log_softmax(logits, -1)[..., 5].sum().backward()
        gradients = [
            (p.grad.full_tensor() if split and hasattr(p.grad, "full_tensor") else p.grad) for p in model.parameters()
        ]
        assert split == any(p.to_local().numel() < p.numel() for p in model.parameters() if hasattr(p, "to_local"))
        return [logits.detach(), *gradients]

    expected = forward_backward(split=False)
    for rank in on_ranks(lambda: forward_backward(split=True), tmp_path):
        assert len(rank) == len(expected)
        for one, other in zip(rank, expected):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_every_rank_holds_half_of_each_layer(llama, tmp_path):
    class CountingModule(SFTModule):
        def on_fit_start(self) -> None:
            weights = [w for w in self.model.model.layers.parameters() if w.dim() == 2]
            self.num_local, self.num_total = (
                sum(w.numel() for w in each) for each in ([w.to_local() for w in weights], weights)
            )

    def run() -> tuple[int, int]:
        module, rows = CountingModule(llama), write_rows(tmp_path / "rows.jsonl", demonstrations(4))
        trainer = quiet_trainer(tmp_path, max_steps=0, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2))
        trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=1))
        return module.num_local, module.num_total

    for num_local, num_total in on_ranks(run, tmp_path):
        assert num_local == num_total // 2


class RankDependentReward(Reward):
    """Scores that differ between ranks, as those of a server may."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return a different score on every rank and for every episode."""
        return torch.arange(len(episodes.responses)) ** (1.0 + dist.get_rank())


def test_tensor_parallel_ranks_agree_on_scores_and_count_an_episode_once(llama, tmp_path):
    def run() -> tuple[dict[str, float], torch.Tensor, list[torch.Tensor]]:
        reward = NormalizedReward(RankDependentReward())
        sizes = PPOConfig(rollout_batch_size=8, micro_batch_size=8)
        module = PPOModule(
            llama, reward, SamplingParams(4), sizes, generator=HuggingFaceGenerator(), optimizer=sgd(0.1)
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2))
        trainer.fit(module, datamodule=PromptData())
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "time/" not in name}
        return metrics, reward.moments, full_weights(module)

    first, second = on_ranks(run, tmp_path)
    assert first[0]["rollout/logprob_mismatch"] < 1e-5
    assert first[0] == second[0] and first[1][0] == second[1][0] == 8
    assert all(torch.equal(one, other) for one, other in zip(first[2], second[2]))


def test_models_and_settings_that_cannot_be_split_are_refused(model_folders, llama, tmp_path):
    for architecture in ("gpt2", "opt"):
        with pytest.raises(UserError, match=f"{SETTING}: .*no plan .* of {architecture}; set it to 1"):
            tensor_parallel_plan(load_config(model_folders[architecture], ModelLoadingConfig()), 2)
    with pytest.raises(UserError, match=r"no plan .* of qwen3"):  # its norms within a head need another plan
        tensor_parallel_plan(Qwen3Config(), 2)
    with pytest.raises(UserError, match="2 does not divide num_key_value_heads 1"):
        tensor_parallel_plan(LlamaConfig(num_attention_heads=4, num_key_value_heads=1), 2)
    setup = Setup(strategy="fsdp2", tensor_parallel=True)
    assert setup_unsupported_reason(setup) is None
    assert setup_unsupported_reason(setup._replace(generator="CachedGenerator")) is None
    for wrong in (
        {"adapter": True},
        {"compiled": True},
        {"optimizer": "torchao.optim.AdamW8bit"},
        {"generator": "Engine"},
    ):
        assert SETTING in (setup_unsupported_reason(setup._replace(device="cuda", **wrong)) or ""), wrong

    def run() -> str:
        with pytest.raises(UserError) as refused:
            train("sft", llama, tmp_path, (6, 2, 3), save=False, strategy=FSDP2Strategy(tensor_parallel_size=2))
        return str(refused.value)

    for line in on_ranks(run, tmp_path, 3):
        assert line == f"{SETTING} 2 does not divide 3 devices; set it to a divisor"

    def run_with_dropout() -> str:
        rows = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
        trainer = quiet_trainer(tmp_path, max_steps=1, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2))
        module = SFTModule(model_folders["gpt_neox"], dropout=0.2)
        module.tokenizer = load_tokenizer(llama, ModelLoadingConfig())
        with pytest.raises(UserError) as refused:
            trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=1))
        return str(refused.value)

    for line in on_ranks(run_with_dropout, tmp_path):
        assert line.startswith("model.dropout: ranks that split tensors")
