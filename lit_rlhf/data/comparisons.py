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
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy


class ComparisonDataModule(PreprocessedDataModule[TokenizedRanking]):
    """Yields `RankingBatch`: a ranking is one element of a batch, whatever its K (§3.5 of the paper).

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The same, for validation.
        validation_fraction: Share of the distinct prompts held out for validation, where there is no
            `validation_path`.
        format: "auto", a format's name, or the dotted path of your own function; see `lit_rlhf.data.formats.registry`.
        template: How prompts are put into words; see `lit_rlhf.data.prompt_template.PromptTemplate`.
        max_prompt_length: In tokens; longer ones go by `overlong_prompts`.
        max_completion_length: In tokens, the EOS included; longer ones are cut, and then have no EOS.
        overlong_prompts: "drop" the ranking, or "truncate" the prompt to its end. Both are counted and printed.
        preprocessing: The paper's data steps; see `lit_rlhf.data.preprocessing.settings.Preprocessing`.
        micro_batch_size: Rankings per rank and backward; each is K sequences.
        batching: How the rankings of a minibatch are dealt to micro-batches, which changes no loss: "by_length",
            micro-batches of like length; "as_drawn".
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
        preprocessing: Preprocessing | None = None,
        micro_batch_size: int = 8,
        batching: Literal["by_length", "as_drawn"] = "by_length",
        seed: int = 0,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch_size, seed, batching)
        self.format = format
        self.template = template
        self.lengths = TruncationPolicy(max_prompt_length, max_completion_length, overlong_prompts).checked()
        self.preprocessing = (preprocessing or Preprocessing()).checked(validation_fraction)

    def records(self, path: str, report: DatasetReport) -> list[Ranking]:
        """Rankings as they were written, with a count of their sizes, comparisons and ties."""
        records = read_records(read_rows(path), "ranking", Ranking, self.format, report)
        report.remark(count_comparisons(records))
        return records

    def tokenize(self, records: list[Ranking], report: DatasetReport) -> list[TokenizedRanking]:
        """Rankings within the length limits."""
        return tokenize_rankings(records, PromptTemplate(self.tokenizer, self.template), self.lengths, report)

    def collate(self, rows: list[TokenizedRanking], normalizer: float) -> RankingBatch:
        """A padded batch."""
        return collate_rankings(rows, normalizer, self.tokenizer.pad_token_id)

    def num_targets(self, row: TokenizedRanking) -> int:
        """A ranking counts as one, whatever its K."""
        return 1

    def length(self, row: TokenizedRanking) -> int:
        """Tokens of the widest of its K sequences."""
        return len(row.prompt) + max(len(each) for each in row.completions)

    def without_targets(self, row: TokenizedRanking) -> TokenizedRanking:
        """The same completions, all tied: no pair to learn from."""
        return row._replace(ranks=[0] * len(row.ranks))


def count_comparisons(records: list[Ranking]) -> str:
    """Rankings by K, their C(K, 2) comparisons in all, and the ties among these, in words."""
    sizes = Counter(len(record.completions) for record in records)
    pairs = [pair for record in records for pair in combinations(record.ranks, 2)]
    ties = sum(one == other for one, other in pairs)
    by_size = ", ".join(f"{sizes[k]:,} of K = {k}" for k in sorted(sizes))
    return f"rankings read: {by_size}; {len(pairs):,} comparisons, {ties:,} of them ties"


def tokenize_rankings(
    records: list[Ranking], template: PromptTemplate, lengths: TruncationPolicy, report: DatasetReport
) -> list[TokenizedRanking]:
    """Prompt ids once, and the K completions' ids with EOS.

    A ranking whose completions differ only behind `max_completion_length` is skipped and counted.
    """
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in records])
    texts = [text for each in records for text in each.completions]
    tokenised = iter(template.encode_replies(texts, [each.prompt for each in records for _ in each.completions]))
    rows = []
    for record, prompt_ids in zip(records, prompts):
        completion_ids = [next(tokenised) for _ in record.completions]
        prompt = lengths.fit_prompt(prompt_ids, template.leading, record.origin, report)
        if prompt is None:
            continue
        eos = template.tokenizer.eos_token_id
        completions = [lengths.fit_completion(ids, eos, record.origin, report) for ids in completion_ids]
        if len({tuple(ids) for ids in completions}) == 1:
            report.skip("completions differ only behind max_completion_length", record.origin)
            continue
        rows.append(TokenizedRanking(prompt, completions, record.ranks, record.labeler))
    return rows
