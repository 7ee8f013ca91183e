"""The blocks of a text on disk: cut once, memory-mapped by every later run and by every rank of a machine.

A folder holds the token ids of one text, and its name is the hash of everything that these depend on: change any of it
and it is other work. A folder that has its name is whole: it is written under another one and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from lit_rlhf.data.document_stream import TextSource, iter_token_chunks
from lit_rlhf.data.formats.registry import import_function
from lit_rlhf.data.prompt_template import bos_ids
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import RowStream, stream_rows
from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_of_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # raise it where the same text would now be cut otherwise
PLACE = "HF_DATASETS_CACHE"
REPORT = "report.json"  # what was counted, written last
PART = ".part"


class CacheEntry(NamedTuple):
    """What is known of a text that was cut."""

    tokens: list[int]  # of each part
    report: DatasetReport


def blocks_of(text: TextSource, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tensor], DatasetReport]:
    """The blocks of a text, from the cache or cut and put there; in memory where the cache cannot be written.

    The tokens behind a part's last whole block are left out and reported.

    Returns:
        Of each part (1, or 2 where documents are held out) its blocks (blocks, T) int32; and what was counted.

    Raises:
        UserError: The data cannot be read, or a part has fewer tokens than one block.
    """
    rows = stream_rows(text.path)
    name = re.sub(r"[^\w-]", "_", Path(text.path).name)[:60]
    entry = cache_folder() / f"{name}-{digest(text, rows, tokenizer)}"
    try:
        ids, report = from_cache(entry, text, rows, tokenizer)
    except (OSError, NotImplementedError) as problem:  # no place, no right to write, a full disk, no locks there
        sinks = [io.BytesIO() for _ in range(text.parts)]
        report = tokenize_to(text, rows, tokenizer, sinks).report
        ids = [torch.frombuffer(sink.getbuffer(), dtype=torch.int32) for sink in sinks]
        report.remark(
            f"blocks kept in memory, and cut again by the next run: {entry.parent} cannot be used ({problem}); "
            f"set the environment variable {PLACE} to a folder that can be written"
        )
    length = text.seq_len
    return [each[: len(each) // length * length].view(-1, length) for each in ids], report


def from_cache(
    entry: Path, text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tensor], DatasetReport]:
    """The ids of each part, memory-mapped, after they were put there where they were not."""
    kept, origin = read_entry(entry, text), "reused from"
    if kept is None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):  # the other ranks wait here for the first, and then find what it wrote
            kept = read_entry(entry, text)
            if kept is None:
                kept, origin = write_entry(entry, text, rows, tokenizer), "kept for later runs in"
    kept.report.remark(f"blocks {origin} {entry}")
    return [map_ids(entry / f"{part}.ids", count) for part, count in enumerate(kept.tokens)], kept.report


def cache_folder() -> Path:
    """Where blocks are kept: beside what `datasets` keeps."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(PLACE) or Path(HF_HOME) / "datasets").expanduser() / "lit_rlhf_blocks"


def tokenize_to(
    text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase, sinks: Sequence[IO[bytes]]
) -> CacheEntry:
    """Write the ids of each part into its sink, as int32 behind each other.

    Raises:
        UserError: As `blocks_of`.
    """
    report, tokens = DatasetReport(text.path), [0] * text.parts
    bar = tqdm(desc=f"tokenising {text.path}", unit="token", unit_scale=True, leave=False, disable=None)
    with bar:
        for part, ids in iter_token_chunks(text, rows, tokenizer, report):
            sinks[part].write(ids)
            tokens[part] += len(ids)
            bar.update(len(ids))
    for count in tokens:
        blocks, left_out = divmod(count, text.seq_len)
        if not blocks:
            raise UserError(
                f"{text.path!r} holds {count:,} tokens, fewer than one block; lower seq_len ({text.seq_len})"
            )
        report.remark(f"{count:,} tokens: {blocks:,} blocks of {text.seq_len}, {left_out} left out")
    return CacheEntry(tokens, report)


def write_entry(entry: Path, text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase) -> CacheEntry:
    """Cut a text into a new folder of the cache; needs its lock."""
    for left in [entry, *entry.parent.glob(f"{entry.name}.*{PART}")]:  # of a killed run, or damaged
        shutil.rmtree(left, ignore_errors=True)
    part = entry.with_name(f"{entry.name}.{uuid.uuid4().hex[:8]}{PART}")
    part.mkdir()
    try:
        with ExitStack() as opened:
            files = [opened.enter_context(open(part / f"{number}.ids", "wb")) for number in range(text.parts)]
            kept = tokenize_to(text, rows, tokenizer, files)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        state = {"tokens": kept.tokens, "report": kept.report.state()}
        (part / REPORT).write_text(json.dumps(state), encoding="utf-8")
        os.rename(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # where it was not renamed: a full disk must not stay full
    return kept


def read_entry(entry: Path, text: TextSource) -> CacheEntry | None:
    """What is known of a text in the cache; None where it is not there, or not whole."""
    try:
        state = json.loads((entry / REPORT).read_text(encoding="utf-8"))
        sizes = [(entry / f"{part}.ids").stat().st_size for part in range(text.parts)]
    except (FileNotFoundError, ValueError):
        return None
    whole = sizes == [4 * count for count in state["tokens"]]
    return CacheEntry(state["tokens"], DatasetReport.restored(text.path, state["report"])) if whole else None


def map_ids(file: Path, count: int) -> Tensor:
    """The ids in a file, (count,) int32, read from the disk where they are used."""
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.int32)


def digest(text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of all that the blocks of a text depend on."""
    permuted = text.shuffle_documents or text.validation_fraction
    parts: list[Any] = [VERSION, sys.byteorder, rows.identity, format_identity(text.format), text.seq_len]
    parts += [text.shuffle_documents, text.validation_fraction, text.seed if permuted else None]
    parts += tokenizer_identity(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def format_identity(format: str) -> list[str]:
    """A format's name; of a user's own function also the content of the file that it stands in."""
    if "." not in format:
        return [format]
    function = import_function(format, "format")
    modules = {format.rpartition(".")[0], getattr(function, "__module__", None) or ""}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
    return [format, hash_of_files(Path(file) for file in files if file)]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What tells a tokenizer from one that makes other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: what it saves is all that is known of it
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            rules: Any = hash_of_files(sorted(path for path in Path(folder).rglob("*") if path.is_file()))
    else:
        rules = json.loads(backend.to_str())
        for left_by_the_last_call in ("padding", "truncation"):
            rules.pop(left_by_the_last_call)
    return [
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "split_special_tokens", False),
        [*bos_ids(tokenizer), tokenizer.eos_token_id],
        rules,
    ]
