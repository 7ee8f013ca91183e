"""Controllers of β, the coefficient of the per-token KL penalty. KL is in nats a response."""

from typing import Any, Protocol

from lit_rlhf.errors import UserError


class KLController(Protocol):
    """Holds β; told the mean KL of every iteration; its state goes into the checkpoint."""

    coefficient: float

    def update(self, kl: float, episodes: int) -> None:
        """Take the mean KL to the reference, in nats a response, over `episodes` responses of all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        ...


class FixedKLController:
    """Constant β (InstructGPT App. C.4: 0.02)."""

    def __init__(self, coefficient: float = 0.02) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, episodes: int) -> None:
        """Do nothing: β is fixed."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: β is in the recipe."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


class AdaptiveKLController:
    """Ziegler 2019, section 2.2: a proportional controller in log space that holds a target KL.

    e = clip(KL / target - 1, ±0.2) and β ← β · (1 + e · episodes / horizon).

    Args:
        coefficient: β at the start.
        target: KL to hold, in nats a response.
        horizon: episodes over which a full error of 1 would double β.
    """

    def __init__(self, coefficient: float = 0.2, target: float = 6.0, horizon: int = 10_000) -> None:
        if target <= 0 or horizon <= 0 or coefficient <= 0:
            raise UserError(
                f"kl: coefficient, target and horizon must be positive, got {coefficient}, {target}, {horizon}"
            )
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Move β against the error."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """Return β."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take β back."""
        self.coefficient = state["coefficient"]
