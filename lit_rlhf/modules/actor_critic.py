"""The models of PPO (App. C.4): policy, critic and reference, how each is loaded and how each is called."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import stop_token_ids
from lit_rlhf.models.loading import load_causal_lm, load_config
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter, add_lora
from lit_rlhf.models.shared_backbone import capture_last_hidden_state
from lit_rlhf.modules.base import LitModule
from lit_rlhf.modules.critics import Critic, CriticInit
from lit_rlhf.packing.packed_batch import PackedBatch, pack_batch
from lit_rlhf.rewards.base import (
    Reward,
    iter_rewards,
    movable_parts,
    ride_on_policy,
    source_critic,
    source_models,
)
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.forward_passes import logprobs_and_entropy, packed_logprobs, response_logprobs
from lit_rlhf.strategies import data_group, meta_init_except_rank_zero, requires_single_backward, shard_model


class ForwardOutput(NamedTuple):
    """What policy and critic say of an experience."""

    logprobs: Tensor  # (B, R), of the policy
    values: Tensor | None  # (B, R); None where they take a pass of the critic's own, and without a critic
    entropy: Tensor | None  # (B, R), of the policy's full distribution; None where nothing asks for it


class ActorCritic(LitModule):
    """Policy and critic, which are trained, and the reference, which is not. Base of `PPOModule`.

    Args:
        model: folder or hub name of the policy's start.
        reference: of what the KL is measured against. With an adapter and the policy's own path, its frozen base.
        critic: where values come from; None for an advantage estimator that reads none.
        reward: what the critic starts from by default, see `source_critic`.
        critic_learning_rate: of the critic's parameter group.
        sampling: how responses are drawn: log-probs are of the distribution that it leaves.
        optimizer: see `LitModule`.
        scheduler: see `LitModule`.
        adapter: train low-rank adapters of both.
        loading: how weights are loaded.
        offload_frozen: keep reference and reward model in host memory but while episodes are scored.

    Attributes:
        policy: the causal language model.
        critic: the critic, or None.
        frozen: "reference", where it is a model of its own.
        pending_critic_batch: what the critic has still to learn from, once the policy's backward pass is done.
    """

    export_prefix = "policy."

    def __init__(
        self,
        model: str,
        reference: str,
        critic: Critic | None,
        reward: Reward,
        critic_learning_rate: float,
        sampling: SamplingParams,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        adapter: LoRA | None,
        loading: ModelLoadingConfig | None,
        offload_frozen: bool,
    ) -> None:
        super().__init__(model, loading, adapter, optimizer, scheduler)
        if sampling.temperature == 0:
            raise UserError(
                "sampling.temperature is 0: a greedy rollout explores nothing and has no log-probs to learn from"
            )
        self.reference_path, self.reward, self.critic = reference, reward, critic
        self.critic_learning_rate, self.sampling = critic_learning_rate, sampling
        self.offload_frozen = offload_frozen
        self.policy: PreTrainedModel
        self.pending_critic_batch: tuple[Experience, PackedBatch] | None = None
        self.frozen: dict[str, Any] = {}  # a plain dict: neither trained, nor wrapped, nor in the checkpoint

    @property
    def exported_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    @property
    def critic_init(self) -> CriticInit:
        """What a critic may start from."""
        return CriticInit(self.model_path, source_critic(self.reward), self.tokenizer, self.loading, self.adapter)

    def check_models(self) -> None:
        """Refuse a model that is not there, and an offload that would move nothing; reads no weights."""
        for path in (self.model_path, self.reference_path):
            load_config(path, self.loading)
        if self.critic is not None:
            self.critic.check(self.critic_init)
        if self.offload_frozen and not self.offloaded:
            raise UserError(
                "ppo.offload_frozen: there is nothing to move: no reference and no reward model of their own, or in 4 "
                "bits; set ppo.offload_frozen to false"
            )

    @property
    def has_separate_reference(self) -> bool:
        """Whether the reference is a model of its own, and not the policy's frozen base."""
        return self.adapter is None or self.reference_path != self.model_path

    @property
    def offloaded(self) -> list[str]:
        """What lies in host memory but while episodes are scored."""
        if not self.offload_frozen:
            return []
        reference = self.has_separate_reference and self.loading.quantization is None
        return ["reference"] * reference + ["reward model"] * len(movable_parts(self.reward))

    def configure_model(self) -> None:
        """Load all of them, once; what rides on the policy's base comes after the policy."""
        if hasattr(self, "policy"):
            return
        strategy = self.trainer.strategy
        self.reward.prepare(self.tokenizer, strategy.root_device)
        for source in iter_rewards(self.reward):
            if hasattr(source, "group"):
                source.group = data_group(strategy)
        with meta_init_except_rank_zero(strategy):
            self.policy = load_causal_lm(self.model_path, self.tokenizer, self.loading)
            if self.adapter is not None:
                add_lora(self.policy, self.adapter)
        ride_on_policy(self.reward, self.policy, self.model_path)
        if self.critic is not None:
            with meta_init_except_rank_zero(strategy):
                self.critic.load(self.policy, self.critic_init)
        if self.has_separate_reference:
            with meta_init_except_rank_zero(strategy):
                reference = load_causal_lm(self.reference_path, self.tokenizer, self.loading)
            shard_model(reference.requires_grad_(False), strategy)
            self.frozen["reference"] = reference.to(strategy.root_device).eval()
        shard_model(self.policy, strategy)
        for part in self.critic.children() if self.critic is not None else ():
            shard_model(part, strategy)
        self._move_frozen(torch.device("cpu"))

    @contextmanager
    def frozen_on_device(self) -> Iterator[None]:
        """Within the block, what `offload_frozen` keeps in host memory lies on the device."""
        self._move_frozen(self.device)
        try:
            yield
        finally:
            self._move_frozen(torch.device("cpu"))

    def _move_frozen(self, device: torch.device) -> None:
        if "reference" in self.offloaded:
            self.frozen["reference"].to(device)
        for part in movable_parts(self.reward) if self.offload_frozen else ():
            part.move(device)

    def frozen_model_paths(self) -> dict[str, str]:
        """See `LitModule`: the reference policy and every reward model."""
        rewards = {f"reward model {number}": path for number, path in enumerate(source_models(self.reward), 1)}
        return {**super().frozen_model_paths(), "reference policy": self.reference_path, **rewards}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the policy's group, and the critic's with its own learning rate."""
        values = [] if self.critic is None else self.critic.trainable_parameters(self.policy)
        own = set(values)
        groups = [{"params": [p for p in self.policy.parameters() if p.requires_grad and p not in own]}]
        return [*groups, {"params": values, "lr": self.critic_learning_rate}] if values else groups

    def pack(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> PackedBatch:
        """Return the batch as policy and critic are to compute it."""
        critics = [] if self.critic is None else self.critic.models()
        return pack_batch(input_ids, attention_mask, width, self.policy, *critics)

    def logprobs(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Return log-probs of the response under the policy, (B, R)."""
        return response_logprobs(self.policy, input_ids, attention_mask, width, self.sampling)

    def reference_logprobs(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Return log-probs of the response under the reference policy, (B, R)."""
        own, ends = self.frozen.get("reference"), stop_token_ids(self.policy, self.sampling)
        with nullcontext() if own else active_adapter(self.policy, None):
            return response_logprobs(own or self.policy, input_ids, attention_mask, width, self.sampling, ends)

    def values(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Return the critic's value before each response token, (B, R); 0 without a critic."""
        if self.critic is None:
            return torch.zeros(len(input_ids), width, device=input_ids.device)
        return self.critic.values(self.policy, self.pack(input_ids, attention_mask, width))

    def forward_batch(self, batch: Experience, with_entropy: bool) -> ForwardOutput:
        """Return what the policy's loss reads. A critic with a pass of its own is left to `backward`."""
        layout = self.pack(batch.input_ids, batch.attention_mask, batch.response_mask.shape[1])
        self.epoch_means.add("update/padding_fraction", layout.num_padding, layout.input_ids.numel())
        entropy = None
        with capture_last_hidden_state(self.policy) as kept:
            if with_entropy:
                logprobs, entropy = logprobs_and_entropy(self.policy, layout, self.sampling)
            else:
                logprobs = packed_logprobs(self.policy, layout, self.sampling)
        values = None
        if self.critic is not None and self.critic.shares_forward_pass:
            values = self.critic.values_from_hidden(kept[0], self.policy, layout)
        elif self.critic is not None and requires_single_backward(self.trainer.strategy):
            values = self.critic.values(self.policy, layout)
        elif self.critic is not None:
            self.pending_critic_batch = batch, layout
        return ForwardOutput(logprobs, values, entropy)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go back from a loss, and then, if `evaluate` left it to this, through the critic and back from its loss."""
        super().backward(loss, *args, **kwargs)
        if self.critic is None or self.pending_critic_batch is None:
            return
        (batch, layout), self.pending_critic_batch = self.pending_critic_batch, None
        with self.trainer.precision_plugin.forward_context():
            value = self.normalize_loss(
                self.value_loss(self.critic.values(self.policy, layout), batch), batch.normalizer
            )
        # Lightning divides the loss of a training step by the accumulation itself, but not this one
        self.trainer.strategy.backward(value / self.trainer.accumulate_grad_batches, None)

    def value_loss(self, values: Tensor, batch: Experience) -> Tensor:
        """Return the critic's loss of a micro-batch, summed over its tokens, from its values (B, R)."""
        raise NotImplementedError

    def drop_policy_gradients(self) -> None:
        """Take the policy's gradients away before a step: the optimizer then leaves the policy as it is."""
        for parameter in self.parameter_groups()[0]["params"]:
            parameter.grad = None
