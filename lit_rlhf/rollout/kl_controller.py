"""Controllers of β, the coefficient of the per-token KL penalty. KL is in nats per response."""

from abc import ABC, abstractmethod
from typing import Any

from lit_rlhf.errors import UserError


class KLController(ABC):
    """Holds β, and updates it from the mean KL of every iteration.

    Attributes:
        coefficient: β.
    """

    coefficient: float

    @abstractmethod
    def update(self, kl: float, num_episodes: int) -> None:
        """Update β.

        Args:
            kl: mean KL to the reference, in nats per response.
            num_episodes: responses of all ranks that it is a mean over.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class FixedKLController(KLController):
    """Constant β (InstructGPT App. C.4: 0.02)."""

    def __init__(self, coefficient: float = 0.02) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, num_episodes: int) -> None:
        """Do nothing: β is fixed."""


class AdaptiveKLController(KLController):
    """Proportional controller in log space that holds a target KL (Ziegler et al., 2019, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2) and β ← β · (1 + e · num_episodes / horizon).

    Args:
        coefficient: initial β.
        target: KL to hold, in nats per response.
        horizon: episodes over which an error of 1 would double β.
    """

    def __init__(self, coefficient: float = 0.2, target: float = 6.0, horizon: int = 10_000) -> None:
        if target <= 0 or horizon <= 0 or coefficient <= 0:
            raise UserError(
                f"kl: coefficient, target and horizon must be positive, got {coefficient}, {target}, {horizon}"
            )
        self.coefficient, self.target, self.horizon = coefficient, target, horizon
        self.initial_coefficient = coefficient

    def update(self, kl: float, num_episodes: int) -> None:
        """See `KLController.update`."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * num_episodes / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """Return β, and what it began with."""
        return {"coefficient": self.coefficient, "initial_coefficient": self.initial_coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore β, unless it is to begin with another value now."""
        if state.get("initial_coefficient") == self.initial_coefficient:
            self.coefficient = state["coefficient"]
