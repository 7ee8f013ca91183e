"""Fakes for PPO tests: a reward, a few prompts, and a data module over them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.data.prompts import PromptSource
from lit_rlhf.functional import pad_left
from lit_rlhf.rewards import Reward


class WordShare(Reward):
    """The fraction of one word; the best response repeats it eight times."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return the fraction of the word w3."""
        return torch.tensor([response.split().count("w3") / 8 for response in episodes.responses])


class FewPrompts(PromptSource):
    """The same few prompts in every iteration."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def max_length(self) -> int:
        """Words of the longest prompt."""
        return 5

    def get_prompts(self, iteration: int, count: int) -> list[TokenizedPrompt]:
        """Return `count` prompts of 1 to 5 words."""
        texts = [" ".join(f"w{(i + j) % 28}" for j in range(1 + i % 5)) for i in range(count)]
        return [TokenizedPrompt(self.tokenizer.encode(t), {"prompt": t, "place": i}) for i, t in enumerate(texts)]

    def collate(self, prompts: list[TokenizedPrompt], index: Tensor) -> PromptBatch:
        """Pad."""
        ids, mask = pad_left([prompt.input_ids for prompt in prompts], 0)
        return PromptBatch(ids, mask, [prompt.row for prompt in prompts], index)


class PromptData(L.LightningDataModule):
    """A data module over them."""

    def train_dataloader(self) -> Any:
        """Pass the prompts to the module."""
        return self.trainer.lightning_module.experience_loader(FewPrompts(self.trainer.lightning_module.tokenizer))
