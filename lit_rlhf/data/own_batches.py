"""Batches of a user's own loader: text or token ids, which a module turns into batches of its own type.

A module calls `read_batch` on every batch that reaches it (`LightningModule.on_before_batch_transfer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch, RankingBatch, TokenBatch
from lit_rlhf.data.collation import (
    TokenizedExample,
    TokenizedPrompt,
    TokenizedRanking,
    collate_prompts,
    collate_rankings,
    collate_tokens,
)
from lit_rlhf.data.comparisons import tokenize_rankings
from lit_rlhf.data.demonstrations import tokenize_demonstrations
from lit_rlhf.data.formats.registry import FORMATS, Kind, read_records
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.prompts import tokenize_prompts
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Rows, read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError

NO_LIMIT = TruncationPolicy(2**31, 2**31)  # the module refuses rows that are longer than its model's positions
IGNORED_LABEL = -100  # of transformers: no target of the loss
COLLATE_HINT = "; give your DataLoader collate_fn=list, so that a batch is a list of rows"


class OwnRows(NamedTuple):
    """The rows of a batch: text with its columns, or token ids."""

    text: Rows = ()
    tokens: Sequence[TokenizedExample] = ()

    @property
    def is_plain_text(self) -> bool:
        """Whether the rows are strings, without any other column."""
        return bool(self.text) and all(row.fields.keys() == {"text"} for row in self.text)

    @property
    def are_demonstrations(self) -> bool:
        """Whether the rows have the columns of demonstrations, and of no ranking."""

        def matches(kind: Kind) -> bool:
            fields = self.text[0].fields
            return any(set(each.columns) <= fields.keys() and each.matches(fields) for each in FORMATS[kind])

        return bool(self.text) and matches("demonstration") and not matches("ranking")


def read_batch(batch: Any, pad_id: int) -> OwnRows | None:
    """Return the rows of a batch of text or of token ids; None if it is neither, such as a batch of this library.

    Args:
        batch: Strings; rows as dicts, or the dict of their columns that PyTorch's default collation makes of them;
            token ids as a tensor (B, T) or as lists, also in a dict with `input_ids`, `attention_mask` and `labels`.
        pad_id: The padding token, which is no token of a row.

    Raises:
        UserError: The columns of a batch cannot be taken apart into rows.
    """
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        return OwnRows(tokens=_token_rows({"input_ids": batch}, pad_id))
    if isinstance(batch, Mapping):
        if "input_ids" in batch:
            return OwnRows(tokens=_token_rows(batch, pad_id))
        return OwnRows(read_rows(_split_columns(batch)))
    if isinstance(batch, str):
        batch = [batch]
    if type(batch) not in (list, tuple) or not batch:  # a NamedTuple is a batch already
        return None
    if all(isinstance(each, Mapping) and "input_ids" in each for each in batch):
        columns = [{name: [value] for name, value in each.items()} for each in batch]
        return OwnRows(tokens=[row for each in columns for row in _token_rows(each, pad_id)])
    if all(isinstance(each, str | Mapping) for each in batch):
        return OwnRows(read_rows(list(batch)))
    if all(_is_token_ids(each) for each in batch):
        return OwnRows(tokens=_token_rows({"input_ids": batch}, pad_id))
    return None


def _is_token_ids(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 1 and not value.is_floating_point()
    return isinstance(value, list | tuple) and all(isinstance(each, int) for each in value)


def _token_rows(columns: Mapping[str, Any], pad_id: int) -> list[TokenizedExample]:
    """Return rows of token ids; without `labels`, all tokens are targets."""
    rows = []
    for number, each in enumerate(columns["input_ids"]):
        ids = torch.as_tensor(each)
        mask = (
            torch.as_tensor(columns["attention_mask"][number]).bool() if "attention_mask" in columns else ids != pad_id
        )
        labels = torch.as_tensor(columns["labels"][number]) if "labels" in columns else ids
        ids, labels = ids[mask], labels[mask]
        is_target = labels != IGNORED_LABEL
        if not torch.equal(labels[is_target], ids[is_target]):
            raise UserError(
                f"rows[{number}]: labels must be input_ids, or {IGNORED_LABEL} for a token that is no target; the "
                "shift by one is made here"
            )
        rows.append(TokenizedExample(ids.tolist(), is_target.tolist()))
    return rows


def _split_columns(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a dict of columns."""
    columns = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in batch.items()}
    for name, values in columns.items():
        if isinstance(values, str) or not isinstance(values, list | tuple):
            raise UserError(f"batch: the column {name!r} is a {type(values).__name__}, no list of values{COLLATE_HINT}")
        if not all(value is None or isinstance(value, str | int | float | bool) for value in values):
            # PyTorch turns lists within rows round: the second column of all rows would be read as the second row
            raise UserError(f"batch: the column {name!r} holds lists{COLLATE_HINT}")
    return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


