"""The interface of rewards: what scores a response."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.scalar_model import ScalarSource
from lit_rlhf.rollout.experience import Episodes

# names of PPO's own metrics below `reward/`
RESERVED_NAMES = {
    *("score", "score_std", "score_min", "score_max", "kl", "kl_k2", "kl_k3", "kl_coefficient", "kl_penalized_score"),
}


def check_part_names(names: list[str]) -> None:
    """Refuse a name of a part whose metric `reward/NAME` would be PPO's own."""
    reserved = sorted(RESERVED_NAMES.intersection(names))
    if reserved:
        raise UserError(f"reward: a part cannot be named {reserved[0]!r}: reward/{reserved[0]} is PPO's own metric")


class Reward(ABC):
    """Scores episodes. A subclass needs `score` alone; everything else has a default that does nothing.

    Attributes:
        uses_token_ids_only: whether `score` reads token ids and mask alone. `PPOInvariantCheck` then verifies that
            padding does not change its scores.
        group: the ranks that have episodes of their own, set by PPO before the first `score`; None: all.
    """

    uses_token_ids_only: bool = False
    group: dist.ProcessGroup | None = None

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Load what is needed; called once, before the first `score`.

        Args:
            tokenizer: the policy's.
            device: of the episodes' tensors.
        """

    @abstractmethod
    def score(self, episodes: Episodes) -> Tensor:
        """Return one score per episode, (B,) float32; higher is better."""

    def metrics(self) -> dict[str, Tensor]:
        """Return metrics of the episodes scored last: `reward/NAME` to (B,), the same names on every rank.

        PPO logs their means over all episodes of all ranks.
        """
        return {}

    def attach(self, policy: PreTrainedModel, path: str) -> None:
        """Attach to the policy's backbone; called once, after `prepare`.

        Args:
            policy: the causal language model.
            path: the folder or hub name that it was loaded from.
        """

    def parts(self) -> list["Reward"]:
        """Return the rewards that this one wraps or combines."""
        return []

    def critic_init_path(self) -> ScalarSource | None:
        """Return what a critic is initialized from by default (App. C.4).

        A folder, an adapter's checkpoint, or an object, which is copied.
        """
        return None

    def model_paths(self) -> Sequence[str | nn.Module]:
        """Return the folders, checkpoints or objects of its own models, which a resumed run must find unchanged."""
        return []

    def flops_per_token(self) -> int:
        """Return the operations per token of an episode that its own model takes; called after `prepare`."""
        return 0

    @property
    def offloadable(self) -> bool:
        """Whether `to` moves a model of its own."""
        return False

    def to(self, device: torch.device) -> None:
        """Move a model of its own to a device."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart, as plain values and tensors; it goes into the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def iter_parts(self) -> Iterator["Reward"]:
        """Yield this reward and, recursively, its parts."""
        yield self
        for part in self.parts():
            yield from part.iter_parts()


def compute_finite_scores(reward: Reward, episodes: Episodes, step: int) -> Tensor:
    """Return the scores of episodes, (B,) float32.

    Args:
        reward: scores them.
        episodes: B episodes.
        step: the optimizer step, for the error.

    Raises:
        UserError: a score is not a finite number; names the step and the first such prompt.
    """
    scores = reward.score(episodes).float()
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"reward: {len(bad)} of {len(scores)} scores at step {step} are not finite, first for the prompt "
            f"{episodes.prompts[int(bad[0])]!r:.200}. The last checkpoint is unharmed"
        )
    return scores
