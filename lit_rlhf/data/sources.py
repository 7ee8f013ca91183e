"""Rows from files, from the Hugging Face hub and from memory, each with its origin for messages."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from lit_rlhf.errors import UserError
from lit_rlhf.paths import expand_path
from lit_rlhf.suggestions import did_you_mean

Fields = dict[str, Any]


class Row(NamedTuple):
    """One row of a dataset: its columns, and its file and line ("file.jsonl:12"), or its number ("rows[11]")."""

    fields: Fields
    origin: str


Rows = Sequence[Row]


class RowIterable(Protocol):
    """Rows in memory or streamed: dicts of columns, or strings, which become `{"text": string}`.

    A `datasets.Dataset` or `IterableDataset`, a list, a pandas `DataFrame`, any iterable. Data modules and callbacks
    read an iterator, such as a generator, into memory, because they read data more than once.
    """

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows."""
        ...


DataSource: TypeAlias = str | Path | RowIterable

_UNREADABLE = (OSError, EOFError, zlib.error)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


def read_rows(data: DataSource, split: str = "train") -> Rows:
    """Read the rows of a dataset, in order.

    Args:
        data: A local `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.txt` file, each also with `.gz`; or a dataset
            of the Hugging Face hub as `org/name` or `org/name:config`, each also with `@split` after it; or rows in
            memory, see `RowIterable`.
            A `.json` file is a list of rows, or an object with such a list under "data". A row that is a bare string
            becomes `{"text": string}`. A `.txt` file holds documents separated by blank lines, each a
            `{"text": document}`.
        split: The hub dataset's split, if `data` names none.

    Raises:
        UserError: The file is missing (the message names the nearest), does not parse (file and line), has an unknown
            extension, or holds no row; rows in memory are no rows (by their number).
    """
    rows = stream_rows(data, split).read()
    rows = rows if isinstance(rows, Sequence) else list(rows)
    if not rows:
        raise UserError(f"data {source_name(data)!r} is empty: it holds no row")
    return rows


@dataclass(frozen=True)
class RowStream:
    """The rows of a dataset, read again at each iteration, and a fingerprint of its content."""

    path: str
    read: Callable[[], Iterable[Row]]
    # of a file: path, size and modification time; of a hub dataset: its name and fingerprint; of rows in memory: their
    # content; None of a stream, whose content is known only when it was read
    fingerprint: tuple[Any, ...] | None

    def __iter__(self) -> Iterator[Row]:
        empty = True
        for row in self.read():
            empty = False
            yield row
        if empty:
            raise UserError(f"data {self.path!r} is empty: it holds no row")


def stream_rows(data: DataSource, split: str = "train") -> RowStream:
    """Open a dataset as a stream of rows: `.jsonl` and `.txt` files are read line by line, other files at once.

    Raises:
        UserError: As `read_rows`; an error within a file is raised when its line is reached.
    """
    if not isinstance(data, str | os.PathLike):
        return _stream_memory(data)
    path = os.fspath(data)
    suffix = _suffix(path)
    hub_name = _HUB_NAME.fullmatch(path)
    # "data/x" is a missing file if there is a folder "data", not a hub dataset of the organization "data"
    local = expand_path(path)
    if local.exists() or suffix in _READERS or hub_name is None or local.parent.is_dir():
        file = _existing_file(path)
        if suffix not in _READERS:
            raise UserError(f"data file {path!r} is of no known kind: {', '.join(_READERS)} (each also .gz) are read")
        state = file.stat()
        return RowStream(path, partial(_READERS[suffix], file), (str(file.resolve()), state.st_size, state.st_mtime_ns))
    table = _hub_rows(hub_name["name"], hub_name["config"], hub_name["split"] or split)
    return RowStream(path, lambda: table, (path, table.fingerprint))


def source_name(data: DataSource) -> str:
    """Return what messages and reports call a dataset: its path, or "rows" of what is in memory."""
    return os.fspath(data) if isinstance(data, str | os.PathLike) else "rows"


def source_key(data: DataSource) -> str:
    """Return what distinguishes a dataset from others: its path, or a hash of the rows in memory."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    fingerprint = stream_rows(data).fingerprint
    return "rows" if fingerprint is None else f"rows {fingerprint[-1]}"


def held_rows(data: DataSource) -> DataSource:
    """Return a dataset that can be read again and again: of an iterator, such as a generator, a list."""
    return list(data) if isinstance(data, Iterator) else data


def _stream_memory(data: Any) -> RowStream:
    """Open rows that are in memory, or an iterable that streams them."""
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")  # objects of theirs come after an import
    if datasets is not None and isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError(f"data: a {type(data).__name__} holds the splits {', '.join(data)}; give one of them")
    if isinstance(data, Mapping | bytes) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise UserError(
            f"data: a {type(data).__name__} is no dataset; give a path, a hub name, a datasets.Dataset, a DataFrame, "
            "or an iterable of rows (dicts or strings)"
        )
    if datasets is not None and isinstance(data, datasets.Dataset):
        table = _TableRows(data.with_format(None), "rows", in_memory=True)
        return RowStream("rows", lambda: table, ("rows", table.fingerprint))
    if pandas is not None and isinstance(data, pandas.DataFrame):
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    if isinstance(data, Sequence):
        rows = [_memory_row(value, n) for n, value in enumerate(data)]
        content = hashlib.sha256()
        for row in rows:
            content.update(json.dumps(row.fields, default=repr).encode())
        return RowStream("rows", lambda: rows, ("rows", content.hexdigest()))
    return RowStream("rows", lambda: (_memory_row(value, n) for n, value in enumerate(data)), None)


def _memory_row(value: Any, number: int) -> Row:
    """Return a row of memory; its columns are a copy, so that the caller's stay as they are."""
    return _as_row(_as_plain(value), f"rows[{number}]")


