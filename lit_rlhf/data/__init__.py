"""Text to token batches. Names are imported on first use: importing this loads neither Lightning nor datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_rlhf.importing import import_public_name

if TYPE_CHECKING:
    from lit_rlhf.data.base import DataRequirements
    from lit_rlhf.data.batches import PromptBatch, RankingBatch, TokenBatch
    from lit_rlhf.data.comparisons import ComparisonDataModule
    from lit_rlhf.data.demonstrations import DemonstrationDataModule
    from lit_rlhf.data.loader import ResumableLoader
    from lit_rlhf.data.preprocessing.pii import PIIDetector, PresidioPatterns
    from lit_rlhf.data.preprocessing.settings import DemonstrationPreprocessing, Preprocessing
    from lit_rlhf.data.pretraining import PretrainingDataModule, TextBlocks, load_text_blocks
    from lit_rlhf.data.prompt_template import PromptTemplate
    from lit_rlhf.data.prompts import PromptDataModule, PromptSource
    from lit_rlhf.data.records import Demonstration, Instruction, PromptRow, Ranking, TextRow
    from lit_rlhf.data.sources import read_rows

_MODULES = {
    "base": ("DataRequirements",),
    "batches": ("PromptBatch", "RankingBatch", "TokenBatch"),
    "comparisons": ("ComparisonDataModule",),
    "demonstrations": ("DemonstrationDataModule",),
    "loader": ("ResumableLoader",),
    "preprocessing.pii": ("PIIDetector", "PresidioPatterns"),
    "preprocessing.settings": ("DemonstrationPreprocessing", "Preprocessing"),
    "pretraining": ("PretrainingDataModule", "TextBlocks", "load_text_blocks"),
    "prompt_template": ("PromptTemplate",),
    "prompts": ("PromptDataModule", "PromptSource"),
    "records": ("Demonstration", "Instruction", "PromptRow", "Ranking", "TextRow"),
    "sources": ("read_rows",),
}

__all__ = [
    "ComparisonDataModule",
    "DataRequirements",
    "Demonstration",
    "DemonstrationDataModule",
    "DemonstrationPreprocessing",
    "Instruction",
    "PIIDetector",
    "Preprocessing",
    "PresidioPatterns",
    "PretrainingDataModule",
    "PromptBatch",
    "PromptDataModule",
    "PromptRow",
    "PromptSource",
    "PromptTemplate",
    "Ranking",
    "RankingBatch",
    "ResumableLoader",
    "TextBlocks",
    "TextRow",
    "TokenBatch",
    "load_text_blocks",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    return import_public_name(__name__, _MODULES, name)
