"""Limits on what PPO logs: warn, stop, or go back to the last good weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.base import load_source_state


@dataclass
class Limit:
    """Where a metric of an iteration should stay.

    Args:
        above: more than this is too much.
        below: less than this is too little.
        patience: how many in a row it takes.
        action: "warn"; "stop" with an error, the checkpoints as they are; or "go_back" to the last good weights, and
            on from there with other prompts and other noise.
    """

    above: float | None = None
    below: float | None = None
    patience: int = 1
    action: Literal["warn", "stop", "go_back"] = "warn"

    def __post_init__(self) -> None:
        """Refuse a limit that limits nothing."""
        if self.above is None and self.below is None:
            raise UserError("MetricGuard: a limit needs above or below")
        if self.patience < 1:
            raise UserError(f"MetricGuard: iterations must be at least 1, got {self.patience}")

    def broken_by(self, value: float) -> bool:
        """Whether the value is beyond it; what is not a number always is."""
        inside = (self.above is None or value <= self.above) and (self.below is None or value >= self.below)
        return not inside

    def __str__(self) -> str:
        """In words."""
        words = [f"at least {self.below:g}"] if self.below is not None else []
        return " and ".join([*words, f"at most {self.above:g}"] if self.above is not None else words)


def default_limits() -> dict[str, Limit]:
    """What few sound runs go beyond; all of them warn."""
    return {
        "reward/kl": Limit(above=50.0),
        "policy/entropy_estimate": Limit(below=0.05, patience=3),
        "response/eos_fraction": Limit(below=0.3, patience=3),
        "response/repeated_trigram_fraction": Limit(above=0.5, patience=3),
        "value/explained_variance": Limit(below=-1.0, patience=10),
    }


class MetricGuard(Callback):
    """Holds the metrics of every PPO iteration against limits.

    With a limit that goes back it keeps `drift_watch/good.ckpt` in the run's folder. A checkpoint is good once the
    rollout of the next iteration, which its weights made, has kept within every limit.

    Args:
        limits: by metric, any name of docs/metrics.md; None: the usual ones, as warnings.
        keep_every_n_epochs: iterations between two good checkpoints.
        max_rollbacks: how often a run may go back before it stops.
    """

    def __init__(
        self, limits: dict[str, Limit] | None = None, keep_every_n_epochs: int = 5, max_rollbacks: int = 3
    ) -> None:
        self.asked, self.limits = limits is not None, default_limits() if limits is None else limits
        self.keep_every_n_epochs, self.max_rollbacks = keep_every_n_epochs, max_rollbacks
        self.streaks: dict[str, int] = {}
        self.returns = 0

    @property
    def rolls_back(self) -> bool:
        """Whether any limit does."""
        return any(limit.action == "go_back" for limit in self.limits.values())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to go back where the weights are not in one file."""
        if self.rolls_back and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"MetricGuard: action go_back takes weights from one file, {type(trainer.strategy).__name__} keeps them "
                "in parts; use action: stop, and resume with --ckpt_path"
            )

    def folder(self, trainer: Trainer) -> Path:
        """Where it keeps its checkpoints."""
        return Path(trainer.default_root_dir) / "drift_watch"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the iteration that ends."""
        broken = [name for name in self.limits if self.beyond(name, trainer)]
        for action in ("stop", "go_back", "warn"):
            for name in broken:
                if self.limits[name].action == action:
                    self.act(name, trainer, pl_module)
                    if action == "go_back":
                        return  # once an iteration
        if self.rolls_back:
            self.keep(trainer, good=not broken)

    def beyond(self, name: str, trainer: Trainer) -> bool:
        """Whether a metric has been beyond its limit for as many iterations as that takes.

        Raises:
            UserError: a limit that the user set is on a metric that is not logged.
        """
        if name not in trainer.callback_metrics:
            if self.asked:
                known = ", ".join(sorted(each for each in trainer.callback_metrics if "/" in each))
                raise UserError(f"MetricGuard: no metric {name!r} is logged; there are {known}")
            return False
        limit = self.limits[name]
        streak = self.streaks.get(name, 0) + 1 if limit.broken_by(float(trainer.callback_metrics[name])) else 0
        self.streaks[name] = streak
        return streak >= limit.patience

    def act(self, name: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn, stop, or go back."""
        limit, value = self.limits[name], float(trainer.callback_metrics[name])
        what = f"drift: {name} is {value:.4g} in iteration {trainer.current_epoch}, the limit is {limit}" + (
            f" ({limit.patience} iterations in a row)" if limit.patience > 1 else ""
        )
        if limit.action == "warn":
            rank_zero_warn(what)
        elif limit.action == "stop":
            raise UserError(f"{what}; training stopped, and the last checkpoint is as it was")
        else:
            self.rollback(what, trainer, pl_module)

    def keep(self, trainer: Trainer, good: bool) -> None:
        """Promote the checkpoint whose rollout this iteration was, and write the next one to be judged."""
        folder = self.folder(trainer)
        if trainer.is_global_zero and (folder / "unjudged.ckpt").exists():
            if good:
                os.replace(folder / "unjudged.ckpt", folder / "good.ckpt")
            else:
                (folder / "unjudged.ckpt").unlink()
        trainer.strategy.barrier()
        if good and trainer.current_epoch % self.keep_every_n_epochs == 0:
            trainer.save_checkpoint(folder / "unjudged.ckpt")

    def rollback(self, what: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load weights, optimizer, KL controller and reward state; step, prompts and noise go on.

        Raises:
            UserError: nothing to go back to, or once too often.
        """
        module: Any = pl_module
        path = self.folder(trainer) / "good.ckpt"
        if not trainer.strategy.broadcast(path.exists()):
            raise UserError(f"{what}; there is no good checkpoint to go back to yet: lower the learning rate")
        if self.returns == self.max_rollbacks:
            raise UserError(f"{what}; the run has gone back {self.returns} times and drifts again: change its settings")
        self.returns += 1
        self.streaks.clear()
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        module.kl.load_state_dict(checkpoint["kl_controller"])
        load_source_state(module.reward, checkpoint["reward"])
        rank_zero_warn(f"{what}; went back to the weights of step {checkpoint['global_step']} ({path})")

    def state_dict(self) -> dict[str, Any]:
        """Return what is counted."""
        return {"streaks": dict(self.streaks), "returns": self.returns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.streaks, self.returns = dict(state_dict["streaks"]), state_dict["returns"]
