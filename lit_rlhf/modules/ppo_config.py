"""The numbers of the PPO update."""

from dataclasses import dataclass
from typing import Literal

from lit_rlhf.errors import UserError


@dataclass
class PPOConfig:
    """The numbers of the update.

    Args:
        rollout_batch_size: episodes an iteration, over all ranks (paper: 512).
        samples_per_prompt: responses drawn for each prompt; they are episodes, so an iteration has
            rollout_batch_size / samples_per_prompt prompts (paper: 1).
        micro_batch_size: episodes a backward pass, on each rank. The minibatch is micro_batch_size x accumulate_grad_batches x
            ranks (paper: 64).
        ppo_epochs: passes over the experience of an iteration (paper: 1).
        clip_range: of the probability ratio (paper: 0.2).
        value_clip_range: how far a value may move from that at sampling; the paper is silent (Stiennon 2020: 0.2).
        value_coefficient: weight of the value loss beside the policy loss. Where policy and critic share no weights,
            with Adam it only matters for clipping of gradients; with a shared trunk Ziegler et al. take 0.1.
        entropy_coefficient: weight of an entropy bonus: the mean entropy of the full distribution at response tokens,
            added to what is maximised. The paper has none.
        critic_warmup_iterations: iterations at the start in which the critic learns and the policy stands still, the pretraining
            mix included. The paper has none: its critic starts from the reward model.
        critic_learning_rate: of the critic's parameter group (paper: 9e-6).
        forward_batch_size: episodes a forward pass when scoring.
        old_logprobs: the policy's log-probs that the ratio starts from. "sampled": as the generator drew them, at no cost.
            "recomputed": by the pass that the update makes, for an engine whose numbers differ (half precision, another
            process); one more pass. Either way `rollout/logprob_mismatch` says how far the two are apart.
        offload_frozen: keep reference and reward model in host memory, and on the device while an iteration's episodes
            (or a batch in validation) are scored. Saves their weights in the update and in generation.
    """

    rollout_batch_size: int = 512
    samples_per_prompt: int = 1
    micro_batch_size: int = 8
    ppo_epochs: int = 1
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coefficient: float = 1.0
    entropy_coefficient: float = 0.0
    critic_warmup_iterations: int = 0
    critic_learning_rate: float = 9e-6
    forward_batch_size: int = 16
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    offload_frozen: bool = False

    def __post_init__(self) -> None:
        """Refuse what no update can be made with."""
        for name in ("rollout_batch_size", "samples_per_prompt", "micro_batch_size", "epochs", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"ppo.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("value_coefficient", "entropy_coefficient", "critic_warmup_iterations", "critic_learning_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"ppo.{name} must not be negative, got {getattr(self, name)}")
        for name in ("clip", "value_clip_range"):
            if getattr(self, name) <= 0:
                raise UserError(f"ppo.{name} must be positive, got {getattr(self, name)}")