def _as_plain(value: Any) -> Any:
    """Return a value with dicts, lists and Python's numbers in place of mappings, NumPy's arrays and scalars.

    A DataFrame read from Parquet holds arrays where the file holds lists. Names of columns become text.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _as_plain(value.tolist()) if isinstance(value, numpy.ndarray) else value.item()
    if isinstance(value, Mapping):
        return {str(name): _as_plain(each) for name, each in value.items()}
    return [_as_plain(each) for each in value] if isinstance(value, list) else value


def read_text(path: str) -> str:
    """Read the text of a local file, also of one that ends in `.gz`.

    Raises:
        UserError: The file is missing (the message names the nearest), cannot be read, or is not UTF-8.
    """
    return _read_text(_existing_file(path))


def read_json(path: str) -> Any:
    """Parse a local file that is one JSON document, also one that ends in `.gz`.

    Raises:
        UserError: As `read_text`, or the document does not parse.
    """
    file = _existing_file(path)
    document = _parse_document(file)
    check_value(document, file.name)
    return document


def read_stdin() -> Iterator[tuple[str, str]]:
    """Yield the lines of standard input as those of a text file, each with its origin ("stdin:3").

    Raises:
        UserError: A line is not UTF-8 text.
    """
    # a replaced stdin, such as io.StringIO, may have no bytes below it
    return decode_lines(getattr(sys.stdin, "buffer", sys.stdin), "stdin")


def _suffix(path: str) -> str:
    """Return a file's extension without ".gz": ".jsonl" for "a.jsonl" and "a.jsonl.gz"."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def _existing_file(path: str) -> Path:
    file = expand_path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise UserError(f"data path {path!r} is a folder: name one file in it{_list_data_files(file)}")
    folder = file.parent
    if not folder.is_dir():
        while not folder.is_dir():
            folder = folder.parent
        raise UserError(f"no data file {path!r}: its folder does not exist; the nearest that does is {str(folder)!r}")
    hint = did_you_mean(file.name, [each.name for each in folder.iterdir()])
    raise UserError(f"no data file {path!r}" + (hint or f"; {str(folder)!r} holds no similar name"))


def _list_data_files(folder: Path) -> str:
    names = sorted(each.name for each in folder.iterdir() if _suffix(each.name) in _READERS)
    return f" ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else " (it holds no data file)"


def _read_bytes(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except _UNREADABLE as error:
        raise UserError(f"data file {str(file)!r} cannot be read: {error}") from error


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file.name}:{line}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file without their line ends, each with its origin; one at a time is in memory."""
    try:
        # bytes: text mode would also end lines at a lone \r, and give no line number for bytes that are not UTF-8
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            yield from decode_lines(content, file.name)
    except _UNREADABLE as error:
        raise UserError(f"data file {str(file)!r} cannot be read: {error}") from error


def decode_lines(lines: Iterable[bytes | str], name: str) -> Iterator[tuple[str, str]]:
    """Yield lines as text without a byte order mark and their line ends, each with its origin ("name:3").

    Raises:
        UserError: A line is not UTF-8 text.
    """
    for number, line in enumerate(lines, start=1):
        origin = f"{name}:{number}"
        try:
            text = line if isinstance(line, str) else line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{origin}: not UTF-8 text ({error.reason}); convert it to UTF-8") from error
        text = text.removeprefix("\ufeff") if number == 1 else text
        yield text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text, origin


class _RepeatedKey(str):
    """In place of a JSON object: a key that it gives twice."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> Any:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    return _RepeatedKey(next(name for name in names if names.count(name) > 1))


