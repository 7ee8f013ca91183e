"""Text to token batches. Names are imported on first use: importing this loads neither Lightning nor datasets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_rlhf.data.batches import PromptBatch, RankingBatch, TokenBatch
    from lit_rlhf.data.comparisons import ComparisonDataModule
    from lit_rlhf.data.demonstrations import DemonstrationDataModule
    from lit_rlhf.data.loader import ResumableLoader
    from lit_rlhf.data.pretraining import PretrainingDataModule, TextBlocks, text_blocks
    from lit_rlhf.data.prompts import PromptDataModule, PromptSource
    from lit_rlhf.data.records import Demonstration, Instruction, PromptRow, Ranking, TextRow
    from lit_rlhf.data.sources import read_rows

_HOMES = {
    "batches": ("PromptBatch", "RankingBatch", "TokenBatch"),
    "comparisons": ("ComparisonDataModule",),
    "demonstrations": ("DemonstrationDataModule",),
    "loader": ("ResumableLoader",),
    "pretraining": ("PretrainingDataModule", "TextBlocks", "text_blocks"),
    "prompts": ("PromptDataModule", "PromptSource"),
    "records": ("Demonstration", "Instruction", "PromptRow", "Ranking", "TextRow"),
    "sources": ("read_rows",),
}

__all__ = [
    "ComparisonDataModule",
    "Demonstration",
    "DemonstrationDataModule",
    "Instruction",
    "PretrainingDataModule",
    "PromptBatch",
    "PromptDataModule",
    "PromptRow",
    "PromptSource",
    "Ranking",
    "RankingBatch",
    "ResumableLoader",
    "TextBlocks",
    "TextRow",
    "TokenBatch",
    "read_rows",
    "text_blocks",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"lit_rlhf.data.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
