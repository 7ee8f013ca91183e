"""What scores a response: one protocol, and what a source may add to it."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.experience import Episodes


class Reward(Protocol):
    """Scores episodes. `prepare` is called once, before the first `score`.

    A source may also have any of these; the functions below read them:

    - `details() -> dict[str, Tensor]`: metrics of the episodes scored last, `reward/NAME` to (B,), the same names on
      every rank. PPO logs their means over all episodes of all ranks.
    - `state_dict() -> dict[str, Any]` and `load_state_dict(state: dict[str, Any]) -> None`: what must survive a
      restart, as plain values and tensors. It goes into the PPO checkpoint.
    - `critic() -> str | None`: what a critic starts from by default: a folder, or the checkpoint of an adapter.
    - `ride(policy: PreTrainedModel, path: str) -> None`: called once after `prepare`, where what scores is an adapter
      on the policy's base; `path` is what the base was loaded from.
    - `move(device: torch.device) -> None`: put the model of its own that it holds there. A source without it, or one
      whose `movable` is False, stays where `prepare` put it.
    - `group: ProcessGroup | None`: set by PPO before the first `score`, the ranks that have episodes of their own.
    - `uses_token_ids_only: bool`: whether `score` reads token ids and mask alone. PPOInvariantCheck then tries it with other padding.
    - `models() -> list[str]`: folders and checkpoints of models that it reads, which a resumed run must find unchanged.
    """

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Load what is needed.

        Args:
            tokenizer: the policy's.
            device: where the episodes' tensors will be.
        """
        ...

    def score(self, episodes: Episodes) -> Tensor:
        """Return one score an episode, (B,) float32, higher is better."""
        ...


def source_details(source: Reward) -> dict[str, Tensor]:
    """Return the metrics of the episodes that `source` scored last, by name, (B,) each."""
    return source.details() if hasattr(source, "details") else {}


def source_state(source: Reward) -> dict[str, Any]:
    """Return what of `source` must survive a restart."""
    return source.state_dict() if hasattr(source, "state_dict") else {}


def load_source_state(source: Reward, state: dict[str, Any]) -> None:
    """Give it back; a source without a state takes none."""
    if state and hasattr(source, "load_state_dict"):
        source.load_state_dict(state)


def source_critic(source: Reward) -> str | None:
    """Return the reward model that a critic starts from (App. C.4), folder or checkpoint; None where there is none."""
    return source.critic() if hasattr(source, "critic") else None


def ride_on_policy(source: Reward, policy: PreTrainedModel, path: str) -> None:
    """Give `source` the policy, where it rides on its base."""
    if hasattr(source, "ride"):
        source.ride(policy, path)


def iter_rewards(source: Reward) -> Iterator[Reward]:
    """Yield a source and all that it asks: what a step wraps, the parts of a sum or of an ensemble."""
    yield source
    for part in [*getattr(source, "sources", ()), *([source.source] if hasattr(source, "source") else ())]:
        yield from iter_rewards(part)


def source_models(source: Reward) -> list[str]:
    """Return the folders of the models that `source` and its parts read."""
    return [path for part in iter_rewards(source) if hasattr(part, "models") for path in part.models()]


def movable_parts(source: Reward) -> list[Any]:
    """Return what of `source` and its parts holds a model that can be moved between devices."""
    return [part for part in iter_rewards(source) if hasattr(part, "move") and getattr(part, "movable", True)]


def require_finite_scores(source: Reward, episodes: Episodes, step: int) -> Tensor:
    """Return the source's scores, (B,) float32, or stop where one is not a finite number.

    Raises:
        UserError: names the optimizer step and the first such prompt.
    """
    scores = source.score(episodes).float()
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"reward: {len(bad)} of {len(scores)} scores at step {step} are not finite, first for the prompt "
            f"{episodes.prompts[int(bad[0])]!r:.200}. The last checkpoint is unharmed"
        )
    return scores
