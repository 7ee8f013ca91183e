"""Pretraining text in blocks of equal length, for language modeling and the paper's PPO-ptx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.base import TokenizedDataModule
from lit_rlhf.data.batches import TokenBatch
from lit_rlhf.data.document_stream import TextSource
from lit_rlhf.data.loader import BatchShape, infinite_permutation
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import DataSource, held_rows, stream_rows
from lit_rlhf.data.token_cache import load_blocks
from lit_rlhf.errors import UserError
from lit_rlhf.hyperparameters import save_settings
from lit_rlhf.importing import Function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextBlock(NamedTuple):
    """One block of text."""

    input_ids: Tensor  # (T,) int32
    has_targets: bool = True  # False: a copy without targets, for a rank that has no row left in validation


class TextBlocks(Sequence[TextBlock]):
    """Text in blocks of equal length; every token except a block's first is a target.

    Args:
        blocks: Token ids (num_blocks, T), integer.
        seed: Seeds the order of `get_batch`.
        report: Of the documents that were read.
    """

    def __init__(self, blocks: Tensor, seed: int = 0, report: DatasetReport | None = None) -> None:
        assert blocks.ndim == 2 and len(blocks), f"blocks must be (num_blocks, T), not {tuple(blocks.shape)}"
        self.blocks = blocks
        self.seed = seed
        self.report = report

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [TextBlock(each) for each in self.blocks[index]]
        return TextBlock(self.blocks[index])

    def get_batch(
        self,
        minibatch: int,
        step: int = 0,
        shape: BatchShape = BatchShape(1),  # noqa: B008
        start: int = 0,
    ) -> TokenBatch:
        """Return a rank's micro-batch of an infinite supply: epochs over the blocks, each permuted.

        It depends on the arguments and the seed alone: a resumed run needs no other state.

        Args:
            minibatch: Number of the optimizer step, from 0.
            step: Number of the micro-batch within it.
            shape: Rows per micro-batch, micro-batches per optimizer step, ranks, rank.
            start: Rows before minibatch 0, of other sizes.

        Returns:
            `shape.micro_batch_size` blocks; the normalizer counts the targets of the full minibatch.
        """
        size = shape.global_micro_batch_size
        position = start + minibatch * shape.minibatch_size
        indices = infinite_permutation(len(self), self.seed, position, shape.minibatch_size)
        own_indices = indices[step * size : (step + 1) * size][shape.rank :: shape.world_size]
        num_targets = shape.minibatch_size * (self.blocks.shape[1] - 1)
        return collate_blocks([self[index] for index in own_indices], float(num_targets))


def load_text_blocks(
    path: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    format: str | Function = "auto",
    shuffle_documents: bool = False,
    seed: int = 0,
) -> TextBlocks:
    """Load the blocks of a text dataset, memory-mapped from the cache (`token_cache`); print what was skipped.

    Args:
        path: A local file, a hub name, or rows in memory; see `lit_rlhf.data.sources.read_rows`.
        tokenizer: The model's tokenizer.
        seq_len: Tokens per block, T.
        format: "auto", "text", or your own function, or its dotted path; see `lit_rlhf.data.formats.registry`.
        shuffle_documents: Whether documents are concatenated in a permuted order; else in file order.
        seed: Seeds that permutation and the order of `TextBlocks.get_batch`.

    Raises:
        UserError: The data cannot be read, or is shorter than one block.
    """
    text = TextSource(held_rows(path), seq_len, format, shuffle_documents, seed=seed)
    (blocks,), report = load_blocks(text, tokenizer)
    report.print_table()
    return TextBlocks(blocks, seed, report)


def collate_blocks(blocks: Sequence[TextBlock], normalizer: float) -> TokenBatch:
    """Stack blocks to a batch (B, T); every token except the first is a target."""
    input_ids = torch.stack([each.input_ids for each in blocks]).long()  # (B, T)
    loss_mask = torch.tensor([each.has_targets for each in blocks])[:, None].expand(input_ids.shape).clone()  # (B, T)
    loss_mask[:, 0] = False
    return TokenBatch(input_ids, torch.ones_like(input_ids), loss_mask, torch.tensor(normalizer, dtype=torch.float32))


class PretrainingDataModule(TokenizedDataModule[TextBlock]):
    """Yields `TokenBatch` of blocks of text.

    Args:
        path: A local file, a hub name, or rows in memory; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The validation data, likewise.
        validation_fraction: Fraction of the distinct documents held out for validation, without a `validation_path`.
        format: "auto", "text", or your own function, or its dotted path; see `lit_rlhf.data.formats.registry`.
        seq_len: Tokens per block.
        shuffle_documents: Whether documents are concatenated in a permuted order; else in file order.
        micro_batch_size: Blocks per rank and backward pass.
        seed: Seeds the order of documents and blocks, and the held-out part.
    """

    length_settings = "data.seq_len"
    data_role = "pretraining text"

    def __init__(
        self,
        path: DataSource,
        validation_path: DataSource | None = None,
        validation_fraction: float = 0.0,
        format: str | Function = "auto",
        seq_len: int = 512,
        shuffle_documents: bool = False,
        micro_batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch_size, seed, batching="none")
        if seq_len < 2:
            raise UserError(f"seq_len: {seq_len} must be at least 2, a block's first token is no target")
        self.format = format
        self.seq_len = seq_len
        self.shuffle_documents = shuffle_documents
        save_settings(self, locals() | self.describe_sources())

    def load_rows(self) -> tuple[TextBlocks, Sequence[TextBlock]]:
        """Return the blocks of the training documents, and those of the held-out documents or the validation text."""
        self.check_max_positions(self.seq_len, self.path)
        if self.validation_path is not None:
            stream_rows(self.validation_path)  # raises if it is missing, before hours of tokenizing the training text
        text = TextSource(
            self.path, self.seq_len, self.format, self.shuffle_documents, self.validation_fraction, self.seed
        )
        splits = self._load_splits(text)
        if self.validation_path is not None:
            splits += self._load_splits(text._replace(path=self.validation_path), validation=True)
        training, *validation = splits
        return training, validation[0] if validation else []

    def _load_splits(self, text: TextSource, validation: bool = False) -> list[TextBlocks]:
        splits, report = load_blocks(text, self.tokenizer)
        if len(splits) == 2:
            report.add_validation_line(len(splits[1]), len(splits[0]))
        report.print_table()
        report.validation = validation
        self.reports += (report,)
        return [TextBlocks(each, self.seed) for each in splits]

    def collate(self, rows: list[TextBlock], normalizer: float) -> TokenBatch:
        """Build a batch of blocks."""
        return collate_blocks(rows, normalizer)

    def num_targets(self, row: TextBlock) -> int:
        """Return the number of tokens except the first."""
        return len(row.input_ids) - 1

    def length(self, row: TextBlock) -> int:
        """Return the length in tokens."""
        return len(row.input_ids)

    def without_targets(self, row: TextBlock) -> TextBlock:
        """Return a copy with an all-False loss mask."""
        return row._replace(has_targets=False)
