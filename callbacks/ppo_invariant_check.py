"""Stop PPO where one of the assumptions of its update does not hold."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.rollout import invariants
from lit_rlhf.rollout.advantages import GAE
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.experience_loader import ExperienceLoader, PPOIteration
from lit_rlhf.rollout.invariants import Violation

NUM_PADDED_EPISODES = 2  # episodes that are scored with and without padding
FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2  # nats per token
# In bfloat16 a batch of another shape moves the log-probs of some unlikely tokens by more than the clip range, 0.4 % of
# them with 49 thousand tokens; what the check is for, such as another temperature, clips far more.
HALF_MAX_CLIP_FRACTION = 0.05


class PPOInvariantCheck(Callback):
    """Check every iteration of PPO before its first optimizer step, and stop at a violation.

    Before the first iteration: the padding token is not the end token, and no dropout is active. In every iteration:
    only response tokens are actions; the score is on the last action; advantages are white over all tokens of all
    ranks (with `GAE`); on the first minibatch the ratio is 1, nothing is clipped (in half precision at most 5 % of the
    tokens), and log-probs are those of sampling. At step 0: the KL to the reference is 0, and padding does not change
    the score of the reward model.

    Args:
        tolerance: largest difference between the log-probs of a token in two passes, in nats (and of a score, relative
            to 1 + its absolute value); None: 1e-3 in float32, 0.05 in half precision.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self.is_first_micro_batch = False  # of the iteration

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tokens and dropout.

        Raises:
            UserError: the module is not trained by PPO, or an invariant is violated.
        """
        module: Any = pl_module
        if not isinstance(trainer.train_dataloader, ExperienceLoader):
            raise UserError("PPOInvariantCheck checks PPO; remove it from trainer.callbacks of this recipe")
        models = {"policy": module.policy, **module.frozen}
        models |= {"critic": module.critic} if module.critic is not None else {}
        tokens = module.tokenizer
        self.raise_if_violated(trainer, "padding", invariants.check_pad_token(tokens.pad_token_id, tokens.eos_token_id))
        self.raise_if_violated(trainer, "dropout", invariants.check_no_dropout(models))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the trajectories of an iteration at its first micro-batch, which alone has rollout metrics."""
        self.is_first_micro_batch = isinstance(batch, Experience) and bool(batch.rollout_metrics)
        if not self.is_first_micro_batch:
            return
        loader: Any = trainer.train_dataloader
        for name, violation in self.check_iteration(pl_module, loader.iteration, trainer.global_step):
            self.raise_if_violated(trainer, name, violation)

    def check_iteration(
        self, module: Any, iteration: PPOIteration, step: int
    ) -> Iterator[tuple[str, Violation | None]]:
        """Yield name and result of every check of the trajectories, which all ranks have in full.

        Args:
            module: the PPO module.
            iteration: the current iteration.
            step: the optimizer step.
        """
        trajectories = iteration.trajectories
        yield "actions", invariants.check_response_mask(trajectories)
        coefficient = float(iteration.metrics["reward/kl_coefficient"])
        yield "last action", invariants.check_score_position(trajectories, iteration.rewards, coefficient)
        if isinstance(module.advantages, GAE):
            yield "whitening", invariants.check_whitened(iteration.advantages, trajectories.response_mask)
        if step == 0 and module.reference_path == module.model_path:
            yield "reference", invariants.check_initial_kl(trajectories, self.get_tolerance(module))
        for reward in module.reward.iter_parts() if step == 0 else ():
            if reward.uses_token_ids_only:
                pad_id = module.tokenizer.pad_token_id
                with module.trainer.precision_plugin.forward_context(), module.frozen_on_device():
                    violation = invariants.check_padding_invariance(
                        reward.score, trajectories, NUM_PADDED_EPISODES, pad_id, self.get_tolerance(module)
                    )
                yield "score", violation

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the ratio after the first forward pass of the policy; `PretrainingMix` triggers this hook, too."""
        module: Any = pl_module
        sums = module.epoch_means.sums if self.is_first_micro_batch else {}
        if "policy/clip_fraction" not in sums:
            return
        self.is_first_micro_batch = False
        clip_fraction, mismatch = (
            total / count for total, count in (sums["policy/clip_fraction"], sums["rollout/logprob_mismatch"])
        )
        if module.ppo.old_logprobs == "recompute":  # the mismatch is then not part of the ratio
            mismatch = 0.0
        max_clip_fraction = HALF_MAX_CLIP_FRACTION if is_half_precision(module) else 0.0
        violation = invariants.check_initial_ratio(
            clip_fraction, mismatch, self.get_tolerance(module), max_clip_fraction
        )
        self.raise_if_violated(trainer, "ratio", violation)

    def get_tolerance(self, module: Any) -> float:
        """Return the tolerance, by default that of the precision of the run."""
        if self.tolerance is not None:
            return self.tolerance
        return HALF_TOLERANCE if is_half_precision(module) else FLOAT32_TOLERANCE

    def raise_if_violated(self, trainer: Trainer, name: str, violation: Violation | None) -> None:
        """Stop all ranks if an invariant is violated on any of them; a collective call.

        Args:
            trainer: the trainer.
            name: name of the invariant.
            violation: None if it holds on this rank.

        Raises:
            UserError: what was expected, what was observed and the likely cause.
        """
        if trainer.strategy.reduce_boolean_decision(violation is None, all=True):
            return
        message = violation or "it holds on this rank; see the message of another rank"
        raise UserError(f"PPOInvariantCheck: {name!r} at step {trainer.global_step}: {message}")


def is_half_precision(module: Any) -> bool:
    """Whether the policy computes in half precision."""
    return "16" in str(module.trainer.precision) or any(p.dtype.itemsize < 4 for p in module.policy.parameters())
