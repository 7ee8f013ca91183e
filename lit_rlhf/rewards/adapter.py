"""A reward model that rides on the policy's frozen base, as one more adapter."""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import adapter_weights, free_name
from lit_rlhf.models.layout import Layout
from lit_rlhf.models.lora_checkpoint import check_same_words, put_on, read_scalar_adapter
from lit_rlhf.models.options import ModelOptions
from lit_rlhf.models.riding import RidingHead, hidden_under
from lit_rlhf.rewards.reward_model import score_by_length
from lit_rlhf.rollout.experience import Episodes


class AdapterReward:
    """A reward model trained with LoRA from the policy's starting model; it costs its adapter and its head alone.

    Args:
        checkpoint: Lightning checkpoint of its `RewardModule`, such as runs/small/reward/last.ckpt.
        uncentred: what to do with a model without centring constants (App. C.2: demonstrations score 0 on average).
        batch_size: episodes a forward pass.
    """

    by_ids = True

    def __init__(
        self, checkpoint: str, uncentred: Literal["refuse", "accept"] = "refuse", batch_size: int = 64
    ) -> None:
        self.path, self.uncentred, self.batch_size = checkpoint, uncentred, batch_size
        self.policy: PreTrainedModel
        self.head: RidingHead

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Read the checkpoint, and refuse one of other words or without centring constants."""
        self.adapter = read_scalar_adapter(self.path)
        self.device = device
        check_same_words(self.adapter, tokenizer, ModelOptions())
        if self.uncentred == "refuse" and not self.adapter.centred:
            raise UserError(
                f"reward: {self.path!r} has no centring constants: train it with the callback CentreScores, or set "
                "model.reward.init_args.uncentred to accept"
            )

    def ride(self, policy: PreTrainedModel, path: str) -> None:
        """See `RewardSource`: put the adapter on the policy's base."""
        self.policy, self.name = policy, free_name(policy, "reward")
        self.head = put_on(self.adapter, policy, path, self.name).to(self.device).requires_grad_(False)
        for weight in adapter_weights(policy, self.name).values():
            weight.requires_grad_(False)
        del self.adapter  # it holds the checkpoint's file

    @torch.no_grad()
    def score(self, episodes: Episodes) -> Tensor:
        """See `RewardSource.score`."""
        return score_by_length(self.score_laid_out, self.policy, episodes, self.batch_size)

    def score_laid_out(self, layout: Layout) -> Tensor:
        """Return the score at the last token of each episode, (b,) float32."""
        return self.head(hidden_under(self.policy, self.name, layout)[layout.last])

    def critic(self) -> str:
        """See `RewardSource`: the reward model itself."""
        return self.path

    def models(self) -> list[str]:
        """See `RewardSource`: the checkpoint."""
        return [self.path]
