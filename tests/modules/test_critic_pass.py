"""A critic with a pass of its own: it begins when the policy's activations are gone, and changes no number."""

import weakref
from typing import Any

import pytest
import torch

from lit_rlhf.callbacks import TerminateOnNaN
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule, actors
from lit_rlhf.modules.critics import LoRACritic, SharedBackboneCritic
from tests.helpers.ppo_fakes import CountOf, PromptData
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import assert_same_weights, quiet_trainer, sgd


def make(model: str, micro_batch_size: int = 4, **settings: Any) -> PPOModule:
    sizes = PPOConfig(
        rollout_batch_size=16, micro_batch_size=micro_batch_size, critic_learning_rate=0.05, value_coefficient=0.3
    )
    return PPOModule(model, CountOf(), SamplingParams(8), sizes, optimizer=sgd(0.05), **settings)


CRITICS = {
    "separate": dict,
    "adapter": lambda: {"critic": LoRACritic(), "adapter": LoRA(rank=2)},
    "shared trunk": lambda: {"critic": SharedBackboneCritic()},
}


@pytest.mark.parametrize("critic", CRITICS)
def test_no_activation_of_the_policy_is_left_when_the_critic_begins(critic, llama, trainer_of, monkeypatch):
    module, saved, left = make(llama, **CRITICS[critic]()), [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.grad_fn is not None:  # else made of the batch
            saved.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def watched(*args: Any) -> Any:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return evaluate(*args)

    def counting(*args: Any) -> Any:
        if torch.is_grad_enabled():
            weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
            there = [storage() for storage in saved]
            left.append(sum(each is not None and each.data_ptr() not in weights for each in there))
        return values(*args)

    evaluate, name = module.forward_batch, "values_from_hidden" if critic == "shared trunk" else "values"
    values = getattr(module.critic, name)
    monkeypatch.setattr(module, "evaluate", watched)
    monkeypatch.setattr(module.critic, name, counting)
    trainer_of(max_epochs=1, accumulate_grad_batches=2).fit(module, datamodule=PromptData())
    # a value from the policy's own pass comes while they are there, which shows that this count sees them
    assert len(left) == 4 and all(left) if critic == "shared trunk" else left == [0] * 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("critic", ["separate", "adapter"])
def test_one_backward_pass_or_two_train_the_same_weights(critic, precision, llama, trainer_of, monkeypatch):
    def train() -> list[torch.Tensor]:
        settings = {"accumulate_grad_batches": 2, "precision": precision, "gradient_clip_val": 0.1}
        trainer, module = trainer_of(max_epochs=2, **settings), make(llama, **CRITICS[critic]())
        trainer.fit(module, datamodule=PromptData())
        return [weight.detach() for weight in module.parameters()]

    two = train()
    monkeypatch.setattr(actors, "requires_single_backward", lambda strategy: True)
    assert_same_weights(two, train(), 1e-6)


def test_ddp_that_looks_for_unused_weights_gets_all_gradients_from_one_pass(llama, tmp_path):
    def train(devices: int, strategy: str) -> list[torch.Tensor]:
        trainer, module = (
            quiet_trainer(tmp_path, max_epochs=2, devices=devices, strategy=strategy),
            make(llama, 4 // devices),
        )
        trainer.fit(module, datamodule=PromptData())
        return [weight.detach() for weight in module.parameters()]

    alone = train(1, "auto")
    for there in on_ranks(lambda: train(2, "ddp_find_unused_parameters_true"), tmp_path):
        assert_same_weights(there, alone)


def test_a_loss_of_the_critic_that_is_no_number_stops_the_run(llama, trainer_of, monkeypatch):
    module = make(llama)
    module.value_loss = lambda values, batch: values.sum() * torch.nan
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        trainer_of(max_epochs=1, callbacks=[TerminateOnNaN()]).fit(module, datamodule=PromptData())
