"""Limits on logged metrics of PPO: warn, stop, or roll back to the last good weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.ema import load_averages
from lit_rlhf.errors import UserError


@dataclass
class MetricLimit:
    """Allowed range of a metric, checked once per iteration.

    Args:
        above: larger values violate the limit.
        below: smaller values violate the limit.
        patience: number of consecutive violations before the action is taken.
        action: "warn"; "stop" with an error, leaving the checkpoints as they are; or "rollback" to the last good
            weights, and continue from there with other prompts and other sampling noise.
    """

    above: float | None = None
    below: float | None = None
    patience: int = 1
    action: Literal["warn", "stop", "rollback"] = "warn"

    def __post_init__(self) -> None:
        """Refuse a limit without a bound."""
        if self.above is None and self.below is None:
            raise UserError("MetricGuard: a limit needs above or below")
        if self.patience < 1:
            raise UserError(f"MetricGuard: patience must be at least 1, got {self.patience}")

    def is_violated_by(self, value: float) -> bool:
        """Whether the value is out of range; NaN always is."""
        inside = (self.above is None or value <= self.above) and (self.below is None or value >= self.below)
        return not inside

    def __str__(self) -> str:
        """Return the range for a message."""
        bounds = [f"at least {self.below:g}"] if self.below is not None else []
        return " and ".join([*bounds, f"at most {self.above:g}"] if self.above is not None else bounds)


def default_limits() -> dict[str, MetricLimit]:
    """Return limits that few healthy runs violate; all of them warn."""
    return {
        "reward/kl": MetricLimit(above=50.0),
        "policy/entropy_estimate": MetricLimit(below=0.05, patience=3),
        "response/eos_fraction": MetricLimit(below=0.3, patience=3),
        "response/repeated_trigram_fraction": MetricLimit(above=0.5, patience=3),
        "value/explained_variance": MetricLimit(below=-1.0, patience=10),
    }


class MetricGuard(Callback):
    """Check the metrics of every PPO iteration against limits.

    With a limit whose action is "rollback", checkpoints are kept in `metric_guard/` in the folder of the run. Weights
    are good, and their checkpoint is renamed to `good.ckpt`, once the rollout that they sampled, that of the next
    iteration, violates no limit. A run that is not resumed first deletes those of an earlier run.

    Args:
        limits: limits by metric, any name in docs/metrics.md; None: `default_limits`.
        keep_every_n_epochs: iterations between two checkpoints.
        max_rollbacks: number of rollbacks after which the run stops.
    """

    def __init__(
        self, limits: dict[str, MetricLimit] | None = None, keep_every_n_epochs: int = 5, max_rollbacks: int = 3
    ) -> None:
        self.requires_all_metrics = limits is not None
        self.limits = default_limits() if limits is None else limits
        self.keep_every_n_epochs, self.max_rollbacks = keep_every_n_epochs, max_rollbacks
        self.num_violations: dict[str, int] = {}  # consecutive ones, by metric
        self.num_rollbacks = 0
        self.candidate_epoch = 0  # of the candidate checkpoint

    @property
    def rolls_back(self) -> bool:
        """Whether any limit has the action "rollback"."""
        return any(limit.action == "rollback" for limit in self.limits.values())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse the action "rollback" with a strategy that does not write one checkpoint file."""
        if self.rolls_back and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"MetricGuard: action rollback takes weights from one file, {type(trainer.strategy).__name__} keeps "
                "them in parts; use action: stop, and resume with --ckpt_path"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, unless the run is resumed: delete the checkpoints of another run in the folder."""
        module: Any = pl_module
        if module.resumed is not None:
            return
        self.num_violations, self.num_rollbacks, self.candidate_epoch = {}, 0, 0
        if trainer.is_global_zero and self.rolls_back:
            for name in ("candidate.ckpt", "good.ckpt"):
                (self.get_folder(trainer) / name).unlink(missing_ok=True)
        trainer.strategy.barrier()

    def get_folder(self, trainer: Trainer) -> Path:
        """Return the folder of the checkpoints."""
        return Path(trainer.default_root_dir) / "metric_guard"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the metrics of the iteration, and act."""
        violated = [name for name in self.limits if self.is_violated(name, trainer)]
        for action in ("stop", "rollback", "warn"):
            for name in violated:
                if self.limits[name].action == action:
                    self.take_action(name, trainer, pl_module)
                    if action == "rollback":
                        return  # once per iteration
        if self.rolls_back:
            self.update_checkpoints(trainer, pl_module, is_good=not violated)

    def is_violated(self, name: str, trainer: Trainer) -> bool:
        """Whether a metric has violated its limit `patience` times in a row.

        Raises:
            UserError: a limit that the user set is on a metric that is not logged.
        """
        if name not in trainer.callback_metrics:
            if self.requires_all_metrics:
                known = ", ".join(sorted(metric for metric in trainer.callback_metrics if "/" in metric))
                raise UserError(f"MetricGuard: no metric {name!r} is logged; there are {known}")
            return False
        limit = self.limits[name]
        is_violated = limit.is_violated_by(float(trainer.callback_metrics[name]))
        self.num_violations[name] = self.num_violations.get(name, 0) + 1 if is_violated else 0
        return self.num_violations[name] >= limit.patience

    def take_action(self, name: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn, stop, or roll back."""
        limit, value = self.limits[name], float(trainer.callback_metrics[name])
        message = f"MetricGuard: {name} is {value:.4g} in iteration {trainer.current_epoch}, the limit is {limit}" + (
            f" ({limit.patience} iterations in a row)" if limit.patience > 1 else ""
        )
        if limit.action == "warn":
            rank_zero_warn(message)
        elif limit.action == "stop":
            raise UserError(f"{message}; training stopped, and the last checkpoint is as it was")
        else:
            self.rollback(message, trainer, pl_module)

    def update_checkpoints(self, trainer: Trainer, pl_module: LightningModule, is_good: bool) -> None:
        """Promote the candidate checkpoint if it sampled this iteration, or delete it, and write the next candidate.

        With overlapping rollouts the weights of the last iteration but one sampled this one.
        """
        module: Any = pl_module
        candidate = self.get_folder(trainer) / "candidate.ckpt"
        has_sampled = trainer.current_epoch - self.candidate_epoch > module.ppo.overlap_rollouts
        if trainer.is_global_zero and candidate.exists():
            if not is_good:
                candidate.unlink()
            elif has_sampled:
                os.replace(candidate, candidate.with_name("good.ckpt"))
        trainer.strategy.barrier()
        is_pending = trainer.strategy.broadcast(candidate.exists())
        if is_good and not is_pending and trainer.current_epoch % self.keep_every_n_epochs == 0:
            self.candidate_epoch = trainer.current_epoch
            trainer.save_checkpoint(candidate)

    def rollback(self, message: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load weights, their average, optimizer state, KL controller and reward state.

        Step, learning rate, prompts and sampling noise go on.

        Args:
            message: the violated limit, for warnings and errors.
            trainer: the trainer.
            pl_module: the PPO module.

        Raises:
            UserError: there is no good checkpoint yet, or `max_rollbacks` is reached.
        """
        module: Any = pl_module
        path = self.get_folder(trainer) / "good.ckpt"
        if not trainer.strategy.broadcast(path.exists()):
            raise UserError(f"{message}; there is no good checkpoint to roll back to yet: lower the learning rate")
        if self.num_rollbacks == self.max_rollbacks:
            raise UserError(
                f"{message}; the run has rolled back {self.num_rollbacks} times and violates a limit again: "
                "change its settings"
            )
        self.num_rollbacks += 1
        self.num_violations.clear()
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
        load_averages(trainer, checkpoint)
        module.load_optimizer_state(checkpoint)
        module.kl.load_state_dict(checkpoint["kl_controller"])
        module.reward.load_state_dict(checkpoint["reward"])
        module.drop_next_rollout()  # of the weights that are given up, as the candidate may be
        if trainer.is_global_zero:
            path.with_name("candidate.ckpt").unlink(missing_ok=True)
        trainer.strategy.barrier()
        rank_zero_warn(f"{message}; rolled back to the weights of step {checkpoint['global_step']} ({path})")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "num_violations": dict(self.num_violations),
            "num_rollbacks": self.num_rollbacks,
            "candidate_epoch": self.candidate_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.num_violations, self.num_rollbacks = dict(state_dict["num_violations"]), state_dict["num_rollbacks"]
        self.candidate_epoch = state_dict["candidate_epoch"]
