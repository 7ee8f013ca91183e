"""A reward model that shares the policy's frozen base, as one more adapter."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.flops import count_forward_flops_per_token
from lit_rlhf.models.given import model_name
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.lora import adapter_state_dict, unique_adapter_name
from lit_rlhf.models.lora_checkpoint import (
    AdapterSource,
    attach_adapter,
    check_same_vocabulary,
    read_scalar_adapter,
    resolve_adapter,
)
from lit_rlhf.models.shared_backbone import ScalarHead, hidden_states_with_adapter
from lit_rlhf.packing.packed_batch import PackedBatch
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rewards.reward_model import score_by_length
from lit_rlhf.rollout.experience import Episodes


class LoRARewardModel(Reward):
    """A reward model trained with LoRA from the policy's starting model; it takes the memory of adapter and head alone.

    Args:
        checkpoint: Lightning checkpoint of its `RewardModule`, such as runs/small/reward/last.ckpt; or the `model` of
            such a module in memory.
        require_centered: refuse a model without centering constants (App. C.2: demonstrations score 0 on average).
        batch_size: episodes per forward pass.
    """

    uses_token_ids_only = True

    def __init__(self, checkpoint: AdapterSource | Path, require_centered: bool = True, batch_size: int = 64) -> None:
        self.source = resolve_adapter(checkpoint, "reward")
        self.path, self.require_centered, self.batch_size = model_name(self.source), require_centered, batch_size
        self.policy: PreTrainedModel
        self.head: ScalarHead

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Read the checkpoint; refuse another vocabulary, or one without centering constants."""
        self.adapter = read_scalar_adapter(self.source)
        self.device = device
        check_same_vocabulary(self.adapter, tokenizer, ModelLoadingConfig())
        if self.require_centered and not self.adapter.is_centered:
            raise UserError(
                f"reward: {self.path!r} has no centering constants: train it with the callback CenterScores, or set "
                "model.reward.init_args.require_centered to false"
            )

    def attach(self, policy: PreTrainedModel, path: str) -> None:
        """See `Reward.attach`: put the adapter on the policy's base."""
        self.policy, self.adapter_name = policy, unique_adapter_name(policy, "reward")
        self.head = attach_adapter(self.adapter, policy, path, self.adapter_name).to(self.device).requires_grad_(False)
        for weight in adapter_state_dict(policy, self.adapter_name).values():
            weight.requires_grad_(False)
        del self.adapter  # it keeps the checkpoint's file open

    @torch.no_grad()
    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        return score_by_length(self.score_packed, self.policy, episodes, self.batch_size)

    def score_packed(self, batch: PackedBatch) -> Tensor:
        """Return the score at the last token of each episode, (b,) float32."""
        return self.head(hidden_states_with_adapter(self.policy, self.adapter_name, batch)[batch.last_token_index])

    def critic_init_path(self) -> AdapterSource:
        """See `Reward.critic_init_path`: the adapter's checkpoint, or the object."""
        return self.source

    def model_paths(self) -> list[str | nn.Module]:
        """See `Reward.model_paths`."""
        return [self.source]

    def flops_per_token(self) -> int:
        """See `Reward.flops_per_token`: a pass over the policy's base."""
        return count_forward_flops_per_token(self.policy)