def _check_complete(report: DatasetReport) -> None:
    """Refuse a batch of which a row would be left out."""
    if sum(report.skipped.values()):
        raise UserError(f"batch: {report.format_summary()}; leave such rows out before, or use a data module")


def tokenize_targets(rows: OwnRows, template: PromptTemplate) -> Sequence[TokenizedExample]:
    """Tokenize demonstrations, whose completions are targets, or texts, whose tokens all are; both end with EOS."""
    if rows.tokens:
        return rows.tokens
    if rows.is_plain_text:
        eos = template.tokenizer.eos_token_id
        encoded = template.encode([row.fields["text"] for row in rows.text])
        return [TokenizedExample([*ids, eos], [True] * (len(ids) + 1)) for ids in encoded]
    report = DatasetReport("batch")
    records = read_records(rows.text, "demonstration", Demonstration, "auto", report)
    examples = tokenize_demonstrations(records, template, NO_LIMIT, report)
    _check_complete(report)
    return examples


def tokenize_own_prompts(rows: OwnRows, template: PromptTemplate) -> list[TokenizedPrompt]:
    """Tokenize prompts; of demonstrations and comparisons, the prompts are used."""
    if rows.tokens:
        texts = template.tokenizer.batch_decode([row.input_ids for row in rows.tokens])
        return [TokenizedPrompt(row.input_ids, {"prompt": text}) for row, text in zip(rows.tokens, texts)]
    report = DatasetReport("batch")
    prompts = tokenize_prompts(read_records(rows.text, "prompt", PromptRow, "auto", report), template, NO_LIMIT, report)
    _check_complete(report)
    return prompts


def tokenize_own_rankings(rows: OwnRows, template: PromptTemplate, scores_only: bool) -> list[TokenizedRanking]:
    """Tokenize rankings.

    Args:
        rows: Rankings; to be scored, also demonstrations, or token ids of prompt and response.
        template: Renders the prompts.
        scores_only: Whether a response without others may be a ranking of its own.

    Raises:
        UserError: A row is no ranking.
    """
    if scores_only and (rows.tokens or rows.are_demonstrations):
        examples = tokenize_targets(rows, template)
        starts = [len(each.input_ids) - 1 if rows.tokens else each.loss_mask.index(True) for each in examples]
        parts = [(each.input_ids[:start], each.input_ids[start:]) for each, start in zip(examples, starts)]
        return [TokenizedRanking(prompt, [response], [0]) for prompt, response in parts]
    if rows.tokens:
        raise UserError(
            "batch: a reward model is trained on rankings, and token ids say nothing of them; give rows such as "
            '{"prompt": …, "chosen": …, "rejected": …}, or a RankingBatch'
        )
    report = DatasetReport("batch")
    records = read_records(rows.text, "ranking", Ranking, "auto", report)
    rankings = tokenize_rankings(records, template, NO_LIMIT, report)
    _check_complete(report)
    return rankings


def collate_targets(examples: Sequence[TokenizedExample], num_batches: int, pad_id: int) -> TokenBatch:
    """Build a batch whose loss is the mean over its own targets.

    Args:
        examples: Of `tokenize_targets`.
        num_batches: Batches of an optimizer step, over accumulation and ranks: the mean of their gradients is taken.
        pad_id: The padding token.
    """
    count = sum(sum(each.loss_mask[1:]) for each in examples)
    return collate_tokens(examples, float(max(count, 1) * num_batches), pad_id)


def collate_own_rankings(rankings: Sequence[TokenizedRanking], num_batches: int, pad_id: int) -> RankingBatch:
    """Build a batch whose loss is the mean over its own rankings; `num_batches` as in `collate_targets`."""
    return collate_rankings(rankings, float(len(rankings) * num_batches), pad_id)


def collate_own_prompts(prompts: Sequence[TokenizedPrompt], pad_id: int) -> PromptBatch:
    """Build a batch of prompts, numbered within the batch."""
    return collate_prompts(prompts, range(len(prompts)), pad_id)
