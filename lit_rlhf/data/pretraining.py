"""Pretraining text in blocks, for language modelling and the paper's PPO-ptx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.base import TokenizedDataModule
from lit_rlhf.data.batches import TokenBatch
from lit_rlhf.data.document_stream import TextSource
from lit_rlhf.data.loader import BatchShape, infinite_permutation
from lit_rlhf.data.sources import stream_rows
from lit_rlhf.data.token_cache import blocks_of
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextBlock(NamedTuple):
    """One block of running text, as wide as all others."""

    ids: Tensor  # (T,) int32
    is_target: bool = True  # False: a repeat that fills a rank's last validation batch, without targets


class TextBlocks(Sequence[TextBlock]):
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
            return [TextBlock(each) for each in self.blocks[place]]
        return TextBlock(self.blocks[place])

    def batch(self, minibatch: int, step: int = 0, cut: BatchShape = BatchShape(1)) -> TokenBatch:  # noqa: B008
        """A rank's micro-batch of an endless supply: passes over the blocks, each permuted, without replacement.

        It depends on the arguments and the seed alone: a resumed run needs no other state.

        Args:
            minibatch: Number of the optimizer step, from 0.
            step: Number of the micro-batch within it.
            cut: Rows per micro-batch, micro-batches per optimizer step, ranks, rank.

        Returns:
            `cut.micro_batch_size` blocks; the normalizer counts the targets of the whole minibatch.
        """
        places = infinite_permutation(len(self), self.seed, minibatch * cut.minibatch, cut.minibatch)
        mine = places[step * cut.step_rows : (step + 1) * cut.step_rows][cut.rank :: cut.world_size]
        targets = cut.minibatch * (self.blocks.shape[1] - 1)
        return collate_blocks([self[place] for place in mine], float(targets))


def text_blocks(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    format: str = "auto",
    shuffle_documents: bool = False,
    seed: int = 0,
) -> TextBlocks:
    """The blocks of a text dataset, memory-mapped from the cache (`block_cache`); prints what was left out.

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        tokenizer: The model's tokenizer.
        seq_len: Tokens per block, T.
        format: "auto", "text", or the dotted path of your own function; see `lit_rlhf.data.formats.registry`.
        shuffle_documents: Whether documents are joined in a permuted order; else as the file has them.
        seed: Keys that permutation and the order of `TextBlocks.batch`.

    Raises:
        UserError: The data cannot be read, or is shorter than one block.
    """
    text = TextSource(path, seq_len, format, shuffle_documents, seed=seed)
    (blocks,), report = blocks_of(text, tokenizer)
    report.show()
    return TextBlocks(blocks, seed)


def collate_blocks(blocks: Sequence[TextBlock], normalizer: float) -> TokenBatch:
    """Blocks as a batch (B, T); every token but the first is a target."""
    ids = torch.stack([each.ids for each in blocks]).long()  # (B, T)
    targets = torch.tensor([each.is_target for each in blocks])[:, None].expand(ids.shape).clone()
    targets[:, 0] = False
    return TokenBatch(ids, torch.ones_like(ids), targets, torch.tensor(normalizer, dtype=torch.float32))


class PretrainingDataModule(TokenizedDataModule[TextBlock]):
    """Yields `TokenBatch` of blocks of running text.

    Args:
        path: A local file or a hub name; see `lit_rlhf.data.sources.read_rows`.
        validation_path: The same, for validation.
        validation_fraction: Share of the distinct documents held out for validation, where there is no
            `validation_path`.
        format: "auto", "text", or the dotted path of your own function; see `lit_rlhf.data.formats.registry`.
        seq_len: Tokens per block.
        shuffle_documents: Whether documents are joined in a permuted order; else as the file has them.
        micro_batch_size: Blocks per rank and backward.
        seed: Keys the order of documents and blocks, and the held-out part.
    """

    length_settings = "data.seq_len"

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        validation_fraction: float = 0.0,
        format: str = "auto",
        seq_len: int = 512,
        shuffle_documents: bool = False,
        micro_batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(path, validation_path, validation_fraction, micro_batch_size, seed, batching="as_drawn")
        if seq_len < 2:
            raise UserError(f"seq_len: {seq_len} must be at least 2, a block's first token is no target")
        self.format = format
        self.seq_len = seq_len
        self.shuffle_documents = shuffle_documents

    def read(self) -> tuple[TextBlocks, Sequence[TextBlock]]:
        """Blocks of the text, and of the part of its documents that is held out or of another text."""
        self.check_max_positions(self.seq_len, self.path)
        if self.validation_path is not None:
            stream_rows(self.validation_path)  # is it there? the other text may take hours
        text = TextSource(
            self.path, self.seq_len, self.format, self.shuffle_documents, self.validation_fraction, self.seed
        )
        parts = self._parts(text)
        if self.validation_path is not None:
            parts += self._parts(text._replace(path=self.validation_path))
        training, *validation = parts
        return training, validation[0] if validation else []

    def _parts(self, text: TextSource) -> list[TextBlocks]:
        parts, report = blocks_of(text, self.tokenizer)
        if len(parts) == 2:
            report.held_out(len(parts[1]), len(parts[0]))
        report.show()
        return [TextBlocks(each, self.seed) for each in parts]

    def collate(self, rows: list[TextBlock], normalizer: float) -> TokenBatch:
        """A batch of blocks."""
        return collate_blocks(rows, normalizer)

    def num_targets(self, row: TextBlock) -> int:
        """All tokens but the first."""
        return len(row.ids) - 1

    def length(self, row: TextBlock) -> int:
        """Tokens."""
        return len(row.ids)

    def without_targets(self, row: TextBlock) -> TextBlock:
        """The same tokens, none a target."""
        return row._replace(is_target=False)
