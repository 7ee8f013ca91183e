"""Comparisons: rankings of K completions of one prompt, for the reward model (the paper's step 2)."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Literal

from lit_rlhf.data.base import PreprocessedDataModule
from lit_rlhf.data.batches import RankingBatch
from lit_rlhf.data.collation import TokenizedRanking, collate_rankings
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.preprocessing.settings import Preprocessing
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import DataSource, read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.importing import Function


class ComparisonDataModule(PreprocessedDataModule[TokenizedRanking]):
    """Yields `RankingBatch`: a ranking is one element of a batch, for any K (§3.5 of the paper).

    Args:
        path: A local file, a hub name, or rows in memory; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The validation data, likewise.
        validation_fraction: Fraction of the distinct prompts held out for validation, without a `validation_path`.
        format: "auto", a format's name, or your own function, or its dotted path; see `lit_rlhf.data.formats.registry`.
        template: The prompt template; see `lit_rlhf.data.prompt_template.PromptTemplate`.
        max_prompt_length: In tokens; for longer prompts, see `overlong_prompts`.
        max_completion_length: In tokens, including EOS; longer completions are truncated, and then have no EOS.
        overlong_prompts: "drop" the ranking, or "truncate" the prompt from the left. Both are counted and printed.
        preprocessing: The paper's data steps; see `lit_rlhf.data.preprocessing.settings.Preprocessing`.
        micro_batch_size: Rankings per rank and backward pass; each is K sequences.
        batching: How the rankings of a minibatch are assigned to micro-batches; the loss does not depend on it.
            "group_by_length": rankings of similar length together; "none": in the shuffled order.
        seed: Seeds the order of rows and the held-out part.
    """

    data_role = "rankings"

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
        preprocessing: Preprocessing | None = None,
        micro_batch_size: int = 8,
        batching: Literal["group_by_length", "none"] = "group_by_length",
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            validation_path,
            validation_fraction,
            format,
            template,
            TruncationPolicy(max_prompt_length, max_completion_length, overlong_prompts),
            preprocessing or Preprocessing(),
            micro_batch_size,
            batching,
            seed,
        )
        save_settings(self, locals() | self.describe_sources())

    def load_records(self, path: DataSource, report: DatasetReport) -> list[Ranking]:
        """Read rankings; their sizes, comparisons and ties are added to `report`."""
        records = read_records(read_rows(path), "ranking", Ranking, self.format, report)
        report.add_line(summarize_rankings(records))
        return records

    def tokenize(self, records: list[Ranking], report: DatasetReport) -> list[TokenizedRanking]:
        """Tokenize rankings within the length limits."""
        return tokenize_rankings(records, PromptTemplate(self.tokenizer, self.template), self.lengths, report)

    def collate(self, rows: list[TokenizedRanking], normalizer: float) -> RankingBatch:
        """Build a padded batch."""
        return collate_rankings(rows, normalizer, self.tokenizer.pad_token_id)

    def num_targets(self, row: TokenizedRanking) -> int:
        """Return 1: a ranking counts once, for any K."""
        return 1

    def length(self, row: TokenizedRanking) -> int:
        """Return the length in tokens of the longest of the K sequences."""
        return len(row.prompt) + max(len(each) for each in row.completions)

    def without_targets(self, row: TokenizedRanking) -> TokenizedRanking:
        """Return a copy with all completions tied, so that no pair has a loss."""
        return row._replace(ranks=[0] * len(row.ranks))


def summarize_rankings(records: list[Ranking]) -> str:
    """Return one line with the number of rankings per K, of all C(K, 2) comparisons, and of ties among them."""
    sizes = Counter(len(record.completions) for record in records)
    pairs = [pair for record in records for pair in combinations(record.ranks, 2)]
    ties = sum(one == other for one, other in pairs)
    by_size = ", ".join(f"{sizes[k]:,} of K = {k}" for k in sorted(sizes))
    return f"rankings read: {by_size}; {len(pairs):,} comparisons, {ties:,} of them ties"


def tokenize_rankings(
    records: list[Ranking], template: PromptTemplate, lengths: TruncationPolicy, report: DatasetReport
) -> list[TokenizedRanking]:
    """Tokenize each prompt once, and its K completions with EOS.

    A ranking whose completions are equal up to `max_completion_length` is skipped and counted.
    """
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in records])
    texts = [text for each in records for text in each.completions]
    encoded = iter(template.encode_replies(texts, [each.prompt for each in records for _ in each.completions]))
    rows = []
    for record, prompt_ids in zip(records, prompts):
        completion_ids = [next(encoded) for _ in record.completions]
        prompt = lengths.fit_prompt(prompt_ids, template.bos_ids, record.origin, report)
        if prompt is None:
            continue
        eos = template.tokenizer.eos_token_id
        completions = [lengths.fit_completion(ids, eos, record.origin, report) for ids in completion_ids]
        if len({tuple(ids) for ids in completions}) == 1:
            report.skip("completions differ only after max_completion_length", record.origin)
            continue
        rows.append(TokenizedRanking(prompt, completions, record.ranks, record.labeler))
    return rows
