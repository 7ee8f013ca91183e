"""Settings of the PPO update."""

from dataclasses import dataclass
from typing import Literal

from lit_rlhf.errors import UserError


@dataclass
class PPOConfig:
    """Batch sizes and coefficients of the PPO update.

    Args:
        rollout_batch_size: episodes per iteration, over all ranks (paper: 512).
        samples_per_prompt: responses sampled per prompt; they are episodes, so an iteration has rollout_batch_size /
            samples_per_prompt prompts (paper: 1).
        micro_batch_size: episodes per backward pass, on each rank. The minibatch is micro_batch_size x
            accumulate_grad_batches x ranks (paper: 64).
        ppo_epochs: passes over the experience of an iteration (paper: 1).
        clip_range: ε of the probability ratio (paper: 0.2).
        value_clip_range: how far a value may move from that at sampling; the paper is silent (Stiennon 2020: 0.2).
        value_coefficient: weight of the value loss in addition to the policy loss. If policy and critic share no
            weights, with Adam it only matters for gradient clipping; with a shared backbone Ziegler et al. take 0.1.
        entropy_coefficient: weight of an entropy bonus: the mean entropy of the full distribution at response tokens,
            added to the objective. The paper has none.
        critic_warmup_iterations: first iterations in which the critic is trained and the policy fixed, the pretraining
            mix included. The paper has none: its critic is initialized from the reward model.
        critic_learning_rate: of the critic's parameter group (paper: 9e-6).
        forward_batch_size: episodes per forward pass of reference, critic and, with `old_logprobs` "recompute",
            policy after sampling; a reward model has a batch size of its own.
        old_logprobs: the log-probs that the ratio starts from. "rollout": as the generator sampled them, at no cost.
            "recompute": by the forward pass that the update uses, for an engine whose numbers differ (half precision,
            another process); one more pass. In both cases `rollout/logprob_mismatch` is the difference.
        importance_sampling_cap: largest weight of a token in the policy loss, where each is weighted by the ratio of
            its probabilities π_old / π_rollout, truncated; corrects for responses that another policy sampled than the
            one that is updated. None: no weights. For `old_logprobs` "recompute".
        overlap_rollouts: sample the responses of the next iteration while this one's update runs, so from a policy that
            is one iteration older; needs a generator outside this process and `importance_sampling_cap`.
        offload_frozen: keep reference and reward model in host memory except while episodes (or validation batches)
            are scored. Saves their weights' memory during update and generation.
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
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    importance_sampling_cap: float | None = None
    overlap_rollouts: bool = False
    offload_frozen: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in (
            "rollout_batch_size",
            "samples_per_prompt",
            "micro_batch_size",
            "ppo_epochs",
            "forward_batch_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"ppo.{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "value_coefficient",
            "entropy_coefficient",
            "critic_warmup_iterations",
            "critic_learning_rate",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"ppo.{name} must not be negative, got {getattr(self, name)}")
        for name in ("clip_range", "value_clip_range"):
            if getattr(self, name) <= 0:
                raise UserError(f"ppo.{name} must be positive, got {getattr(self, name)}")
        cap = self.importance_sampling_cap
        if cap is not None and cap < 1:
            raise UserError(f"ppo.importance_sampling_cap must be at least 1, or null, got {cap}")
        if cap is not None and self.old_logprobs == "rollout":
            raise UserError(
                "ppo.importance_sampling_cap: with ppo.old_logprobs 'rollout' all weights are 1; set it to 'recompute'"
            )
        if self.overlap_rollouts and cap is None:
            raise UserError(
                "ppo.overlap_rollouts: responses are then of an older policy; set ppo.importance_sampling_cap, such as "
                "2, as -c generator/vllm-overlap does"
            )
