"""Rows in memory and streams: the same records, checks, report and fingerprints as files, and rows named by number."""

import re
from collections import UserDict, deque
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy
import pandas
import pytest
import torch

from lit_rlhf.data import (
    ComparisonDataModule,
    DemonstrationDataModule,
    Preprocessing,
    PretrainingDataModule,
    PromptDataModule,
    load_text_blocks,
)
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows, source_key, source_name, stream_rows
from lit_rlhf.errors import UserError
from tests.helpers.small_runs import demonstrations, write_rows

Attach = Callable[[Any], Any]  # sets up a data module under a trainer
ROWS = demonstrations(20)


class MapStyle:
    """A dataset as PyTorch's: length and items, no iterator."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index]  # raises IndexError at the end


FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "deque": lambda: deque(ROWS),
    "mappings": lambda: [MappingProxyType(row) for row in ROWS],
    "user dicts": lambda: [UserDict(row) for row in ROWS],
    "generator": lambda: (row for row in ROWS),
    "map": lambda: map(dict, ROWS),
    "map style": MapStyle,
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "Dataset as tensors": lambda: datasets.Dataset.from_list(ROWS).with_format("torch"),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "DataFrame": lambda: pandas.DataFrame(ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_rows_of_the_file(form: str, tmp_path: Path) -> None:
    expected = read_rows(write_rows(tmp_path / "rows.jsonl", ROWS))
    rows = read_rows(FORMS[form]())
    assert [row.fields for row in rows] == [row.fields for row in expected]
    assert [row.origin for row in rows] == [f"rows[{n}]" for n in range(len(ROWS))]


def counts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of the printed report, without the name of the data and the origins of rows."""
    (table,) = [message for message in caplog.messages if "rows kept" in message]
    return [re.sub(r" +first: .*", "", line) for line in table.splitlines()[1:]]


@pytest.mark.parametrize("form", FORMS)
def test_a_data_module_reads_the_same_of_memory_and_of_a_file(
    form: str, tmp_path: Path, attach: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings: dict[str, Any] = {"validation_fraction": 0.3, "max_completion_length": 2}
    from_file = attach(DemonstrationDataModule(path, **settings))
    table = counts(caplog)
    caplog.clear()
    from_memory = attach(DemonstrationDataModule(FORMS[form](), **settings))
    assert from_memory.training_rows == from_file.training_rows
    assert from_memory.validation_rows == from_file.validation_rows
    assert counts(caplog) == table and len(table) > 3


def test_validation_rows_and_strings(attach: Attach) -> None:
    data = attach(PromptDataModule(["w1 w2", "w3"], validation_path=[{"prompt": "w4"}]))
    assert [each.row["prompt"] for each in data.prompts.prompts] == ["w1 w2", "w3"]
    assert [each.row["prompt"] for each in data.validation_prompts.prompts] == ["w4"]


def test_the_callers_rows_stay_as_they_are(attach: Attach) -> None:
    rows = [{"instruction": "w1", "output": "w2"}, {"instruction": "w3", "output": "w4"}]
    before = [dict(row) for row in rows]
    data = attach(PromptDataModule(rows))
    data.prompts.prompts[0].row["instruction"] = "changed"
    assert rows == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data 'rows' is empty: it holds no row"),
        ((row for row in ()), "data 'rows' is empty"),
        ([*ROWS[:17], {"prompt": "w1"}], r"rows\[17\]: .*completion"),
        ([*ROWS[:17], {"prompt": "w1", "completion": 3}], r"rows\[17\]: .*completion.* int"),
        ([*ROWS[:3], 5], r"rows\[3\]: a row must be .* this one is a int"),
        ([*ROWS[:3], [1, 2]], r"rows\[3\]: a row must be .* this one is a list"),
        ([{"prompt": "\ud800", "completion": "w1"}], r"rows\[0\]: a text holds .*surrogate"),
        ({"prompt": "w1"}, "data: a dict is no dataset"),
        (3, "data: a int is no dataset"),
        (b"w1", "data: a bytes is no dataset"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "DatasetDict holds the splits train; give one"),
        (pandas.DataFrame({"a": ["w1"]}), r"rows\[0\]: the columns 'a' are of no known demonstration format"),
        (pandas.DataFrame({"prompt": ["w1", None], "completion": "w2"}), r"rows\[1\]: .*prompt"),
    ],
)
def test_wrong_rows_are_named_by_their_number(rows: Any, message: str, attach: Attach) -> None:
    with pytest.raises(UserError, match=message):
        attach(DemonstrationDataModule(rows))


