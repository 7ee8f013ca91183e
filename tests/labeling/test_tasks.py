"""Which rows become which tasks, and which are refused with file and row."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import Kind
from lit_rlhf.labeling.tasks import read_tasks
from tests.helpers.small_runs import write_rows

FOUR = ["one", "two", "three", "four"]


def read(path: Path, rows: list[dict[str, Any]], **settings: Any):
    return read_tasks(write_rows(path / "tasks.jsonl", rows), **settings)


@pytest.mark.parametrize(
    ("row", "kind", "completions", "fields"),
    [
        ({"prompt": "p", "task": "t"}, "demonstrate", [], {"prompt": "p", "task": "t"}),
        ({"instruction": "do", "input": "x"}, "demonstrate", [], {"instruction": "do", "input": "x"}),
        ({"prompt": "p", "completions": FOUR}, "rank", FOUR, {"prompt": "p"}),
        ({"prompt": "p", "completions": FOUR, "ranks": [0, 1, 2, 3], "labeler": "x"}, "rank", FOUR, {"prompt": "p"}),
        ({"prompt": "p", "completions": FOUR[:2]}, "compare", FOUR[:2], {"prompt": "p"}),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "compare", ["a", "b"], {"prompt": "p"}),
        (
            {"prompt": "p", "first": "a", "second": "b", "preference": None, "labeler": None},
            "compare",
            ["a", "b"],
            {"prompt": "p"},
        ),
        ({"prompt": "p", "answer": "a"}, "rate", ["a"], {"prompt": "p"}),
        (
            {"context": [{"role": "user", "content": "hi"}], "responses": FOUR},
            "rank",
            FOUR,
            {"prompt": [{"role": "user", "content": "hi"}]},
        ),
        ({"text": "once"}, "demonstrate", [], {"prompt": "once"}),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
            "compare",
            None,
            None,
        ),
    ],
)
def test_columns_suggest_the_kind(tmp_path: Path, row: dict[str, Any], kind: str, completions: Any, fields: Any):
    file = read(tmp_path, [row])
    (task,) = file.tasks
    assert file.kind == kind
    if completions is not None:
        assert task.content["completions"] == completions and task.content["fields"] == fields


def test_k_completions_are_k_tasks_to_rate(tmp_path: Path):
    rows = [{"id": 7, "prompt": "p", "completions": FOUR, "models": ["a", "b", "c", "d"]}]
    tasks = read(tmp_path, rows, kind="rate").tasks
    assert [task.key for task in tasks] == ["7#1", "7#2", "7#3", "7#4"]
    assert [(task.content["completions"], task.content["models"]) for task in tasks] == [
        ([text], [name]) for text, name in zip(FOUR, "abcd")
    ]


GOOD = {"prompt": "p", "completions": FOUR}


@pytest.mark.parametrize(
    ("bad", "settings", "message"),
    [
        ({"completions": FOUR}, {}, r"tasks\.jsonl:2: no column"),
        ({"prompt": "p", "completions": ["one"]}, {}, r"tasks\.jsonl:2: 1 completions; to rank takes 2 to 9"),
        ({"prompt": "p", "completions": FOUR * 8}, {}, r"tasks\.jsonl:2: 32 completions"),
        ({"prompt": "p", "completions": ["one", 2]}, {}, r"tasks\.jsonl:2: the completions must be texts"),
        ({"prompt": "p"}, {}, r"tasks\.jsonl:2: no completions to rank"),
        ({**GOOD, "completions": "one"}, {}, r"tasks\.jsonl:2: no completions to rank"),
        ({**GOOD, "models": ["a"]}, {}, r"tasks\.jsonl:2: column 'models' must name the model of each"),
        ({**GOOD, "sensitive": 1}, {}, r"tasks\.jsonl:2: column 'sensitive' must be true, false or a warning"),
        ({**GOOD, "prompt": math.nan}, {}, r"tasks\.jsonl:2: column 'prompt' must be text, it is NaN"),
        ({**GOOD, "prompt": "\ud83d"}, {}, r"tasks\.jsonl:2: a text holds \\ud83d, half of a surrogate pair"),
        (GOOD, {"kind": "compare"}, r"tasks\.jsonl:1: 4 completions; to compare takes 2"),
        (GOOD, {"gold": True}, r"tasks\.jsonl:1: the ranks must be 4 numbers, lowest = best; they are None"),
        (GOOD, {"kind": "demonstrate", "gold": True}, "a demonstration has no known answer"),
    ],
)
def test_a_bad_row_is_refused_by_line(tmp_path: Path, bad: dict[str, Any], settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        read(tmp_path, [GOOD, bad], **settings)


HH = {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
MESSAGES = {
    name: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
    for name, text in (("chosen", "a"), ("rejected", "b"))
}


@pytest.mark.parametrize("gold", [False, True])
@pytest.mark.parametrize(
    ("good", "bad", "kind", "reason"),
    [
        (GOOD, {"prompt": " ", "completions": FOUR}, "rank", "empty prompt"),
        (GOOD, {"prompt": "p", "completions": ["one", "\n", "two"]}, "rank", "empty completion"),
        (GOOD, {"prompt": "p", "completions": ["one", "\n", "two"]}, "rate", "empty completion"),
        (PAIR, {**PAIR, "rejected": ""}, "compare", "empty completion"),
        (HH, {**HH, "rejected": "\n\nHuman: hi\n\nAssistant: "}, "compare", "empty completion"),
        (MESSAGES, {**MESSAGES, "rejected": [MESSAGES["chosen"][0], {"role": "assistant", "content": " "}]}, "compare",
         "empty completion"),
        ({"prompt": "p"}, {"prompt": ""}, "demonstrate", "empty prompt"),
    ],
)  # fmt: skip
def test_rows_that_training_skips_are_left_out_and_counted_as_there(
    tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], kind: Kind, reason: str, gold: bool
):
    if gold and kind == "demonstrate":
        return
    answer = {"ranks": [0, 1, 2, 3]} if kind == "rank" else {"overall": 3} if kind == "rate" else {}
    rows = [{**row, **(answer if gold else {})} for row in (good, bad, good, bad)]
    file = read(tmp_path, rows, kind=kind, gold=gold)
    assert len(file.tasks) == (4 if kind == "rate" else 1)
    assert f"2 of 4 rows left out: {reason} (first: tasks.jsonl:2)" in file.notes
    with pytest.raises(UserError, match=f"no .* is left of .*: rows read 1 · kept 0 · 1 {reason}"):
        read(tmp_path, [{**bad, **(answer if gold else {})}], kind=kind, gold=gold)
    if kind == "rank":  # the same row, read for training
        report = DatasetReport("tasks.jsonl")
        ranked = [{**row, "ranks": list(range(len(row["completions"])))} for row in (good, bad)]
        path = write_rows(tmp_path / "ranked.jsonl", ranked)
        read_records(read_rows(path), "ranking", Ranking, "auto", report)
        assert report.skipped == {reason: 1}


def test_completions_of_dialogues_are_the_last_replies(tmp_path: Path):
    for row, prompt in ((HH, "\n\nHuman: hi\n\nAssistant:"), (MESSAGES, "hi")):
        (task,) = read(tmp_path, [row]).tasks
        assert [text.strip() for text in task.content["completions"]] == ["a", "b"]
        assert task.content["prompt"] == [{"role": "user", "content": prompt}]


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        ("rank", ""),
        ("compare", ", or 'first' and 'second', or 'chosen' and 'rejected'"),
        ("rate", ", or 'answer', or 'completion', or 'response', or 'output'"),
    ],
)
@pytest.mark.parametrize("row", [{"prompt": "p"}, {"text": "p"}, {"messages": [{"role": "user", "content": "p"}]}])
def test_prompts_without_completions_lack_just_these(tmp_path: Path, kind: Kind, also: str, row: dict[str, Any]):
    message = f"tasks.jsonl:1: no completions to {kind}: a row needs the column 'completions', a list of texts{also}"
    with pytest.raises(UserError) as refusal:
        read(tmp_path, [row], kind=kind)
    assert str(refusal.value) == message


def test_completions_that_are_no_list_are_refused(tmp_path: Path):
    (tmp_path / "tasks.csv").write_text("prompt,completions\nwhy?,\"['a', 'b']\"\n")
    with pytest.raises(UserError, match=r"tasks\.csv:2: column 'completions' must be a list of texts, it is a str"):
        read_tasks(str(tmp_path / "tasks.csv"))


@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 1, 2, math.nan], [0, 1, 2, True], [0, 1, 2, "3"], "0123"])
def test_known_ranks_are_one_number_per_completion(tmp_path: Path, ranks: Any):
    with pytest.raises(UserError, match=r"tasks\.jsonl:1: the ranks must be 4 numbers"):
        read(tmp_path, [{**GOOD, "ranks": ranks}], gold=True)


@pytest.mark.parametrize(
    ("value", "warning"),
    [
        *((value, None) for value in (None, False, "", "false", "No", "0", math.nan)),
        *((value, "sensitive content") for value in (True, "true", "Yes", "1")),
        ("violence", "violence"),
    ],
)
def test_a_warning_is_a_text_or_yes(tmp_path: Path, value: Any, warning: str | None):
    assert read(tmp_path, [{**GOOD, "sensitive": value}]).tasks[0].content.get("sensitive") == warning


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "a"], r"tasks\.jsonl:2: the id 'a' is that of tasks\.jsonl:1"),
        ([1, "1"], r"tasks\.jsonl:2: the id '1' is that of"),
        (["a", None], r"tasks\.jsonl:2: the id is None"),
        (["a", ""], r"tasks\.jsonl:2: the id is ''"),
        (["a", True], r"tasks\.jsonl:2: the id is True"),
    ],
)
def test_ids_are_unique_and_complete(tmp_path: Path, ids: list[Any], message: str):
    rows = [{"id": own, "prompt": f"p{n}", "completions": FOUR} for n, own in enumerate(ids)]
    with pytest.raises(UserError, match=message):
        read(tmp_path, rows)


def test_repeated_rows_and_identical_completions_are_counted(tmp_path: Path):
    file = read(tmp_path, [GOOD, GOOD, {"prompt": "q", "completions": ["same", "same "]}])
    assert len(file.tasks) == 1
    assert file.notes == [
        "1 rows repeat an earlier one and are left out",
        "1 rows have identical completions and are left out",
    ]


def test_answers_in_the_file_are_said_to_be_ignored(tmp_path: Path):
    file = read(tmp_path, [{**GOOD, "ranks": [0, 1, 2, 3]}])
    assert file.notes == ["the column 'ranks' is not shown and not exported"]


@pytest.mark.parametrize(
    ("row", "kind", "gold"),
    [
        ({**GOOD, "ranks": [3, 0, 0, 9]}, "rank", {"ranks": [2, 1, 1, 3]}),
        ({"prompt": "p", "first": "a", "second": "b", "preference": "second"}, "compare", {"preference": "second"}),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "compare", {"preference": "first"}),
        (
            {"prompt": "p", "answer": "a", "overall": 6, "hallucination": True},
            "rate",
            {"overall": 6, "flags": {"hallucination": True}},
        ),
    ],
)
def test_known_answers_are_read(tmp_path: Path, row: dict[str, Any], kind: str, gold: dict[str, Any]):
    file = read(tmp_path, [row], gold=True)
    assert (file.kind, file.tasks[0].gold) == (kind, gold)


def test_content_is_json(tmp_path: Path):
    row = {**GOOD, "system": "be brief", "history": [["hi", "hello"]], "sensitive": True, "n": 1.5}
    task = read(tmp_path, [row]).tasks[0]
    assert json.loads(json.dumps(task.content)) == task.content
    assert task.content["sensitive"] == "sensitive content" and task.content["fields"]["n"] == 1.5


def test_what_an_earlier_labeler_said_is_no_part_of_the_task(tmp_path: Path):
    said = {"none_acceptable": True, "prompt_flags": ["unclear"], "note": "hm", "shown": [1, 0, 3, 2], "seconds": 2.0}
    file = read(tmp_path, [{"prompt": "p", "completions": FOUR, "ranks": [0, 1, 2, 3], "labeler": "ann", **said}])
    assert file.tasks[0].content["fields"] == {"prompt": "p"}
    assert all(f"the column {name!r} is not shown and not exported" in file.notes for name in said)
