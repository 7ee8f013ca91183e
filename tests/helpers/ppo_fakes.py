"""Fakes for the modules' tests: a few prompts, and a data module over them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left


class CountOf:
    """Scores the share of one word; its best response is that word eight times over."""

    def prepare(self, *_: Any) -> None:
        """Nothing to load."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return the share."""
        return torch.tensor([response.split().count("w3") / 8 for response in episodes.responses])


class FewPrompts:
    """The same few prompts in turn."""

    max_length = 5

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def get_prompts(self, iteration: int, count: int) -> list[dict[str, Any]]:
        """Return `count` prompts of 1 to 5 words."""
        return [{"prompt": " ".join(f"w{(i + j) % 28}" for j in range(1 + i % 5)), "place": i} for i in range(count)]

    def collate(self, rows: list[dict[str, Any]], index: Tensor) -> PromptBatch:
        """Tokenize and pad."""
        ids, mask = pad_left([self.tokenizer.encode(row["prompt"]) for row in rows], 0)
        return PromptBatch(ids, mask, rows, index)


class PromptData(L.LightningDataModule):
    """A data module over them."""

    def train_dataloader(self) -> Any:
        """Hand the prompts to the module."""
        return self.trainer.lightning_module.experience_loader(FewPrompts(self.trainer.lightning_module.tokenizer))