def _loads(text: str, name: str) -> Any:
    """Parse JSON that is still to be checked by `check_value`; raises JSONDecodeError where it does not parse."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of brackets
        raise UserError(f"{name}: this JSON cannot be read: {_one_line(error)}") from error


def check_value(value: Any, origin: str) -> None:
    """Refuse what no tokenizer or file can hold, wherever it is in the columns of a row.

    Raises:
        UserError: A text holds half of a surrogate pair, or a JSON object gives a key twice.
    """
    if isinstance(value, _RepeatedKey):
        raise UserError(f"{origin}: the key {str(value)!r} is given twice in one JSON object; keep one of them")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise UserError(
                f"{origin}: a text holds {half}, half of a surrogate pair, which is no character; remove it or replace "
                "it by \\ufffd"
            ) from error
    elif isinstance(value, dict):
        for each in chain.from_iterable(value.items()):
            check_value(each, origin)
    elif isinstance(value, list | tuple):
        for each in value:
            check_value(each, origin)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Turn whatever a library raises that decodes other people's bytes into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {_one_line(error)}") from error


def _as_row(value: Any, origin: str) -> Row:
    check_value(value, origin)
    if isinstance(value, str):
        return Row({"text": value}, origin)
    if isinstance(value, dict):
        return Row(value, origin)
    raise UserError(f"{origin}: a row must be a JSON object or a string, this one is a {type(value).__name__}")


def _jsonl_rows(file: Path) -> Iterator[Row]:
    return parse_json_lines(_lines(file))


def parse_json_lines(lines: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """Parse lines with their origins, each a row as a JSON object or string; blank lines are skipped.

    Raises:
        UserError: A line is neither, or `check_value` refuses it.
    """
    return (_jsonl_row(line, origin) for line, origin in lines if line.strip())


def _jsonl_row(line: str, origin: str) -> Row:
    try:
        return _as_row(_loads(line, origin), origin)
    except json.JSONDecodeError as error:
        raise UserError(f"{origin}: this line does not parse as JSON: {error.msg} (column {error.colno})") from error


def _parse_document(file: Path) -> Any:
    try:
        return _loads(_read_text(file), file.name)
    except json.JSONDecodeError as error:
        raise UserError(f"{file.name}:{error.lineno}: does not parse as JSON: {error.msg}") from error


def _json_rows(file: Path) -> Iterable[Row]:
    try:
        document = _parse_document(file)
    except UserError as error:
        if isinstance(error.__cause__, json.JSONDecodeError) and error.__cause__.msg == "Extra data":
            return _jsonl_rows(file)  # several documents: JSON lines under the name .json
        raise
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        raise UserError(f'{file.name}: a JSON document must be a list of rows, or an object with one under "data"')
    return [_as_row(value, f"{file.name} row {n}") for n, value in enumerate(document, start=1)]


def _tsv_rows(file: Path) -> list[Row]:
    # quotation marks are literal in .tsv files: no cell holds a tab or line end that would need quoting
    return _csv_rows(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv_rows(file: Path, **dialect: Any) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True, **dialect)
    rows: list[Row] = []
    try:
        names = next(filter(None, reader), [])
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise UserError(
                f"{file.name}:{reader.line_num}: the head line names {repeated!r} twice; rename one of them"
            )
        line = reader.line_num + 1
        for cells in reader:
            origin = f"{file.name}:{line}"
            line = reader.line_num + 1
            if not cells:  # a blank line
                continue
            if len(cells) != len(names):
                raise UserError(f"{origin}: {len(cells)} columns where the head line names {len(names)}")
            rows.append(Row(dict(zip(names, cells)), origin))
    except csv.Error as error:
        raise UserError(f"{file.name}:{reader.line_num}: does not parse as CSV: {error}") from error
    return rows


def _text_rows(file: Path) -> Iterator[Row]:
    document: list[str] = []
    start = ""
    for line, origin in chain(_lines(file), [("", "")]):
        if line.strip():
            start = start if document else origin
            document.append(line)
        elif document:
            yield Row({"text": "\n".join(document)}, start)
            document = []


class _TableRows(Sequence[Row]):
    """A `datasets` table as rows, read one at a time."""

    def __init__(self, table: Any, name: str, in_memory: bool = False) -> None:
        self._table = table
        self._name = name
        self._in_memory = in_memory

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `datasets` computes of this content."""
        return str(self._table._fingerprint)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._decode(index, lambda: self._table[index])

    def __iter__(self) -> Iterator[Row]:
        rows = iter(self._table)
        for index in range(len(self)):
            yield self._decode(index, lambda: next(rows))

    def _decode(self, index: int, read: Callable[[], dict[str, Any]]) -> Row:
        """Read a row: its cells are decoded only now."""
        origin = f"{self._name}[{index}]" if self._in_memory else f"{self._name} row {index + 1}"
        with _decoding(f"{origin}: cannot be read"):
            return Row(dict(read()), origin)


def _parquet_rows(file: Path) -> Rows:
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    content = io.BytesIO(_read_bytes(file))
    with _decoding(f"{file.name}: does not parse as Parquet"):
        table = pyarrow.parquet.ParquetFile(content, page_checksum_verification=True).read()
        return _TableRows(datasets.Dataset(table), file.name)


def _hub_rows(name: str, config: str | None, split: str) -> _TableRows:
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # not found, no such config or split, no network, damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"dataset {name!r} (config {config or 'default'}, split {split}) cannot be loaded from the hub: {reason}; "
            f"a local file needs its path and ending (.jsonl, .json, .csv, .tsv, .parquet, .txt)"
        ) from error
    return _TableRows(table, name)


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