def test_functions_are_given_as_functions(attach: Attach) -> None:
    def swapped(row: dict[str, Any]) -> dict[str, Any] | None:
        return {"prompt": row["q"], "completion": row["a"]} if row["a"] else None

    rows = [{"q": "w1", "a": "w2"}, {"q": "w3", "a": ""}, {"q": "w4 w5", "a": "w6"}]
    without = Preprocessing(pii=lambda text: ["NUMBER"] if "w4" in text else [])
    data = attach(PromptDataModule(rows, format=swapped, preprocessing=without))
    assert [each.row["prompt"] for each in data.prompts.prompts] == ["w1"]
    with pytest.raises(UserError, match=r"rows\[0\]: .*<lambda> failed with KeyError: 'x'"):
        attach(ComparisonDataModule(rows, format=lambda row: row["x"]))
    with pytest.raises(UserError, match="format: a int is no function"):
        attach(ComparisonDataModule(rows, format=3))  # type: ignore[arg-type]


TEXTS = [{"text": f"w{n} w{n + 1} w2"} for n in range(20)]


@pytest.mark.parametrize("form", ["strings", "Dataset", "IterableDataset", "generator"])
def test_pretraining_text_in_memory_and_streamed(form: str, tmp_path: Path, tokenizer: Any) -> None:
    forms: dict[str, Callable[[], Any]] = {
        "strings": lambda: [row["text"] for row in TEXTS],
        "Dataset": lambda: datasets.Dataset.from_list(TEXTS),
        "IterableDataset": lambda: datasets.Dataset.from_list(TEXTS).to_iterable_dataset(),
        "generator": lambda: iter(TEXTS),
    }
    expected = load_text_blocks(write_rows(tmp_path / "t.jsonl", TEXTS), tokenizer, 8).blocks
    for _ in range(2):  # the second is of the cache, if there is a fingerprint
        assert torch.equal(load_text_blocks(forms[form](), tokenizer, 8).blocks, expected)


def test_blocks_of_other_rows_are_not_reused(tokenizer: Any, attach: Attach) -> None:
    one = load_text_blocks([row["text"] for row in TEXTS], tokenizer, 8).blocks
    other = load_text_blocks([row["text"].replace("w2", "w3") for row in TEXTS], tokenizer, 8).blocks
    assert not torch.equal(one, other)
    factors = iter(("w1 ", "w2 "))
    blocks = [
        load_text_blocks(TEXTS, tokenizer, 8, format=lambda row, word=word: {"text": word * 8}).blocks
        for word in factors  # functions of one name and source
    ]
    assert not torch.equal(blocks[0], blocks[1])
    data = PretrainingDataModule((row for row in TEXTS), validation_fraction=0.3, seq_len=4)
    assert len(attach(data).validation_rows) > 0  # read twice


def test_names_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    assert source_name(path) == source_key(path) == str(path)
    assert [row.fields for row in read_rows(path)] == ROWS
    assert source_name(ROWS) == "rows"
    assert source_key(ROWS) == source_key(tuple(ROWS)) != source_key(ROWS[:-1])
    assert stream_rows(datasets.Dataset.from_list(ROWS)).fingerprint is not None
    assert stream_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset()).fingerprint is None


def test_arrays_and_numbers_of_numpy_are_lists_and_numbers(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "q"}
    row = {"messages": [turn, {"role": "assistant", "content": "a"}], "labels": [1.5], "n": 3}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert not isinstance(frame["messages"][0], list)
    given = [{"messages": row["messages"], "labels": numpy.array([1.5]), "n": numpy.int64(3)}]
    for rows in (frame, given):
        assert read_rows(rows)[0].fields == row
        (record,), report = read_demonstrations(rows)
        assert record.prompt == [turn] and report.flagged == {"column 'labels' is not read by the format": 1}


def test_names_of_columns_that_are_numbers_are_text() -> None:
    (record,), _ = read_demonstrations([{"prompt": "q", "completion": "a", 0: "b"}])
    assert record.fields == {"prompt": "q", "completion": "a", "0": "b"}


def read_demonstrations(rows: Any) -> tuple[list[Demonstration], DatasetReport]:
    report = DatasetReport("rows")
    return read_records(read_rows(rows), "demonstration", Demonstration, "auto", report), report
