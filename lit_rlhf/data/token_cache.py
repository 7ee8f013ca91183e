"""The blocks of a text on disk: tokenized once, memory-mapped by every later run and by every rank of a machine.

A folder holds the token ids of one text, and its name contains a hash of everything that these depend on. A folder
under its final name is complete: it is written under a temporary name, and renamed at the end.
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
from lit_rlhf.data.prompt_template import find_bos_ids
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import RowStream, source_name, stream_rows
from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_files
from lit_rlhf.importing import import_function
from lit_rlhf.paths import PART

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # increase it if the same text would now be tokenized or split differently
CACHE_VARIABLE = "HF_DATASETS_CACHE"
REPORT_FILE = "report.json"  # the counts, written last


class CacheEntry(NamedTuple):
    """What is stored with the token ids of a text."""

    num_tokens: list[int]  # per split
    report: DatasetReport


def load_blocks(text: TextSource, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tensor], DatasetReport]:
    """Return the blocks of a text from the cache, tokenizing it first if needed; in memory if the cache is unwritable.

    The tokens after a split's last complete block are left out and reported.

    Returns:
        For each split (1, or 2 if documents are held out) its blocks (num_blocks, T) int32; and the counts of rows.

    Raises:
        UserError: The data cannot be read, or a split has fewer tokens than one block.
    """
    rows, folder = stream_rows(text.path), get_cache_folder()
    if rows.fingerprint is None or not isinstance(text.format, str):
        why = "neither a stream nor a function has a fingerprint to find them again by"
        ids, report = tokenize_in_memory(text, rows, tokenizer, why)
    else:
        name = re.sub(r"[^\w-]", "_", Path(source_name(text.path)).name)[:60]
        entry = folder / f"{name}-{compute_cache_key(text, rows, tokenizer)}"
        try:
            ids, report = load_or_write_entry(entry, text, rows, tokenizer)
        except (OSError, NotImplementedError) as problem:  # no folder, no permission, a full disk, no locks on the disk
            why = (
                f"{folder} cannot be used ({problem}); set the environment variable {CACHE_VARIABLE} to a folder that "
                "can be written"
            )
            ids, report = tokenize_in_memory(text, rows, tokenizer, why)
    length = text.seq_len
    return [each[: len(each) // length * length].view(-1, length) for each in ids], report


def tokenize_in_memory(
    text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase, why: str
) -> tuple[list[Tensor], DatasetReport]:
    """Return the ids of each split, which are not kept for other runs; `why` is a line of the report."""
    sinks = [io.BytesIO() for _ in range(text.num_splits)]
    report = tokenize_to(text, rows, tokenizer, sinks).report
    report.add_line(f"blocks kept in memory, and cut again by the next run: {why}")
    return [torch.frombuffer(sink.getbuffer(), dtype=torch.int32) for sink in sinks], report


def load_or_write_entry(
    entry: Path, text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tensor], DatasetReport]:
    """Return the ids of each split, memory-mapped; tokenize the text first if it is not in the cache."""
    cached, origin = read_entry(entry, text), "reused from"
    if cached is None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):  # the other ranks wait here for the first, and then read what it wrote
            cached = read_entry(entry, text)
            if cached is None:
                cached, origin = write_entry(entry, text, rows, tokenizer), "kept for later runs in"
    cached.report.add_line(f"blocks {origin} {entry}", is_detail=True)
    return [map_ids(entry / f"{split}.ids", count) for split, count in enumerate(cached.num_tokens)], cached.report


def get_cache_folder() -> Path:
    """Return the folder of all cached blocks, inside the cache of `datasets`."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(CACHE_VARIABLE) or Path(HF_HOME) / "datasets").expanduser() / "lit_rlhf_blocks"


def tokenize_to(
    text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase, sinks: Sequence[IO[bytes]]
) -> CacheEntry:
    """Write the concatenated ids of each split into its sink, as int32.

    Raises:
        UserError: As `load_blocks`.
    """
    name = source_name(text.path)
    report, num_tokens = DatasetReport(name), [0] * text.num_splits
    bar = tqdm(desc=f"tokenizing {name}", unit="token", unit_scale=True, leave=False, disable=None)
    with bar:
        for split, ids in iter_token_chunks(text, rows, tokenizer, report):
            sinks[split].write(ids)
            num_tokens[split] += len(ids)
            bar.update(len(ids))
    for count in num_tokens:
        num_blocks, remainder = divmod(count, text.seq_len)
        if not num_blocks:
            raise UserError(f"{name!r} holds {count:,} tokens, fewer than one block; lower seq_len ({text.seq_len})")
        report.add_line(f"{count:,} tokens: {num_blocks:,} blocks of {text.seq_len}, {remainder} left out")
    return CacheEntry(num_tokens, report)


def write_entry(entry: Path, text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase) -> CacheEntry:
    """Tokenize a text into a new folder of the cache; call it under the entry's lock."""
    for stale in [entry, *entry.parent.glob(f"{entry.name}.*{PART}")]:  # of a killed run, or damaged
        shutil.rmtree(stale, ignore_errors=True)
    partial = entry.with_name(f"{entry.name}.{uuid.uuid4().hex[:8]}{PART}")
    partial.mkdir()
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(partial / f"{split}.ids", "wb")) for split in range(text.num_splits)]
            written = tokenize_to(text, rows, tokenizer, files)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        state = {"tokens": written.num_tokens, "report": written.report.state_dict()}
        (partial / REPORT_FILE).write_text(json.dumps(state), encoding="utf-8")
        os.rename(partial, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # if it was not renamed: leave no partial data on a full disk
    return written


def read_entry(entry: Path, text: TextSource) -> CacheEntry | None:
    """Return what is stored with a text's token ids; None if the text is not in the cache, or its entry is damaged."""
    try:
        state = json.loads((entry / REPORT_FILE).read_text(encoding="utf-8"))
        sizes = [(entry / f"{split}.ids").stat().st_size for split in range(text.num_splits)]
    except (FileNotFoundError, ValueError):
        return None
    if sizes != [4 * count for count in state["tokens"]]:
        return None
    return CacheEntry(state["tokens"], DatasetReport.from_state_dict(source_name(text.path), state["report"]))


def map_ids(file: Path, count: int) -> Tensor:
    """Memory-map the ids in a file, (count,) int32."""
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.int32)


def compute_cache_key(text: TextSource, rows: RowStream, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short hash of everything that the blocks of a text depend on."""
    permuted = text.shuffle_documents or text.validation_fraction
    assert isinstance(text.format, str) and rows.fingerprint is not None
    parts: list[Any] = [VERSION, sys.byteorder, rows.fingerprint, format_fingerprint(text.format), text.seq_len]
    parts += [text.shuffle_documents, text.validation_fraction, text.seed if permuted else None]
    parts += tokenizer_fingerprint(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def format_fingerprint(format: str) -> list[str]:
    """Return a format's name; for a user's own function, also a hash of the file that defines it."""
    if "." not in format:
        return [format]
    function = import_function(format, "format")
    modules = {format.rpartition(".")[0], getattr(function, "__module__", None) or ""}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
    return [format, hash_files(Path(file) for file in files if file)]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return everything that decides a tokenizer's ids, as JSON takes it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python: compare the files that it saves
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            rules: Any = hash_files(sorted(path for path in Path(folder).rglob("*") if path.is_file()))
    else:
        rules = json.loads(backend.to_str())
        for setting_of_last_call in ("padding", "truncation"):
            rules.pop(setting_of_last_call)
    return [
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "split_special_tokens", False),
        [*find_bos_ids(tokenizer), tokenizer.eos_token_id],
        rules,
    ]
