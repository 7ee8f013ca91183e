"""Demonstrations: prompt and completion, for supervised fine-tuning (the paper's step 1)."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.data.base import PreprocessedDataModule
from lit_rlhf.data.batches import TokenBatch
from lit_rlhf.data.collation import TokenizedExample, collate_packed, collate_tokens
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.multi_turn_targets import earlier_replies
from lit_rlhf.data.preprocessing.settings import DemonstrationPreprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError


class DemonstrationDataModule(PreprocessedDataModule[TokenizedExample]):
    """Yields `TokenBatch`; the targets of the loss are the completion's tokens and the EOS behind it.

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The same, for validation.
        validation_fraction: Share of the distinct prompts held out for validation, where there is no
            `validation_path`.
        format: "auto", a format's name, or the dotted path of your own function; see `lit_rlhf.data.formats.registry`.
        template: How prompts are put into words; see `lit_rlhf.data.prompt_template.PromptTemplate`.
        max_prompt_length: In tokens; longer ones go by `overlong_prompts`.
        max_completion_length: In tokens, the EOS included; longer ones are cut, and then have no EOS.
        overlong_prompts: "drop" the row, or "truncate" the prompt to its end. Both are counted and printed.
        preprocessing: The paper's data steps; see `lit_rlhf.data.preprocessing.settings.DemonstrationPreprocessing`.
        micro_batch_size: Demonstrations per rank and backward.
        batching: How the demonstrations of a minibatch are laid out, which changes no loss: "by_length", micro-batches
            of like length, padded; "packed", all of a micro-batch behind each other in one row, with nothing seen
            across and no padding; "as_drawn", padded.
        seed: Keys the order of rows and the held-out part.
    """

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        validation_fraction: float = 0.0,
        format: str = "auto",
        template: str | None = None,
        max_prompt_length: int = 1024,
        max_completion_length: int = 1024,
        overlong_prompts: Literal["drop", "truncate"] = "drop",
        preprocessing: DemonstrationPreprocessing | None = None,
        micro_batch_size: int = 8,
        batching: Literal["by_length", "packed", "as_drawn"] = "by_length",
        seed: int = 0,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch_size, seed, batching)
        self.format = format
        self.template = template
        self.lengths = TruncationPolicy(max_prompt_length, max_completion_length, overlong_prompts).checked()
        self.preprocessing = (preprocessing or DemonstrationPreprocessing()).checked(validation_fraction)

    def setup(self, stage: str) -> None:
        """Read and tokenise, once; let the module refuse packed rows."""
        fresh = self.training_rows is None
        super().setup(stage)
        if fresh and self.batching == "packed":
            self._check_packing()

    def _check_packing(self) -> None:
        assert self.trainer is not None and self.training_rows is not None
        module, setting = self.trainer.lightning_module, "data.batching"
        check = getattr(module, "check_packing", None)
        if check is None:
            raise UserError(
                f"{setting}: 'packed' is for modules that keep the sequences of a row apart, "
                f"{type(module).__name__} has no check_packing; use 'by_length'"
            )
        check(max(self.length(row) for rows in (self.training_rows, self.validation_rows) for row in rows), setting)

    def train_dataloader(self) -> ResumableLoader[TokenizedExample, Any]:
        """See `TokenizedDataModule`; says how much of the batches is padding, where there is some."""
        loader = super().train_dataloader()
        if self.batching == "by_length":
            rank_zero_info(f"{loader.token_efficiency():.1%} of a batch's positions hold tokens")
        return loader

    def records(self, path: str, report: DatasetReport) -> list[Demonstration]:
        """Demonstrations as they were written."""
        return read_records(read_rows(path), "demonstration", Demonstration, self.format, report)

    def tokenize(self, records: list[Demonstration], report: DatasetReport) -> list[TokenizedExample]:
        """Demonstrations within the length limits."""
        return tokenize_demonstrations(records, PromptTemplate(self.tokenizer, self.template), self.lengths, report)

    def collate(self, rows: list[Any], normalizer: float) -> TokenBatch:
        """A batch, padded or packed."""
        if self.batching == "packed":
            return collate_packed(rows, normalizer)
        return collate_tokens(rows, normalizer, self.tokenizer.pad_token_id)

    def num_targets(self, row: TokenizedExample) -> int:
        """Completion tokens."""
        return sum(row.loss_mask)

    def length(self, row: TokenizedExample) -> int:
        """Tokens."""
        return len(row.input_ids)

    def without_targets(self, row: TokenizedExample) -> TokenizedExample:
        """The same tokens, none a target."""
        return TokenizedExample(row.input_ids, [False] * len(row.input_ids))


def tokenize_demonstrations(
    records: list[Demonstration], template: PromptTemplate, lengths: TruncationPolicy, report: DatasetReport
) -> list[TokenizedExample]:
    """Prompt ids, completion ids and EOS, with the completion and the EOS as targets.

    Where every reply of a conversation is to be learnt, those within the prompt are targets too.
    """
    asked = [record.prompt for record in records]
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in records])
    learnt = earlier_replies(records, prompts, template, report)
    completions = template.encode_replies([each.completion for each in records], asked)
    rows = []
    for record, prompt_ids, targets, completion_ids in zip(records, prompts, learnt, completions):
        prompt = lengths.fit_prompt(prompt_ids, template.leading, record.origin, report)
        if prompt is None:
            continue
        completion = lengths.fit_completion(completion_ids, template.tokenizer.eos_token_id, record.origin, report)
        if len(prompt) < len(prompt_ids):  # its end, behind what the tokenizer begins a text with
            unlearnt = max(1, len(template.leading))
            targets = [False] * unlearnt + targets[len(targets) - len(prompt) + unlearnt :]
        rows.append(TokenizedExample(prompt + completion, targets + [True] * len(completion)))
    return rows
