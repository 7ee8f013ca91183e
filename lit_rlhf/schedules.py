"""Learning-rate schedules of the paper. They take their length from the Trainer, so a recipe need not count steps."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_rlhf.errors import UserError


class TrainerLengthSchedule(LambdaLR):
    """Base of schedules that multiply each learning rate by a factor of the step and the length of the run.

    The module calls `set_length` before the first step; until then the run has one step.
    """

    #: whether the factor depends on the length of the run
    needs_total_steps = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.total_steps: float = 1
        self.steps_per_epoch = 1
        super().__init__(optimizer, self.lr_factor)

    def lr_factor(self, step: int) -> float:
        """Return the factor at an optimizer step."""
        raise NotImplementedError

    def set_length(self, total_steps: float, steps_per_epoch: int = 1) -> None:
        """Set the lengths of the run and of an epoch in optimizer steps, and update the learning rates.

        Raises:
            UserError: the run has no end, and the schedule needs one.
        """
        if math.isinf(total_steps) and self.needs_total_steps:
            raise UserError(
                f"scheduler: {type(self).__name__} needs the length of the run, which no number of steps limits; set "
                "trainer.max_steps, or trainer.max_epochs with data of a known length"
            )
        self.total_steps, self.steps_per_epoch = max(total_steps, 1), max(int(steps_per_epoch), 1)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * self.lr_factor(self.last_epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step, but keep the Trainer's lengths, so that a run can be resumed with more steps."""
        lengths = self.total_steps, self.steps_per_epoch
        super().load_state_dict(state_dict)
        self.set_length(*lengths)


class CosineWithMinLR(TrainerLengthSchedule):
    """Cosine decay to a fraction of the learning rate at the last step (App. C.1, C.2: to 10 %, no warm-up).

    Args:
        optimizer: Set by the module.
        min_lr_ratio: Fraction of the learning rate at the end.
        warmup_steps: Steps of linear warm-up before the decay; none in the paper.
    """

    def __init__(self, optimizer: Optimizer, min_lr_ratio: float = 0.1, warmup_steps: int = 0) -> None:
        if not 0 <= min_lr_ratio <= 1:
            raise UserError(f"scheduler: min_lr_ratio must lie in [0, 1], got {min_lr_ratio}")
        self.min_lr_ratio, self.warmup_steps = min_lr_ratio, warmup_steps
        super().__init__(optimizer)

    def lr_factor(self, step: int) -> float:
        """See `TrainerLengthSchedule.lr_factor`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


class ConstantWithWarmup(TrainerLengthSchedule):
    """Linear warm-up from a fraction of the learning rate, then constant (App. C.4: from 10 %, over 10 iterations).

    Args:
        optimizer: Set by the module.
        warmup_iterations: Length of the warm-up in PPO iterations, which are the Trainer's epochs. The learning rate
            rises with every optimizer step.
        start_factor: Fraction of the learning rate at the first step.
    """

    needs_total_steps = False

    def __init__(self, optimizer: Optimizer, warmup_iterations: float = 10, start_factor: float = 0.1) -> None:
        if warmup_iterations < 0 or not 0 <= start_factor <= 1:
            raise UserError(
                "scheduler: warmup_iterations must not be negative and start_factor must lie in [0, 1], "
                f"got {warmup_iterations} and {start_factor}"
            )
        self.warmup_iterations, self.start_factor = warmup_iterations, start_factor
        super().__init__(optimizer)

    def lr_factor(self, step: int) -> float:
        """See `TrainerLengthSchedule.lr_factor`."""
        steps = self.warmup_iterations * self.steps_per_epoch
        return min(self.start_factor + (1 - self.start_factor) * step / max(steps, 1), 1.0)
