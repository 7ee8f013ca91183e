"""From documents to one stream of token ids, of which a bounded part is in memory at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from lit_rlhf.data.formats.registry import stream_records
from lit_rlhf.data.loader import epoch_permutation
from lit_rlhf.data.preprocessing.keys import hash_key
from lit_rlhf.data.preprocessing.splits import hold_out_hashes
from lit_rlhf.data.prompt_template import encode_texts, find_bos_ids
from lit_rlhf.data.records import TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import DataSource, RowStream, source_name
from lit_rlhf.importing import Function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# limits of what is tokenized in one call, whichever is reached first
MAX_DOCUMENTS_PER_CHUNK = 1000
MAX_CHARACTERS_PER_CHUNK = 500_000

TRAIN, VALIDATION = 0, 1  # indices of the splits of a text


class TextSource(NamedTuple):
    """A text dataset, and every setting that decides, with the tokenizer, what its blocks are."""

    path: DataSource
    seq_len: int  # tokens per block, T
    format: str | Function = "auto"
    shuffle_documents: bool = False  # whether documents are concatenated in a permuted order, which loads all of them
    validation_fraction: float = 0.0  # fraction of the distinct documents held out for validation
    seed: int = 0  # seeds that order and the held-out part

    @property
    def num_splits(self) -> int:
        """1, or 2 if documents are held out."""
        return 2 if self.validation_fraction else 1


def iter_token_chunks(
    text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase, report: DatasetReport
) -> Iterator[tuple[int, array[int]]]:
    """Tokenize and concatenate documents, each with EOS after it (and BOS before it, if the tokenizer adds one).

    Args:
        text: The text dataset.
        rows: Its rows.
        tokenizer: The model's tokenizer.
        report: Counts the rows; complete after the last chunk.

    Yields:
        A split (`TRAIN` or `VALIDATION`) and the ids of its next documents, int32.

    Raises:
        UserError: A row cannot be read, no document is left, or none is on one side of `validation_fraction`.
    """
    bos, eos = find_bos_ids(tokenizer), tokenizer.eos_token_id
    for chunk in chunk_documents(assign_splits(text, rows, report)):
        chunk_ids = [array("i") for _ in range(text.num_splits)]
        for (split, _), ids in zip(chunk, encode_texts(tokenizer, [document for _, document in chunk])):
            chunk_ids[split].extend([*bos, *ids, eos])
        yield from enumerate(chunk_ids)


def assign_splits(text: TextSource, rows: RowStream, report: DatasetReport) -> Iterator[tuple[int, str]]:
    """Yield each document with its split, in the order in which the documents of a split are concatenated."""
    held_out: set[bytes] = set()
    if text.validation_fraction:  # decided on hashes, in a separate pass over the file
        uncounted = DatasetReport(source_name(text.path))
        hashes = (hash_key(each.text, text.seed) for each in read_documents(text, rows, uncounted))
        held_out = hold_out_hashes(hashes, text.validation_fraction, source_name(text.path))

    def find_split(document: str) -> int:
        return VALIDATION if held_out and hash_key(document, text.seed) in held_out else TRAIN

    documents = ((find_split(each.text), each.text) for each in read_documents(text, rows, report))
    if not text.shuffle_documents:
        yield from documents
        return
    all_documents = list(documents)
    for split in range(text.num_splits):
        own = [each for each in all_documents if each[0] == split]
        yield from (own[index] for index in epoch_permutation(len(own), text.seed, epoch=0))


def read_documents(text: TextSource, rows: RowStream, report: DatasetReport) -> Iterator[TextRow]:
    """Yield the documents in file order."""
    return stream_records(rows, "text", TextRow, text.format, report)


def chunk_documents(documents: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Group documents into lists that are tokenized in one call."""
    chunk, characters = [], 0
    for each in documents:
        chunk.append(each)
        characters += len(each[1])
        if len(chunk) == MAX_DOCUMENTS_PER_CHUNK or characters >= MAX_CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
