"""Demonstrations: prompt and completion, for supervised fine-tuning (the paper's step 1)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from lit_rlhf.data.batches import TokenBatch
from lit_rlhf.data.collation import TokenRow, collate_tokens
from lit_rlhf.data.formats import read_records
from lit_rlhf.data.lengths import LengthPolicy
from lit_rlhf.data.planned import PlannedDataModule
from lit_rlhf.data.prompting import PromptTemplate, encode_texts
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import PreparationReport
from lit_rlhf.data.sources import read_rows


class DemonstrationDataModule(PlannedDataModule[Demonstration, TokenRow]):
    """Yields `TokenBatch`; the targets of the loss are the completion's tokens and the EOS behind it.

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The same, for validation.
        validation_fraction: Share of the distinct prompts held out for validation, where there is no
            `validation_path`.
        format: "auto", a format's name, or the dotted path of your own function; see `lit_rlhf.data.formats`.
        template: How prompts are put into words; see `lit_rlhf.data.prompting.PromptTemplate`.
        max_prompt_length: In tokens; longer ones go by `long_prompts`.
        max_completion_length: In tokens, the EOS included; longer ones are cut, and then have no EOS.
        long_prompts: "drop" the row, or "truncate" the prompt to its end. Both are counted and printed.
        micro_batch: Demonstrations per rank and backward.
        group_by_length: Whether micro-batches are filled by like length (the minibatch stays the same).
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
        long_prompts: Literal["drop", "truncate"] = "drop",
        micro_batch: int = 8,
        group_by_length: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch, seed, group_by_length)
        self.format = format
        self.template = template
        self.lengths = LengthPolicy(max_prompt_length, max_completion_length, long_prompts).checked()

    def records(self, path: str, report: PreparationReport) -> list[Demonstration]:
        """Demonstrations as they were written."""
        return read_records(read_rows(path), "demonstration", Demonstration, self.format, report)

    def tokenise(self, records: list[Demonstration], report: PreparationReport) -> list[TokenRow]:
        """Demonstrations within the length limits."""
        return tokenise_demonstrations(records, PromptTemplate(self.tokenizer, self.template), self.lengths, report)

    def collate(self, rows: list[TokenRow], normalizer: float) -> TokenBatch:
        """A padded batch."""
        return collate_tokens(rows, normalizer, self.tokenizer.pad_token_id)

    def split_key(self, record: Demonstration) -> Hashable:
        """The prompt."""
        return repr(record.prompt)

    def weight(self, row: TokenRow) -> int:
        """Completion tokens."""
        return sum(row.targets)

    def length(self, row: TokenRow) -> int:
        """Tokens."""
        return len(row.ids)

    def blank(self, row: TokenRow) -> TokenRow:
        """The same tokens, none a target."""
        return TokenRow(row.ids, [False] * len(row.ids))


def tokenise_demonstrations(
    records: list[Demonstration], template: PromptTemplate, lengths: LengthPolicy, report: PreparationReport
) -> list[TokenRow]:
    """Prompt ids, completion ids and EOS, with the completion and the EOS as targets."""
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in records])
    completions = encode_texts(template.tokenizer, [each.completion for each in records])
    rows = []
    for record, prompt_ids, completion_ids in zip(records, prompts, completions):
        prompt = lengths.fit_prompt(prompt_ids, template.leading, record.origin, report)
        if prompt is None:
            continue
        completion = lengths.fit_completion(completion_ids, template.tokenizer.eos_token_id, record.origin, report)
        rows.append(TokenRow(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return rows
