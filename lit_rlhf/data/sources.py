"""Rows from files and from the Hugging Face hub, each with its origin for messages."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

Fields = dict[str, Any]


class Row(NamedTuple):
    """One row of a dataset: its columns, and its file and line ("file.jsonl:12")."""

    fields: Fields
    origin: str


Rows = Sequence[Row]

_UNREADABLE = (OSError, EOFError, zlib.error)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")


def read_rows(path: str, split: str = "train") -> Rows:
    """Read the rows of a dataset, in file order.

    Args:
        path: A local `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.txt` file, each also with `.gz`; or a dataset
            of the Hugging Face hub as `org/name` or `org/name:config`, each also with `@split` after it.
            A `.json` file is a list of rows, or an object with such a list under "data". A row that is a bare string
            becomes `{"text": string}`. A `.txt` file holds documents separated by blank lines, each a
            `{"text": document}`.
        split: The hub dataset's split, if `path` names none.

    Raises:
        UserError: The file is missing (the message names the nearest), does not parse (file and line), has an unknown
            extension, or holds no row.
    """
    rows = stream_rows(path, split).read()
    rows = rows if isinstance(rows, Sequence) else list(rows)
    if not rows:
        raise UserError(f"data {path!r} is empty: it holds no row")
    return rows


@dataclass(frozen=True)
class RowStream:
    """The rows of a dataset, read again at each iteration, and a fingerprint of its content."""

    path: str
    read: Callable[[], Iterable[Row]]
    fingerprint: tuple[
        Any, ...
    ]  # of a file: path, size and modification time; of a hub dataset: its name and fingerprint

    def __iter__(self) -> Iterator[Row]:
        empty = True
        for row in self.read():
            empty = False
            yield row
        if empty:
            raise UserError(f"data {self.path!r} is empty: it holds no row")


def stream_rows(path: str, split: str = "train") -> RowStream:
    """Open a dataset as a stream of rows: `.jsonl` and `.txt` files are read line by line, other files at once.

    Raises:
        UserError: As `read_rows`; an error within a file is raised when its line is reached.
    """
    suffix = _suffix(path)
    hub_name = _HUB_NAME.fullmatch(path)
    # "data/x" is a missing file if there is a folder "data", not a hub dataset of the organization "data"
    local = Path(path).expanduser()
    if local.exists() or suffix in _READERS or hub_name is None or local.parent.is_dir():
        file = _existing_file(path)
        if suffix not in _READERS:
            raise UserError(f"data file {path!r} is of no known kind: {', '.join(_READERS)} (each also .gz) are read")
        state = file.stat()
        return RowStream(path, partial(_READERS[suffix], file), (str(file.resolve()), state.st_size, state.st_mtime_ns))
    table = _hub_rows(hub_name["name"], hub_name["config"], hub_name["split"] or split)
    return RowStream(path, lambda: table, (path, table.fingerprint))


def read_text(path: str) -> str:
    """Read the text of a local file, also of one that ends in `.gz`.

    Raises:
        UserError: The file is missing (the message names the nearest), cannot be read, or is not UTF-8.
    """
    return _read_text(_existing_file(path))


def _suffix(path: str) -> str:
    """Return a file's extension without ".gz": ".jsonl" for "a.jsonl" and "a.jsonl.gz"."""
    return Path(path.removesuffix(".gz")).suffix.lower()


def _existing_file(path: str) -> Path:
    file = Path(path).expanduser()
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
    origin = file.name
    try:
        # bytes: text mode would also end lines at a lone \r, and give no line number for bytes that are not UTF-8
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            for number, line in enumerate(content, start=1):
                origin = f"{file.name}:{number}"
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\r\n").removesuffix("\n"), origin
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    except _UNREADABLE as error:
        raise UserError(f"data file {str(file)!r} cannot be read: {error}") from error


def _as_row(value: Any, origin: str) -> Row:
    if isinstance(value, str):
        return Row({"text": value}, origin)
    if isinstance(value, dict):
        return Row(value, origin)
    raise UserError(f"{origin}: a row must be a JSON object or a string, this one is a {type(value).__name__}")


def _jsonl_rows(file: Path) -> Iterator[Row]:
    return (_jsonl_row(line, origin) for line, origin in _lines(file) if line.strip())


def _jsonl_row(line: str, origin: str) -> Row:
    try:
        return _as_row(json.loads(line), origin)
    except json.JSONDecodeError as error:
        raise UserError(f"{origin}: this line does not parse as JSON: {error.msg} (column {error.colno})") from error


def _json_rows(file: Path) -> Iterable[Row]:
    try:
        document = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several documents: JSON lines under the name .json
            return _jsonl_rows(file)
        raise UserError(f"{file.name}:{error.lineno}: does not parse as JSON: {error.msg}") from error
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
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True, **dialect)
    rows: list[Row] = []
    try:
        names = reader.fieldnames or []
        line = reader.line_num + 1
        for fields in reader:
            origin = f"{file.name}:{line}"
            # DictReader puts surplus cells under the key None; "" is a valid column name
            num_cells = sum(value is not None for name, value in fields.items() if name is not None)
            num_cells += len(fields.get(None) or ())
            if num_cells != len(names):
                raise UserError(f"{origin}: {num_cells} columns where the head line names {len(names)}")
            rows.append(Row(dict(fields), origin))
            line = reader.line_num + 1
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

    def __init__(self, table: Any, name: str) -> None:
        self._table = table
        self._name = name

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
        return Row(dict(self._table[index]), f"{self._name} row {index + 1}")

    def __iter__(self) -> Iterator[Row]:
        for number, fields in enumerate(self._table, start=1):
            yield Row(dict(fields), f"{self._name} row {number}")


def _parquet_rows(file: Path) -> Rows:
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(_read_bytes(file)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.name}: does not parse as Parquet: {error}") from error
    return _TableRows(datasets.Dataset(table), file.name)


def _hub_rows(name: str, config: str | None, split: str) -> _TableRows:
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # not found, no such config or split, no network
        reason = str(error).strip().split("\n")[0]
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
