"""PPO that stops loudly where one of its own assumptions breaks."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.base import iter_rewards
from lit_rlhf.rollout import invariants
from lit_rlhf.rollout.advantages import GAE
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.experience_loader import PPOIteration
from lit_rlhf.rollout.invariants import Violation

PADDED_EPISODES = 2  # whose score is taken with and without padding
FLOAT32, HALF = 1e-3, 5e-2  # nats a token


class PPOInvariantCheck(Callback):
    """Checks every iteration of PPO before its first optimizer step, and stops where something does not hold.

    Before the first iteration: padding is not the end token, and nothing is dropped. In every iteration: actions are
    the response's tokens alone; the score is on the last action; advantages are white over all tokens of all ranks
    (with `GAE`); the ratio is 1 on the first minibatch, nothing is clipped, and log-probs are as they were sampled. At
    step 0: the KL to the reference is 0, and the reward model's score does not change with padding.

    Args:
        tolerance: how far log-probs of one token may differ between two passes, in nats (and a score, relative to
            1 + its size); None: 1e-3 in float32, 0.05 in half precision.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.tolerance = tolerance
        self.first = False  # whether the micro-batch under way is the first of its iteration

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tokens and dropout."""
        module: Any = pl_module
        if not hasattr(module, "sampling") or not hasattr(module, "policy"):
            raise UserError("PPOInvariantCheck checks PPO; take it out of trainer.callbacks of this recipe")
        models = {"policy": module.policy, **module.frozen}
        models |= {"critic": module.critic} if module.critic is not None else {}
        tokens = module.tokenizer
        self.require(trainer, "padding", invariants.check_pad_token(tokens.pad_token_id, tokens.eos_token_id))
        self.require(trainer, "dropout", invariants.check_no_dropout(models))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the iteration that begins."""
        module: Any = pl_module
        self.first = isinstance(batch, Experience) and bool(batch.rollout_metrics)  # which the first one alone carries
        if not self.first:
            return
        iteration = module.loader.iteration
        for name, broken in self.of_iteration(module, iteration, trainer.global_step):
            self.require(trainer, name, broken)

    def of_iteration(self, module: Any, iteration: PPOIteration, step: int) -> Iterator[tuple[str, Violation | None]]:
        """Yield the checks of trajectories; all ranks hold the same."""
        trajectories = iteration.trajectories
        yield "actions", invariants.check_response_mask(trajectories)
        coefficient = float(iteration.metrics["reward/kl_coefficient"])
        yield "last action", invariants.check_score_position(trajectories, iteration.rewards, coefficient)
        if isinstance(module.advantages, GAE):
            yield "whitening", invariants.check_whitened(iteration.advantages, trajectories.response_mask)
        if step == 0 and module.reference_path == module.model_path:
            yield "reference", invariants.check_initial_kl(trajectories, self.bound(module))
        for part in iter_rewards(module.reward) if step == 0 else ():
            if getattr(part, "uses_token_ids_only", False):
                pad = module.tokenizer.pad_token_id
                with module.trainer.precision_plugin.forward_context(), module.frozen_on_device():
                    found = invariants.check_padding_invariance(
                        part.score, trajectories, PADDED_EPISODES, pad, self.bound(module)
                    )
                yield "score", found

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the ratio on the first minibatch, after its forward pass. The pretraining mix comes by here as well."""
        module: Any = pl_module
        figures = module.tally.sums
        if not self.first or "policy/clip_fraction" not in figures:
            return
        self.first = False
        clipped, mismatch = (
            float(total / count)
            for total, count in (figures["policy/clip_fraction"], figures["rollout/logprob_mismatch"])
        )
        if module.ppo.old_logprobs == "recomputed":  # the mismatch is then allowed for: it is no part of the ratio
            mismatch = 0.0
        self.require(trainer, "ratio", invariants.check_initial_ratio(clipped, mismatch, self.bound(module)))

    def bound(self, module: Any) -> float:
        """The tolerance, by the precision of the run."""
        if self.tolerance is not None:
            return self.tolerance
        half = "16" in str(module.trainer.precision) or any(p.dtype.itemsize < 4 for p in module.policy.parameters())
        return HALF if half else FLOAT32

    def require(self, trainer: Trainer, name: str, broken: Violation | None) -> None:
        """Stop, on all ranks, where a check failed on any.

        Raises:
            UserError: what was expected, what was seen and the likely cause.
        """
        if trainer.strategy.reduce_boolean_decision(broken is None, all=True):
            return
        what = broken or "this rank's share holds; see the message of another rank"
        raise UserError(f"self-check '{name}' at step {trainer.global_step}: {what}")
