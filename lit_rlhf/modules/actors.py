"""The models of PPO (App. C.4): policy, critic and reference, how each is loaded and how each is called."""

from contextlib import nullcontext
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.models.adapters import adapter_off, add_lora
from lit_rlhf.models.loading import load_causal_lm, load_config
from lit_rlhf.models.options import LoRA, ModelOptions
from lit_rlhf.models.scalar import ScalarModel, load_scalar_model
from lit_rlhf.modules.base import LitModule
from lit_rlhf.rollout.endings import end_ids
from lit_rlhf.rollout.passes import response_logprobs, response_values
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.strategies import shard_model


class ActorCritic(LitModule):
    """Policy and critic, which are trained, and the reference, which is not. Base of `PPOModule`.

    Args:
        model: folder or hub name of the policy's start.
        reference: of what the KL is measured against. With an adapter and the policy's own path, its frozen base.
        critic: of the critic's start: a reward model, or a language model, which gets a zero head.
        critic_learning_rate: of the critic's parameter group.
        sampling: how responses are drawn: log-probs are of the distribution that it leaves.
        optimizer: see `LitModule`.
        scheduler: see `LitModule`.
        adapter: train low-rank adapters of both.
        options: how weights are loaded.

    Attributes:
        policy: the causal language model.
        critic: the value network.
        frozen: "reference", where it is a model of its own.
    """

    export_prefix = "policy."

    def __init__(
        self,
        model: str,
        reference: str,
        critic: str,
        critic_learning_rate: float,
        sampling: Sampling,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        adapter: LoRA | None,
        options: ModelOptions | None,
    ) -> None:
        super().__init__(model, options, adapter, optimizer, scheduler)
        self.reference_path, self.critic_path = reference, critic
        self.critic_learning_rate, self.sampling = critic_learning_rate, sampling
        self.policy: PreTrainedModel
        self.critic: ScalarModel
        self.frozen: dict[str, Any] = {}  # a plain dict: neither trained, nor wrapped, nor in the checkpoint

    @property
    def exported(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    def check_models(self) -> None:
        """Refuse a model that is not there; reads configurations, no weights."""
        for path in (self.model_path, self.reference_path, self.critic_path):
            load_config(path, self.options)

    def load_models(self) -> None:
        """Load all three."""
        self.policy = load_causal_lm(self.model_path, self.tokenizer, self.options)
        self.critic = load_scalar_model(self.critic_path, self.tokenizer, self.options)
        if self.critic.fresh_head:
            self.critic.model.score.weight.data.zero_()
        if self.adapter is not None:
            add_lora(self.policy, self.adapter)
            add_lora(self.critic.model, self.adapter)
        if self.adapter is None or self.reference_path != self.model_path:
            reference = load_causal_lm(self.reference_path, self.tokenizer, self.options)
            device = self.trainer.strategy.root_device
            self.frozen["reference"] = reference.to(device).eval().requires_grad_(False)
        shard_model(self.policy, self.trainer.strategy)
        shard_model(self.critic, self.trainer.strategy)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the policy's group and the critic's with its own learning rate."""
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad]},
            {"params": [p for p in self.critic.parameters() if p.requires_grad], "lr": self.critic_learning_rate},
        ]

    def logprobs(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Return log-probs of the response under the policy, (B, R)."""
        return response_logprobs(self.policy, input_ids, attention_mask, width, self.sampling)

    def reference_logprobs(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Return log-probs of the response under the reference policy, (B, R)."""
        own, ends = self.frozen.get("reference"), end_ids(self.policy, self.sampling)
        with nullcontext() if own else adapter_off(self.policy):
            return response_logprobs(own or self.policy, input_ids, attention_mask, width, self.sampling, ends)

    def values(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """Return the critic's value before each response token, (B, R)."""
        return response_values(self.critic, input_ids, attention_mask, width)

    def logprobs_and_values(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return log-probs of the response under the policy and the critic's values, (B, R) each."""
        return self.logprobs(input_ids, attention_mask, width), self.values(input_ids, attention_mask, width)
