"""Learning-rate schedules of the paper. They take their length from the Trainer, so a recipe need not count steps."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_rlhf.errors import UserError


class SizedSchedule(LambdaLR):
    """A factor on every group's learning rate as a function of the step and of the run's length.

    The module sets `total_steps` and `epoch_steps` before the first step; until then the run is one of one step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.total_steps = self.epoch_steps = 1
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return the factor at an optimizer step."""
        raise NotImplementedError

    def resize(self, total_steps: int, epoch_steps: int = 1) -> None:
        """Set the lengths of the run and of an epoch in optimizer steps, and the learning rate accordingly."""
        self.total_steps, self.epoch_steps = max(int(total_steps), 1), max(int(epoch_steps), 1)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * self.factor(self.last_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step back; the lengths stay the Trainer's, so that a run can be resumed to go on for longer."""
        lengths = self.total_steps, self.epoch_steps
        super().load_state_dict(state_dict)
        self.resize(*lengths)


class CosineWithMinLR(SizedSchedule):
    """Cosine from the full rate to a fraction of it at the last step (App. C.1, C.2: to 10 %, no warm-up).

    Args:
        optimizer: given by the module.
        min_lr_ratio: fraction of the rate at the end.
        warmup_steps: linear warm-up before it; the paper has none.
    """

    def __init__(self, optimizer: Optimizer, min_lr_ratio: float = 0.1, warmup_steps: int = 0) -> None:
        if not 0 <= min_lr_ratio <= 1:
            raise UserError(f"scheduler: final must lie in [0, 1], got {min_lr_ratio}")
        self.min_lr_ratio, self.warmup_steps = min_lr_ratio, warmup_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """See `SizedSchedule.factor`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


class ConstantWithWarmup(SizedSchedule):
    """Linear from a fraction of the rate to all of it, then constant (App. C.4: from a tenth, over 10 iterations).

    Args:
        optimizer: given by the module.
        warmup_iterations: how long the rate rises, in iterations of PPO: epochs of the Trainer. Within one it rises
            with every optimizer step.
        start_factor: fraction at the first step.
    """

    def __init__(self, optimizer: Optimizer, warmup_iterations: float = 10, start_factor: float = 0.1) -> None:
        if warmup_iterations < 0 or not 0 <= start_factor <= 1:
            raise UserError(
                "scheduler: warmup_iterations must not be negative and start must lie in [0, 1], "
                f"got {warmup_iterations} and {start_factor}"
            )
        self.warmup_iterations, self.start_factor = warmup_iterations, start_factor
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """See `SizedSchedule.factor`."""
        steps = self.warmup_iterations * self.epoch_steps
        return min(self.start_factor + (1 - self.start_factor) * step / max(steps, 1), 1.0)
