"""Demonstrations: prompt and completion, for supervised fine-tuning (the paper's step 1)."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.data.base import DataRequirements, PreprocessedDataModule, packing_unsupported
from lit_rlhf.data.batches import TokenBatch
from lit_rlhf.data.collation import TokenizedExample, collate_packed, collate_tokens
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.data.multi_turn_targets import mask_earlier_replies
from lit_rlhf.data.preprocessing.settings import DemonstrationPreprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import DataSource, read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.importing import Function


class DemonstrationDataModule(PreprocessedDataModule[TokenizedExample]):
    """Yields `TokenBatch`; the targets of the loss are the completion's tokens and the EOS after it.

    Args:
        path: A local file, a hub name, or rows in memory; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The validation data, likewise.
        validation_fraction: Fraction of the distinct prompts held out for validation, without a `validation_path`.
        format: "auto", a format's name, or your own function, or its dotted path; see `lit_rlhf.data.formats.registry`.
        template: The prompt template; see `lit_rlhf.data.prompt_template.PromptTemplate`.
        max_prompt_length: In tokens; for longer prompts, see `overlong_prompts`.
        max_completion_length: In tokens, including EOS; longer completions are truncated, and then have no EOS.
        overlong_prompts: "drop" the row, or "truncate" the prompt from the left. Both are counted and printed.
        preprocessing: The paper's data steps; see `lit_rlhf.data.preprocessing.settings.DemonstrationPreprocessing`.
        micro_batch_size: Demonstrations per rank and backward pass.
        batching: How the demonstrations of a minibatch are assigned to micro-batches; the loss does not depend on it.
            "group_by_length": demonstrations of similar length together, padded; "packing": those of a micro-batch
            concatenated to one row, without padding and without attention across them; "none": padded, in the
            shuffled order.
        seed: Seeds the order of rows and the held-out part.
    """

    data_role = "demonstrations"

    def __init__(
        self,
        path: DataSource,
        validation_path: DataSource | None = None,
        validation_fraction: float = 0.0,
        format: str | Function = "auto",
        template: str | None = None,
        max_prompt_length: int = 1024,
        max_completion_length: int = 1024,
        overlong_prompts: Literal["drop", "truncate"] = "drop",
        preprocessing: DemonstrationPreprocessing | None = None,
        micro_batch_size: int = 8,
        batching: Literal["group_by_length", "packing", "none"] = "group_by_length",
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            validation_path,
            validation_fraction,
            format,
            template,
            TruncationPolicy(max_prompt_length, max_completion_length, overlong_prompts),
            preprocessing or DemonstrationPreprocessing(),
            micro_batch_size,
            batching,
            seed,
        )
        save_settings(self, locals() | self.describe_sources())

    def setup(self, stage: str) -> None:
        """Read and tokenize, once; let the module refuse packed rows."""
        first_call = self.training_rows is None
        super().setup(stage)
        if first_call and self.batching == "packing":
            self._check_packing()

    def _check_packing(self) -> None:
        assert self.trainer is not None and self.training_rows is not None
        module, setting = self.trainer.lightning_module, "data.batching"
        if not isinstance(module, DataRequirements):
            raise packing_unsupported(module, setting)
        rows = [*self.training_rows, *self.validation_rows]
        module.check_packing(max(map(self.length, rows)), setting)

    def train_dataloader(self) -> ResumableLoader[TokenizedExample, Any]:
        """Return the training loader; print the fraction of tokens that are not padding, if batches are padded."""
        loader = super().train_dataloader()
        if self.batching == "group_by_length":
            line = f"{loader.token_efficiency():.1%} of a batch's positions hold tokens"
            rank_zero_info(line, extra={"brief": ""})
        return loader

    def load_records(self, path: DataSource, report: DatasetReport) -> list[Demonstration]:
        """Read demonstrations."""
        return read_records(read_rows(path), "demonstration", Demonstration, self.format, report)

    def tokenize(self, records: list[Demonstration], report: DatasetReport) -> list[TokenizedExample]:
        """Tokenize demonstrations within the length limits."""
        return tokenize_demonstrations(records, PromptTemplate(self.tokenizer, self.template), self.lengths, report)

    def collate(self, rows: list[Any], normalizer: float) -> TokenBatch:
        """Build a padded or packed batch."""
        if self.batching == "packing":
            return collate_packed(rows, normalizer)
        return collate_tokens(rows, normalizer, self.tokenizer.pad_token_id)

    def num_targets(self, row: TokenizedExample) -> int:
        """Return the number of completion tokens."""
        return sum(row.loss_mask)

    def length(self, row: TokenizedExample) -> int:
        """Return the length in tokens."""
        return len(row.input_ids)

    def without_targets(self, row: TokenizedExample) -> TokenizedExample:
        """Return a copy with an all-False loss mask."""
        return TokenizedExample(row.input_ids, [False] * len(row.input_ids))


def tokenize_demonstrations(
    records: list[Demonstration], template: PromptTemplate, lengths: TruncationPolicy, report: DatasetReport
) -> list[TokenizedExample]:
    """Concatenate prompt ids, completion ids and EOS; the targets are the completion and EOS.

    If a record trains on all replies of a conversation, the replies within the prompt are targets too.
    """
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in records])
    prompt_masks = mask_earlier_replies(records, prompts, template, report)
    completions = template.encode_replies([each.completion for each in records], [each.prompt for each in records])
    rows = []
    for record, prompt_ids, loss_mask, completion_ids in zip(records, prompts, prompt_masks, completions):
        prompt = lengths.fit_prompt(prompt_ids, template.bos_ids, record.origin, report)
        if prompt is None:
            continue
        completion = lengths.fit_completion(completion_ids, template.tokenizer.eos_token_id, record.origin, report)
        if len(prompt) < len(prompt_ids):  # truncated from the left, with BOS put before it again
            num_masked = max(1, len(template.bos_ids))
            loss_mask = [False] * num_masked + loss_mask[len(loss_mask) - len(prompt) + num_masked :]
        rows.append(TokenizedExample(prompt + completion, loss_mask + [True] * len(completion)))
    return rows
