"""Pretraining text: documents joined with EOS and cut into blocks, for language modelling and the paper's PPO-ptx."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.batches import TokenBatch
from lit_rlhf.data.formats import read_records
from lit_rlhf.data.loader import Cut, endless_places, epoch_order
from lit_rlhf.data.planned import PlannedDataModule
from lit_rlhf.data.prompting import encode_texts, leading_ids
from lit_rlhf.data.records import TextRow
from lit_rlhf.data.report import PreparationReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.steps.splits import split
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_AT_ONCE = 1000  # what is tokenised at once; bounds the memory that lists of ids take


class Block(NamedTuple):
    """One block of running text, as wide as all others."""

    ids: Tensor  # (T,) int32
    trained: bool = True  # False: a repeat that fills a rank's last validation batch, without targets


class TextBlocks(Sequence[Block]):
    """Running text in blocks of equal length; every token but a block's first is a target.

    Args:
        blocks: Token ids (blocks, T), integer.
        seed: Keys the order of `batch`.
    """

    def __init__(self, blocks: Tensor, seed: int = 0) -> None:
        assert blocks.ndim == 2 and len(blocks), f"blocks must be (blocks, T), not {tuple(blocks.shape)}"
        self.blocks = blocks
        self.seed = seed

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [Block(each) for each in self.blocks[place]]
        return Block(self.blocks[place])

    def batch(self, minibatch: int, step: int = 0, cut: Cut = Cut(1)) -> TokenBatch:  # noqa: B008
        """A rank's micro-batch of an endless supply: passes over the blocks, each permuted, without replacement.

        It depends on the arguments and the seed alone: a resumed run needs no other state.

        Args:
            minibatch: Number of the optimizer step, from 0.
            step: Number of the micro-batch within it.
            cut: Rows per micro-batch, micro-batches per optimizer step, ranks, rank.

        Returns:
            `cut.micro_batch` blocks; the normalizer counts the targets of the whole minibatch.
        """
        places = endless_places(len(self), self.seed, minibatch * cut.minibatch, cut.minibatch)
        mine = places[step * cut.step_rows : (step + 1) * cut.step_rows][cut.rank :: cut.world_size]
        targets = cut.minibatch * (self.blocks.shape[1] - 1)
        return collate_blocks([self[place] for place in mine], float(targets))


def text_blocks(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    format: str = "auto",
    shuffle_documents: bool = False,
    seed: int = 0,
) -> TextBlocks:
    """The blocks of a text dataset; prints what was left out.

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        tokenizer: The model's tokenizer.
        block_length: Tokens per block, T.
        format: "auto", "text", or the dotted path of your own function; see `lit_rlhf.data.formats`.
        shuffle_documents: Whether documents are joined in a permuted order; else as the file has them.
        seed: Keys that permutation and the order of `TextBlocks.batch`.

    Raises:
        UserError: The data cannot be read, or is shorter than one block.
    """
    report = PreparationReport(path)
    records = read_records(read_rows(path), "text", TextRow, format, report)
    blocks = join_and_cut(records, tokenizer, block_length, shuffle_documents, seed, report)
    report.show()
    return TextBlocks(blocks, seed)


def join_and_cut(
    records: Sequence[TextRow],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    shuffle_documents: bool,
    seed: int,
    report: PreparationReport,
) -> Tensor:
    """Documents joined, each with EOS behind it (and BOS before it, where the tokenizer has one), as (blocks, T) int32.

    The tokens behind the last whole block are left out and reported.

    Raises:
        UserError: Fewer tokens than one block.
    """
    if shuffle_documents:
        records = [records[place] for place in epoch_order(len(records), seed, epoch=0)]
    leading, eos = leading_ids(tokenizer), tokenizer.eos_token_id
    stream = array("i")
    for start in range(0, len(records), _DOCUMENTS_AT_ONCE):
        texts = [each.text for each in records[start : start + _DOCUMENTS_AT_ONCE]]
        for ids in encode_texts(tokenizer, texts):
            stream.extend([*leading, *ids, eos])
    count = len(stream) // block_length
    if not count:
        raise UserError(
            f"{report.source!r} holds {len(stream):,} tokens, fewer than one block; lower block_length ({block_length})"
        )
    report.remark(f"{len(stream):,} tokens: {count:,} blocks of {block_length}, {len(stream) % block_length} left out")
    return torch.tensor(stream[: count * block_length], dtype=torch.int32).view(count, block_length)  # (blocks, T)


def collate_blocks(blocks: Sequence[Block], normalizer: float) -> TokenBatch:
    """Blocks as a batch (B, T); every token but the first is a target."""
    ids = torch.stack([each.ids for each in blocks]).long()  # (B, T)
    targets = torch.tensor([each.trained for each in blocks])[:, None].expand(ids.shape).clone()
    targets[:, 0] = False
    return TokenBatch(ids, torch.ones_like(ids), targets, torch.tensor(normalizer, dtype=torch.float32))


class PretrainingDataModule(PlannedDataModule[TextRow, Block]):
    """Yields `TokenBatch` of blocks of running text.

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The same, for validation.
        validation_fraction: Share of the distinct documents held out for validation, where there is no
            `validation_path`.
        format: "auto", "text", or the dotted path of your own function; see `lit_rlhf.data.formats`.
        block_length: Tokens per block.
        shuffle_documents: Whether documents are joined in a permuted order; else as the file has them.
        micro_batch: Blocks per rank and backward.
        seed: Keys the order of documents and blocks, and the held-out part.
    """

    length_settings = "data.block_length"

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        validation_fraction: float = 0.0,
        format: str = "auto",
        block_length: int = 512,
        shuffle_documents: bool = False,
        micro_batch: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch, seed, batching="as_drawn")
        if block_length < 2:
            raise UserError(f"block_length: {block_length} must be at least 2, a block's first token is no target")
        self.format = format
        self.block_length = block_length
        self.shuffle_documents = shuffle_documents

    def records(self, path: str, report: PreparationReport) -> list[TextRow]:
        """Documents."""
        return read_records(read_rows(path), "text", TextRow, self.format, report)

    def tokenise(self, records: list[TextRow], report: PreparationReport) -> TextBlocks:
        """Blocks."""
        shuffle = self.shuffle_documents
        return TextBlocks(
            join_and_cut(records, self.tokenizer, self.block_length, shuffle, self.seed, report), self.seed
        )

    def collate(self, rows: list[Block], normalizer: float) -> TokenBatch:
        """A batch of blocks."""
        return collate_blocks(rows, normalizer)

    def training_parts(self, records: list[TextRow], report: PreparationReport) -> tuple[list[TextRow], list[TextRow]]:
        """All documents, or a part held out in which none of the others is."""
        if not self.validation_fraction:
            return records, []
        return split(records, lambda record: record.text, self.validation_fraction, self.seed, report)

    def weight(self, row: Block) -> int:
        """All tokens but the first."""
        return len(row.ids) - 1

    def length(self, row: Block) -> int:
        """Tokens."""
        return len(row.ids)

    def blank(self, row: Block) -> Block:
        """The same tokens, none a target."""
        return row._replace(trained=False)
