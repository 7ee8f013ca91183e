"""The models of PPO (App. C.4): how policy, critic, reference and reward are loaded, moved and called."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import stop_token_ids
from lit_rlhf.models.fingerprint import model_fingerprint
from lit_rlhf.models.flops import count_forward_flops_per_token, count_training_flops_per_token
from lit_rlhf.models.given import ModelSource, TokenizerSource, copied, model_name
from lit_rlhf.models.loading import (
    check_causal_lm,
    check_same_token_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter
from lit_rlhf.modules.base import LitModule
from lit_rlhf.modules.critics import Critic, CriticInit
from lit_rlhf.packing.packed_batch import PackedBatch, pack_batch
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rollout.forward_passes import response_logprobs
from lit_rlhf.strategies import data_parallel_group, is_sharded, meta_init_except_rank_zero, shard_model


class ActorCritic(LitModule):
    """Policy and critic, which are trained, and the frozen reference. Base of `PPOModule`.

    Args:
        model: folder or hub name that the policy is initialized from, or the policy, which is trained in place.
        reference: the model that the KL is measured to. With an adapter and the policy's own path, its frozen base.
        critic: computes values; None for an advantage estimator that uses none.
        reward: scores responses; the critic is initialized from its model by default.
        critic_learning_rate: of the critic's parameter group.
        sampling: how responses are sampled; log-probs are of the resulting distribution.
        optimizer: see `LitModule`.
        scheduler: see `LitModule`.
        adapter: train low-rank adapters of both.
        loading: how weights are loaded.
        offload_frozen: keep reference and reward model in host memory except while episodes are scored.
        tokenizer: the policy's.

    Attributes:
        policy: the causal language model.
        critic: the critic, or None.
        frozen: "reference", if it is a model of its own.
    """

    export_prefix = "policy."
    lineage_role = "ppo"
    #: passes of the policy over an episode when it is scored, and over its tokens in the update
    num_scoring_passes, num_update_passes = 0, 1
    network_metrics = {"policy": ("lr/policy", "grad_norm/policy"), "critic": ("lr/critic", "grad_norm/critic")}

    def __init__(
        self,
        model: ModelSource,
        reference: ModelSource,
        critic: Critic | None,
        reward: Reward,
        critic_learning_rate: float,
        sampling: SamplingParams,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        adapter: LoRA | None,
        loading: ModelLoadingConfig | None,
        offload_frozen: bool,
        tokenizer: TokenizerSource | None,
    ) -> None:
        super().__init__(model, loading, adapter, optimizer, scheduler, tokenizer)
        if sampling.temperature == 0:
            raise UserError(
                "sampling.temperature is 0: a greedy rollout explores nothing and has no log-probs to learn from"
            )
        if adapter is not None and adapter.dropout:
            raise UserError(
                f"model.adapter.dropout is {adapter.dropout}: PPO needs 0, or an update's first ratio would not be 1"
            )
        self.reference_path, self.reward, self.critic = model_name(reference), reward, critic
        self.sources["reference"] = reference
        self.critic_learning_rate, self.sampling = critic_learning_rate, sampling
        self.offload_frozen = offload_frozen
        self.policy: PreTrainedModel
        self.frozen: dict[str, Any] = {}  # a plain dict: neither trained, nor wrapped, nor in the checkpoint

    @property
    def exported_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    @property
    def critic_init(self) -> CriticInit:
        """What a critic can be initialized from."""
        reward = self.reward.critic_init_path()
        return CriticInit(self.sources["model"], reward, self.tokenizer, self.loading, self.adapter)

    def check_models(self) -> None:
        """Refuse a missing model, and an offload that would move nothing; reads no weights."""
        for source in self.sources.values():
            check_causal_lm(load_config(source, self.loading), model_name(source))
        if isinstance(self.sources["reference"], str) and self.reference_path != self.model_path:
            own = load_tokenizer(self.reference_path, self.loading)
            check_same_token_ids(self.tokenizer, own, f"reference: {self.reference_path!r}")
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
        return self.adapter is None or bool(self.sources["reference"] != self.sources["model"])

    @property
    def offloadable_rewards(self) -> list[Reward]:
        """The rewards with a model that can be moved."""
        return [part for part in self.reward.iter_parts() if part.offloadable]

    @property
    def offloaded(self) -> list[str]:
        """The names of the models that are in host memory except while episodes are scored."""
        if not self.offload_frozen:
            return []
        reference = self.has_separate_reference and self.loading.quantization is None
        return ["reference"] * reference + ["reward model"] * len(self.offloadable_rewards)

    def configure_model(self) -> None:
        """Load all models, once; those that share the policy's backbone after the policy."""
        strategy = self.strategy
        if hasattr(self, "policy"):
            if not is_sharded(self.policy):  # fitted again, or after `load_from_checkpoint`: perhaps on another device
                self._move_frozen(torch.device("cpu") if self.offload_frozen else strategy.root_device)
            return
        reference = self.sources["reference"]
        if not isinstance(reference, str):  # now: training changes the policy in place
            self.object_fingerprints["reference policy"] = model_fingerprint(reference, self.loading)
        scorers = [source for part in self.reward.iter_parts() for source in part.model_paths()]
        for number, source in enumerate(scorers, 1):
            if not isinstance(source, str):
                self.object_fingerprints[f"reward model {number}"] = model_fingerprint(source, self.loading)
        critic_init = self.critic_init
        if self.adapter is not None:  # a critic or a reference that starts from the same object gets no adapter of it
            critic_init = critic_init._replace(model=copied(critic_init.model))
        self.reward.prepare(self.tokenizer, strategy.root_device)
        frozen_base = None if self.critic is None else self.critic.frozen_base(critic_init)
        if frozen_base is not None and not isinstance(frozen_base, str):
            self.object_fingerprints["critic base"] = model_fingerprint(frozen_base, self.loading)
        for part in self.reward.iter_parts():
            part.group = data_parallel_group(strategy)
        with meta_init_except_rank_zero(strategy):
            self.policy = load_causal_lm(self.sources["model"], self.tokenizer, self.loading)
            self.add_adapter(self.policy)
        self.reward.attach(self.policy, self.model_path)
        if self.critic is not None:
            with meta_init_except_rank_zero(strategy):
                self.critic.load(self.policy, critic_init)
        if self.has_separate_reference:
            with meta_init_except_rank_zero(strategy):
                reference = load_causal_lm(copied(reference), self.tokenizer, self.loading)
            shard_model(reference.requires_grad_(False), strategy)
            self.frozen["reference"] = reference.to(strategy.root_device).eval()
        shard_model(self.policy, strategy)
        for module in self.critic.children() if self.critic is not None else ():
            shard_model(module, strategy)
        if self.offload_frozen:
            self._move_frozen(torch.device("cpu"))

    @contextmanager
    def frozen_on_device(self) -> Iterator[None]:
        """Within the block, models that `offload_frozen` keeps in host memory are on the device."""
        if not self.offload_frozen:
            yield
            return
        self._move_frozen(self.device)
        try:
            yield
        finally:
            self._move_frozen(torch.device("cpu"))

    def _move_frozen(self, device: torch.device) -> None:
        """Move reference and reward models, except weights in 4 bits, which stay where they were quantized."""
        if "reference" in self.frozen and self.loading.quantization is None:
            self.frozen["reference"].to(device)
        for reward in self.offloadable_rewards:
            reward.to(device)

    def frozen_model_paths(self) -> dict[str, str]:
        """See `LitModule`: the reference policy, every reward model, and the frozen base of a critic."""
        paths = [model_name(source) for part in self.reward.iter_parts() for source in part.model_paths()]
        rewards = {f"reward model {number}": path for number, path in enumerate(paths, 1)}
        base = None if self.critic is None else self.critic.frozen_base(self.critic_init)
        critic = {} if base is None else {"critic base": model_name(base)}
        return {**super().frozen_model_paths(), "reference policy": self.reference_path, **rewards, **critic}

    def input_models(self) -> dict[str, str]:
        """See `Traceable.input_models`: the policy's start, the reference, the reward models, the critic's start."""
        critic = None if self.critic is None else self.critic.init_path(self.critic_init)
        models = {"starting policy": self.model_path} if isinstance(self.sources["model"], str) else {}
        models |= {
            role: path for role, path in self.frozen_model_paths().items() if role not in self.object_fingerprints
        }
        return {**models, "starting critic": critic} if isinstance(critic, str) else models

    def flops_per_token(self) -> int:
        """See `Traceable.flops_per_token`: generating, scoring by reference, reward models and critic, and the update.

        A token of an episode counts once, whether it is the prompt's or the response's.
        """
        policy = count_forward_flops_per_token(self.policy)
        reference = count_forward_flops_per_token(self.frozen.get("reference", self.policy))
        rewards = sum(part.flops_per_token() for part in self.reward.iter_parts())
        scoring = policy * self.num_scoring_passes + reference + rewards
        update = count_training_flops_per_token(self.policy)
        if self.critic is not None and not self.critic.shares_forward_pass:
            backbone = [] if self.critic.models() else [self.policy]  # of an adapter on the policy's base
            scoring += sum(count_forward_flops_per_token(model) for model in (self.critic, *backbone))
            update += sum(count_training_flops_per_token(model) for model in (self.critic, *backbone))
        return policy + scoring + update * self.num_update_passes

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the policy's group, and the critic's with its own learning rate."""
        critic = [] if self.critic is None else self.critic.trainable_parameters(self.policy)
        is_critic = set(critic)
        groups = [{"params": [p for p in self.policy.parameters() if p.requires_grad and p not in is_critic]}]
        return [*groups, {"params": critic, "lr": self.critic_learning_rate}] if critic else groups

    def split_by_network(self, parameters: Iterable[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        """See `LitModule`: the critic's are those that have its learning rate."""
        of_critic = set(() if self.critic is None else self.critic.trainable_parameters(self.policy))
        split: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:
            split.setdefault("critic" if parameter in of_critic else "policy", []).append(parameter)
        return split

    def drop_policy_gradients(self) -> None:
        """Delete the policy's gradients before a step: the optimizer then leaves the policy as it is."""
        for parameter in self.parameter_groups()[0]["params"]:
            parameter.grad = None

    def pack(self, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> PackedBatch:
        """Pack a batch such that policy and critic can both compute it, see `pack_batch`."""
        critics = [] if self.critic is None else self.critic.models()
        return pack_batch(input_ids, attention_mask, response_width, self.policy, *critics)

    def policy_logprobs(self, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
        """Return log-probs of the response under the policy, (B, R)."""
        return response_logprobs(self.policy, input_ids, attention_mask, response_width, self.sampling)

    def ref_logprobs(self, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
        """Return log-probs of the response under the reference policy, (B, R)."""
        reference, stop_ids = self.frozen.get("reference"), stop_token_ids(self.policy, self.sampling)
        with nullcontext() if reference else active_adapter(self.policy, None):
            return response_logprobs(
                reference or self.policy, input_ids, attention_mask, response_width, self.sampling, stop_ids
            )

    def critic_values(self, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
        """Return the critic's value before each response token, (B, R); 0 without a critic."""
        if self.critic is None:
            return torch.zeros(len(input_ids), response_width, device=input_ids.device)
        return self.critic.values(self.policy, self.pack(input_ids, attention_mask, response_width))
