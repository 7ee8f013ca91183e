"""From documents to one stream of token ids, of which a bounded part is in memory at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from lit_rlhf.data.formats.registry import stream_records
from lit_rlhf.data.loader import epoch_order
from lit_rlhf.data.preprocessing.keys import hashed
from lit_rlhf.data.preprocessing.splits import hold_out_hashes
from lit_rlhf.data.prompt_template import bos_ids, encode_texts
from lit_rlhf.data.records import TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what is tokenised at once, whichever is reached first
DOCUMENTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 500_000

TRAINING, HELD_OUT = 0, 1  # the parts of a text


class TextSource(NamedTuple):
    """A text, and all that decides, with the tokenizer, what its blocks are."""

    path: str
    seq_len: int  # tokens a block, T
    format: str = "auto"
    shuffle_documents: bool = False  # whether documents are joined in a permuted order; they are then all in memory
    validation_fraction: float = 0.0  # share of the distinct documents in the part held out
    seed: int = 0  # keys that order and that part

    @property
    def parts(self) -> int:
        """1, or 2 where documents are held out."""
        return 2 if self.validation_fraction else 1


def iter_token_chunks(
    text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase, report: DatasetReport
) -> Iterator[tuple[int, array[int]]]:
    """Documents joined, each with EOS behind it (and BOS before it, where the tokenizer has one).

    Args:
        text: What is joined, and how.
        rows: Its rows.
        tokenizer: The model's tokenizer.
        report: Counts the rows; complete behind the last piece.

    Yields:
        A part (`TRAINING` or `HELD_OUT`) and the ids of its next documents, int32.

    Raises:
        UserError: A row cannot be read, no document is left, or none is on one side of `validation_fraction`.
    """
    leading, eos = bos_ids(tokenizer), tokenizer.eos_token_id
    for dealt in chunks(assign_split(text, rows, report)):
        pieces = [array("i") for _ in range(text.parts)]
        for (part, _), ids in zip(dealt, encode_texts(tokenizer, [document for _, document in dealt])):
            pieces[part].extend([*leading, *ids, eos])
        yield from enumerate(pieces)


def assign_split(text: TextSource, rows: RowStream, report: DatasetReport) -> Iterator[tuple[int, str]]:
    """Each document with its part; those of a part are in the order in which they are joined."""
    held_out: set[bytes] = set()
    if text.validation_fraction:  # decided on hashes, in a pass of its own
        uncounted = DatasetReport(text.path)
        hashes = (hashed(each.text, text.seed) for each in documents(text, rows, uncounted))
        held_out = hold_out_hashes(hashes, text.validation_fraction, text.path)

    def part_of(document: str) -> int:
        return HELD_OUT if held_out and hashed(document, text.seed) in held_out else TRAINING

    dealt = ((part_of(each.text), each.text) for each in documents(text, rows, report))
    if not text.shuffle_documents:
        yield from dealt
        return
    whole = list(dealt)
    for part in range(text.parts):
        own = [each for each in whole if each[0] == part]
        yield from (own[place] for place in epoch_order(len(own), text.seed, epoch=0))


def documents(text: TextSource, rows: RowStream, report: DatasetReport) -> Iterator[TextRow]:
    """The documents in file order."""
    return stream_records(rows, "text", TextRow, text.format, report)


def chunks(dealt: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The documents in lists of as many as are tokenised at once."""
    chunk, characters = [], 0
    for each in dealt:
        chunk.append(each)
        characters += len(each[1])
        if len(chunk) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
