"""Reward sources. A source gets episodes (ids, texts and dataset rows) and returns one score each."""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.options import ModelOptions
from lit_rlhf.models.scalar import ScalarModel, load_scalar_model
from lit_rlhf.rollout.experience import Episodes

TextReward = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


class RewardSource(Protocol):
    """Scores episodes. `prepare` is called once, before the first `score`."""

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


class RewardModelReward:
    """A trained reward model, read at the last token of the response.

    Args:
        model: folder of a reward model that shares the policy's tokenizer.
        uncentred: what to do with a model without centring constants (App. C.2: demonstrations score 0 on average).
        options: how to load it.
        batch_size: episodes a forward pass.
    """

    def __init__(
        self,
        model: str,
        uncentred: Literal["refuse", "accept"] = "refuse",
        options: ModelOptions | None = None,
        batch_size: int = 64,
    ) -> None:
        self.path, self.uncentred, self.batch_size = model, uncentred, batch_size
        self.options = options or ModelOptions()
        self.model: ScalarModel

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Load the model, frozen."""
        from lit_rlhf.models.loading import load_config, load_tokenizer

        own = load_tokenizer(self.path, self.options)
        if own.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"reward: {self.path!r} has another tokenizer than the policy; its ids would mean other words. Use a "
                "reward model trained from the same family"
            )
        if self.uncentred == "refuse" and not hasattr(load_config(self.path, self.options), "score_shift"):
            raise UserError(
                f"reward: {self.path!r} has no centring constants (score_shift in its config.json): train it with the "
                "callback CentreScores, or set model.reward.init_args.uncentred to accept"
            )
        self.model = load_scalar_model(self.path, tokenizer, self.options).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, episodes: Episodes) -> Tensor:
        """See `RewardSource.score`."""
        lengths = episodes.attention_mask.sum(1)
        scores = torch.empty(len(lengths), device=lengths.device)
        prompt_end = episodes.attention_mask.shape[1]
        for rows in torch.split(torch.argsort(lengths), self.batch_size):
            mask = episodes.attention_mask[rows]
            used = mask.any(0).nonzero()
            columns = slice(int(used[0]), min(int(used[-1]) + 1, prompt_end))
            scores[rows] = self.model.score(episodes.input_ids[rows][:, columns], mask[:, columns])
        return scores


class PythonReward:
    """A function of the user's own: `function(prompts, responses, rows) -> scores`, all lists of one length.

    Args:
        function: dotted path such as `my_rewards.brevity`; `my_rewards.py` may lie in the working directory.
    """

    def __init__(self, function: str) -> None:
        self.name = function
        self.function = import_function(function)

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, episodes: Episodes) -> Tensor:
        """See `RewardSource.score`."""
        scores = self.function(episodes.prompts, episodes.responses, episodes.rows)
        if len(scores) != len(episodes.responses):
            raise UserError(
                f"reward {self.name}: {len(scores)} scores for {len(episodes.responses)} responses; return one each"
            )
        try:
            return torch.tensor([float(score) for score in scores], device=episodes.input_ids.device)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {self.name}: a score is no number ({error})") from error


class WeightedSum:
    """A weighted sum of reward sources.

    Args:
        sources: the parts.
        weights: one each.
    """

    def __init__(self, sources: list[RewardSource], weights: list[float]) -> None:
        if len(sources) != len(weights) or not sources:
            raise UserError(f"reward: {len(weights)} weights for {len(sources)} sources; give one weight each")
        self.sources, self.weights = sources, weights

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Prepare every part."""
        for source in self.sources:
            source.prepare(tokenizer, device)

    def score(self, episodes: Episodes) -> Tensor:
        """See `RewardSource.score`."""
        return torch.stack([w * s.score(episodes) for w, s in zip(self.weights, self.sources)]).sum(0)


def import_function(path: str) -> TextReward:
    """Return the function behind a dotted path, or say in one line what is missing."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"{path!r} is not a dotted path such as my_file.my_function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path!r}: there is no module {error.name!r} here ({Path.cwd()}) or among the installed ones"
        ) from error
    if not hasattr(module, name):
        near = get_close_matches(name, dir(module), 1)
        raise UserError(f"{path!r}: {module_name} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    function: TextReward = getattr(module, name)
    if not callable(function):
        raise UserError(f"{path!r} is a {type(function).__name__}, not a function")
    return function
