"""A trained reward model as a reward source."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.layout import Layout, by_length, lay_out
from lit_rlhf.models.options import ModelOptions
from lit_rlhf.models.scalar import ScalarModel, load_scalar_model
from lit_rlhf.rollout.experience import Episodes


class RewardModelReward:
    """A trained reward model, read at the last token of the response.

    Args:
        model: folder of a reward model that shares the policy's tokenizer.
        uncentred: what to do with a model without centring constants (App. C.2: demonstrations score 0 on average).
        options: how to load it.
        batch_size: episodes a forward pass.
    """

    by_ids = True

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

    @property
    def movable(self) -> bool:
        """See `RewardSource`: weights in 4 bits stay where they were quantised."""
        return self.options.quantization is None

    def move(self, device: torch.device) -> None:
        """See `RewardSource`."""
        self.model.to(device)

    @torch.no_grad()
    def score(self, episodes: Episodes) -> Tensor:
        """See `RewardSource.score`."""
        return score_by_length(self.score_laid_out, self.model.model, episodes, self.batch_size)

    def score_laid_out(self, layout: Layout) -> Tensor:
        """Return the score at the last token of each episode, (b,) float32."""
        return self.model(layout.input_ids, layout.attention_mask, layout.position_ids, layout.last)

    def critic(self) -> str:
        """See `RewardSource`: the reward model itself."""
        return self.path

    def models(self) -> list[str]:
        """See `RewardSource`: its folder."""
        return [self.path]


def score_by_length(score: Callable[[Layout], Tensor], model: PreTrainedModel, episodes: Episodes, rows: int) -> Tensor:
    """Return `score(layout)` of all episodes, (B,) float32, in chunks of so many rows, laid out for the model."""
    ids, mask = episodes.input_ids, episodes.attention_mask
    scores = torch.empty(len(ids), device=ids.device)
    for chunk, columns, width in by_length(ids, mask, ids.shape[1] - episodes.prompt_width, rows):
        scores[chunk] = score(lay_out(ids[chunk][:, columns], mask[chunk][:, columns], width, model)).float()
    return scores
