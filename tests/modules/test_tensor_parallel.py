"""Tensors split over ranks, beside data parallelism and in other architectures; what cannot be split is refused."""

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
from lit_rlhf.rewards import NormalizedReward
from lit_rlhf.strategies import FSDP2Strategy, parallelize_tensors, tensor_parallel_plan
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd, whole_weights, write_rows
from tests.modules.test_two_ranks import ALONE, ONE, assert_same, train

SETTING = "trainer.strategy.tensor_parallel_size"


@pytest.mark.parametrize("kind", ["reward", "ppo_ptx"])
def test_two_by_two_ranks_are_one_process(kind, llama, tmp_path):
    saved = tmp_path / "saved.ckpt"

    def run() -> object:
        strategy = FSDP2Strategy(save_distributed_checkpoint=True, tensor_parallel_size=2)
        return train(kind, llama, tmp_path, (3, 2, 4), strategy=strategy)

    one = train(kind, llama, tmp_path, ONE, save=False)
    assert_same(on_ranks(run, tmp_path, 4), one)
    # their folder of shards, on one rank without any split
    alone = on_ranks(lambda: train(kind, llama, tmp_path, ALONE, saved, strategy=FSDP2Strategy()), tmp_path, 1)
    assert_same(alone, one)


@pytest.mark.parametrize("shape", ["llama", "qwen2", "gemma", "gpt_neox"])
def test_a_split_model_has_the_logits_and_gradients_of_the_whole(shape, model_folders, tmp_path):
    ids = torch.randint(4, 32, (3, 9), generator=torch.Generator().manual_seed(0))

    def pass_over(split: bool) -> list[torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(model_folders[shape])
        if split:
            dist.init_process_group("gloo")
            parallelize_tensors(model, init_device_mesh("cpu", (2,)))
        logits = model(input_ids=ids, use_cache=False).logits
        torch.log_softmax(logits, -1)[..., 5].sum().backward()
        found = [
            (p.grad.full_tensor() if split and hasattr(p.grad, "full_tensor") else p.grad) for p in model.parameters()
        ]
        assert split == any(p.to_local().numel() < p.numel() for p in model.parameters() if hasattr(p, "to_local"))
        return [logits.detach(), *found]

    whole = pass_over(split=False)
    for rank in on_ranks(lambda: pass_over(tensor_parallel=True), tmp_path):
        assert len(rank) == len(whole)
        for mine, theirs in zip(rank, whole):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_every_rank_holds_half_of_each_block(llama, tmp_path):
    class Counted(SFTModule):
        def on_fit_start(self) -> None:
            weights = [w for w in self.model.model.layers.parameters() if w.dim() == 2]
            self.held, self.whole = (
                sum(w.numel() for w in each) for each in ([w.to_local() for w in weights], weights)
            )

    def run() -> tuple[int, int]:
        module, rows = Counted(llama), write_rows(tmp_path / "rows.jsonl", demonstrations(4))
        trainer = quiet_trainer(tmp_path, max_steps=0, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2))
        trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=1))
        return module.held, module.whole

    for held, whole in on_ranks(run, tmp_path):
        assert held == whole // 2


class Unsure:
    """Scores that differ from rank to rank, as those of a server may."""

    def prepare(self, *_: Any) -> None:
        """Nothing to load."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return another number on every rank and for every episode."""
        return torch.arange(len(episodes.responses)) ** (1.0 + dist.get_rank())


def test_ranks_that_split_tensors_agree_on_a_score_and_count_an_episode_once(llama, tmp_path):
    def run() -> tuple[dict[str, float], torch.Tensor, list[torch.Tensor]]:
        reward = NormalizedReward(Unsure())
        sizes = PPOConfig(rollout_batch_size=8, micro_batch_size=8)
        module = PPOModule(
            llama, reward, SamplingParams(4), sizes, generator=HuggingFaceGenerator(), optimizer=sgd(0.1)
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2))
        trainer.fit(module, datamodule=PromptData())
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "time/" not in name}
        return metrics, reward.moments, whole_weights(module)

    first, second = on_ranks(run, tmp_path)
    assert first[0]["rollout/logprob_mismatch"] < 1e-5
    assert first[0] == second[0] and first[1][0] == second[1][0] == 8
    assert all(torch.equal(one, other) for one, other in zip(first[2], second[2]))


def test_what_cannot_be_split_is_refused(model_folders, llama, tmp_path):
    for shape in ("gpt2", "opt"):
        with pytest.raises(UserError, match=f"{SETTING}: .*no plan .* of {shape}; set it to 1"):
            tensor_parallel_plan(load_config(model_folders[shape], ModelLoadingConfig()), 2)
    with pytest.raises(UserError, match=r"no plan .* of qwen3"):  # it has norms within a head, which need more
        tensor_parallel_plan(Qwen3Config(), 2)
    with pytest.raises(UserError, match="2 does not divide num_key_value_heads 1"):
        tensor_parallel_plan(LlamaConfig(num_attention_heads=4, num_key_value_heads=1), 2)
    setup = Setup(strategy="fsdp2", split=True)
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

    def drop() -> str:
        rows = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
        trainer = quiet_trainer(tmp_path, max_steps=1, devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2))
        module = SFTModule(model_folders["gpt_neox"], dropout=0.2)
        module.tokenizer = load_tokenizer(llama, ModelLoadingConfig())
        with pytest.raises(UserError) as refused:
            trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=1))
        return str(refused.value)

    for line in on_ranks(drop, tmp_path):
        assert line.startswith("model.dropout: ranks that split tensors")
