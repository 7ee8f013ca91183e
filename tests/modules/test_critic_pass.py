"""A critic with a forward pass of its own runs after the policy's activations are freed, and changes no number."""

import weakref
from typing import Any

import pytest
import torch

from lit_rlhf.callbacks import TerminateOnNaN
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.modules import ppo as ppo_file
from lit_rlhf.modules.critics import LoRACritic, SharedBackboneCritic
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import assert_same_weights, quiet_trainer, sgd


def make_module(model: str, micro_batch_size: int = 4, **settings: Any) -> PPOModule:
    sizes = PPOConfig(
        rollout_batch_size=16, micro_batch_size=micro_batch_size, critic_learning_rate=0.05, value_coefficient=0.3
    )
    return PPOModule(model, WordShare(), SamplingParams(8), sizes, optimizer=sgd(0.05), **settings)


CRITICS = {
    "separate": dict,
    "lora": lambda: {"critic": LoRACritic(), "adapter": LoRA(rank=2)},
    "shared backbone": lambda: {"critic": SharedBackboneCritic()},
}


@pytest.mark.parametrize("critic", CRITICS)
def test_the_policys_activations_are_freed_before_the_critic_runs(critic, llama, make_trainer, monkeypatch):
    module, saved, num_alive = make_module(llama, **CRITICS[critic]()), [], []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.grad_fn is not None:  # otherwise it comes from the batch
            saved.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def recording(*args: Any) -> Any:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            return forward_batch(*args)

    def counting(*args: Any) -> Any:
        if torch.is_grad_enabled():
            weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
            alive = [storage() for storage in saved]
            num_alive.append(sum(each is not None and each.data_ptr() not in weights for each in alive))
        return values(*args)

    forward_batch, name = module.forward_batch, "values_from_hidden" if critic == "shared backbone" else "values"
    values = getattr(module.critic, name)
    monkeypatch.setattr(module, "forward_batch", recording)
    monkeypatch.setattr(module.critic, name, counting)
    make_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, datamodule=PromptData())
    # values from the policy's own pass are computed while they are alive, which shows that the count works
    assert len(num_alive) == 4 and all(num_alive) if critic == "shared backbone" else num_alive == [0] * 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("critic", ["separate", "lora"])
def test_one_backward_pass_or_two_train_the_same_weights(critic, precision, llama, make_trainer, monkeypatch):
    def train() -> list[torch.Tensor]:
        settings = {"accumulate_grad_batches": 2, "precision": precision, "gradient_clip_val": 0.1}
        trainer, module = make_trainer(max_epochs=2, **settings), make_module(llama, **CRITICS[critic]())
        trainer.fit(module, datamodule=PromptData())
        return [weight.detach() for weight in module.parameters()]

    two_passes = train()
    monkeypatch.setattr(ppo_file, "requires_single_backward", lambda strategy: True)
    assert_same_weights(two_passes, train(), 1e-6)


def test_ddp_with_find_unused_parameters_gets_all_gradients_from_one_pass(llama, tmp_path):
    def train(devices: int, strategy: str) -> list[torch.Tensor]:
        trainer, module = (
            quiet_trainer(tmp_path, max_epochs=2, devices=devices, strategy=strategy),
            make_module(llama, 4 // devices),
        )
        trainer.fit(module, datamodule=PromptData())
        return [weight.detach() for weight in module.parameters()]

    single_process = train(1, "auto")
    for rank in on_ranks(lambda: train(2, "ddp_find_unused_parameters_true"), tmp_path):
        assert_same_weights(rank, single_process)


def test_a_value_loss_that_is_nan_stops_the_run(llama, make_trainer, monkeypatch):
    module = make_module(llama)
    module.value_loss = lambda values, batch: values.sum() * torch.nan
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        make_trainer(max_epochs=1, callbacks=[TerminateOnNaN()]).fit(module, datamodule=PromptData())
