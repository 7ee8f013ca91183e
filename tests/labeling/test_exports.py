"""Out and in: what the data modules read, and that a round trip loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration, Instruction, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.human_labels import HumanLabels
from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS, CompletionPair, RatedItem
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.labeling.database import Database
from lit_rlhf.labeling.exports import export_answers
from lit_rlhf.labeling.imports import read_import
from lit_rlhf.labeling.tasks import read_tasks
from tests.helpers.small_runs import write_rows

ANSWERS: dict[str, list[dict[str, Any]]] = {
    "rank": [
        {"ranks": [2, 1, 2], "note": "a\nnote", "prompt_flags": ["ambiguous"]},
        {"ranks": [1, 1, 1], "none_acceptable": True},
        {"ranks": [3, 2, 1]},
    ],
    "compare": [{"preference": "second"}, {"preference": "both_bad"}, {"preference": "tie", "note": "n"}],
    "rate": [
        {"overall": 7, "flags": dict.fromkeys(METADATA_FIELDS, False)},
        {"overall": 1, "flags": {"hallucination": True, "fails_instruction": False}},
        {"overall": 4, "flags": {}},
    ],
    "demonstrate": [{"completion": " a\n b"}, {"completion": "<b>"}, {"completion": "é 👩‍👧"}],
}
ROWS: dict[str, dict[str, Any]] = {
    "rank": {"completions": ["one", "two <b>", "three\n"], "models": ["m1", "m2", "m3"]},
    "compare": {"first": "one", "second": "two"},
    "rate": {"answer": "one"},
    "demonstrate": {},
}
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "why?"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
    {"instruction": "do it", "input": "to this"},
]


def answered(path: Path, kind: str, prompts: list[dict[str, Any]] | None = None) -> Database:
    """Return a database with each prompt answered by two people, and one of ann's tasks skipped."""
    database = Database(path / f"{kind}.db")
    rows = [{**prompt, **ROWS[kind], "topic": f"t{n}"} for n, prompt in enumerate(prompts or PROMPTS)]
    for number, row in enumerate(rows):  # one file per form of prompt: a file has one format
        file = read_tasks(write_rows(path / f"{kind}-{number}.jsonl", [row]), kind)
        database.add_tasks(kind, file.tasks, [2])
    for name in ("ann", "bo"):
        labeler = database.add_labeler(name)
        for number in range(len(rows)):
            lease = database.claim(kind, labeler, now=100.0)
            assert lease
            content = ANSWERS[kind][(number + (name == "bo")) % 3]
            database.submit(lease.token, labeler, "answer", content, now=100.0 + number + 1.5)
    return database


def answers_of(database: Database) -> list[str]:
    kept = ("key", "labeler", "action", "content", "shown", "seconds", "task_content")
    answers = database.list_answers(actions=("answer", "skip"))
    return sorted(json.dumps({name: each._asdict()[name] for name in kept}, sort_keys=True) for each in answers)


def export(database: Database, path: Path, *args: Any, **settings: Any) -> list[dict[str, Any]]:
    export_answers(database, path, *args, **settings)
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_as(path: Path, kind: Any, record: Any, report: DatasetReport | None = None) -> list[Any]:
    return read_records(read_rows(str(path)), kind, record, "auto", report or DatasetReport(str(path)))


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_rankings_are_read_by_the_reward_models_data_module(tmp_path: Path, number: int):
    database = answered(tmp_path, "rank", [PROMPTS[number]])
    path = tmp_path / "rankings.jsonl"
    row = export(database, path)[0]
    assert (
        row["labeler"] == "ann"
        and row["seconds"] == 1.5
        and row["topic"] == "t0"
        and row["models"] == ["m1", "m2", "m3"]
    )
    assert row["ranks"] == [1, 0, 1] and sorted(row["shown"]) == [0, 1, 2] and row["note"] == "a\nnote"
    report = DatasetReport("")
    (record,) = read_as(path, "ranking", Ranking, report)  # bo's ranking, all tied, teaches nothing
    assert report.skipped == {"all completions tied": 1} and report.flagged == {}
    assert record.completions == ROWS["rank"]["completions"] and (record.ranks, record.labeler) == ([1, 0, 1], "ann")
    assert record.prompt == [PROMPTS[0].get("prompt"), PROMPTS[1]["prompt"], Instruction("do it", "to this")][number]


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_demonstrations_are_read_by_the_sft_data_module(tmp_path: Path, number: int):
    database = answered(tmp_path, "demonstrate", [PROMPTS[number]])
    path = tmp_path / "demonstrations.jsonl"
    export(database, path)
    report = DatasetReport("")
    records = read_as(path, "demonstration", Demonstration, report)
    assert [each.completion for each in records] == [" a\n b", "<b>"] and report.flagged == {}
    assert (
        records[0].prompt == [PROMPTS[0].get("prompt"), PROMPTS[1]["prompt"], Instruction("do it", "to this")][number]
    )


def test_comparisons_and_ratings_are_read_by_human_labels(tmp_path: Path):
    path = tmp_path / "comparisons.jsonl"
    rows = export(answered(tmp_path, "compare"), path)
    assert [row["preference"] for row in rows[:2]] == ["second", "tie"] and rows[1]["both_bad"]
    first, second = (Completion(text, True, 1) for text in ("one", "two"))
    pair = CompletionPair("do it\n\nto this", {}, first, second)
    verdicts = HumanLabels(str(path)).compare([pair], Cache(tmp_path / "cache"))[0]
    assert sorted((each.judge, each.preference) for each in verdicts) == [("ann", 0.5), ("bo", 0.0)]
    path = tmp_path / "ratings.jsonl"
    export(answered(tmp_path, "rate"), path)
    ratings = HumanLabels(str(path)).rate([RatedItem("why?", {}, first)], Cache(tmp_path / "cache"))
    assert ratings is not None and [(each.judge, each.overall) for each in ratings[0]] == [("ann", 7), ("bo", 1)]
    assert ratings[0][1].flags == {"hallucination": True, "fails_instruction": False}


def test_pairs_are_those_that_are_decided(tmp_path: Path):
    database = answered(tmp_path, "rank", PROMPTS[:1])
    path = tmp_path / "pairs.jsonl"
    rows = export(database, path, "pairs")
    assert [(row["chosen"], row["rejected"], row["labeler"]) for row in rows] == [
        ("two <b>", "one", "ann"),
        ("two <b>", "three\n", "ann"),
    ]
    assert len(read_as(path, "ranking", Ranking)) == 2


def test_a_datasets_folder_has_the_rows(tmp_path: Path):
    import datasets

    database = answered(tmp_path, "rank", PROMPTS[:1])
    export_answers(database, tmp_path / "table", "datasets")
    table = datasets.load_from_disk(str(tmp_path / "table"))
    rows = export(database, tmp_path / "rows.jsonl")
    assert [row["ranks"] for row in table] == [row["ranks"] for row in rows] and len(table) == 2


@pytest.mark.parametrize("form", [None, "label-studio"])
@pytest.mark.parametrize("kind", ["rank", "compare", "rate", "demonstrate"])
def test_a_round_trip_loses_nothing(tmp_path: Path, kind: str, form: str | None):
    # ratings and comparisons have their prompt as text: judges see it so
    prompts = PROMPTS if form or kind in ("rank", "demonstrate") else PROMPTS[:1]
    database = answered(tmp_path, kind, prompts if form else prompts[:1])
    path = tmp_path / ("out.json" if form else "out.jsonl")
    export_answers(database, path, form)
    imported = read_import(str(path))
    other = Database(tmp_path / "other.db")
    total = len(database.list_answers())
    assert other.import_answers(imported.kind, imported.tasks, imported.answers) == total
    assert answers_of(other) == answers_of(database)
    assert database.import_answers(imported.kind, imported.tasks, imported.answers) == 0, "it is there already"


def test_skips_and_known_answers_are_left_out_and_counted(tmp_path: Path):
    database = answered(tmp_path, "compare", PROMPTS[:1])
    gold = read_tasks(
        write_rows(tmp_path / "g.jsonl", [{"prompt": "g", "first": "a", "second": "b", "preference": "first"}]),
        gold=True,
    )
    database.add_tasks("compare", gold.tasks, [0])
    extra = read_tasks(write_rows(tmp_path / "e.jsonl", [{"prompt": "e", "first": "a", "second": "b"}]))
    database.add_tasks("compare", extra.tasks, [1])
    ann = database.add_labeler("ann")
    for action, content in (("answer", {"preference": "first"}), ("skip", {"reason": "unclear"})):
        lease = database.claim("compare", ann)
        assert lease
        database.submit(lease.token, ann, action, content)
    lines = export_answers(database, tmp_path / "a.jsonl")
    assert lines[0].endswith("2 comparisons of 2 answers")
    assert lines[1:] == [
        "1 not written: skipped",
        "1 not written: to tasks with known answers (--with-gold)",
    ]
    assert len(export(database, tmp_path / "b.jsonl", with_gold=True)) == 3
    assert {row["labeler"] for row in export(database, tmp_path / "c.jsonl", labelers=["bo"])} == {"bo"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "ratings"}, "--as ratings: answers to rank are exported as rankings, pairs"),
        ({"kind": "rate"}, "holds no tasks to rate"),
        ({"labelers": ["cy"]}, "nobody named 'cy' answered; there are ann, bo"),
    ],
)
def test_a_wrong_export_is_refused(tmp_path: Path, settings: dict[str, Any], message: str):
    database = answered(tmp_path, "rank", PROMPTS[:1])
    with pytest.raises(UserError, match=message):
        export_answers(database, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_export_never_replaces_a_file(tmp_path: Path):
    database = answered(tmp_path, "rank", PROMPTS[:1])
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_answers(database, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


Write = Callable[[Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a JSON document; return its path."""

    def to_file(document: Any) -> str:
        path = tmp_path / "export.json"
        path.write_text(json.dumps(document))
        return str(path)

    return to_file


def label_studio(value: Any, kind: str = "ranker", **settings: Any) -> dict[str, Any]:
    items = [{"id": name, "title": "", "body": f"text {name}"} for name in ("x", "y", "z")]
    result = {"from_name": "r", "to_name": "items", "type": kind, "value": value}
    annotation = {"id": 5, "completed_by": 3, "lead_time": 4.2, "was_cancelled": False, "result": [result]}
    data = {"prompt": "why?", "items": items, "text1": "left one", "text2": "right one"}
    return {"id": 1, "data": data, "annotations": [annotation | settings]}


@pytest.mark.parametrize(
    ("value", "ranks"),
    [
        ({"ranker": ["z", "x", "y"]}, [2, 3, 1]),
        ({"ranker": {"r": ["z", "x", "y"]}}, [2, 3, 1]),
        ({"ranker": {"rank-1": ["y"], "rank-3": ["x", "z"]}}, [3, 1, 3]),
        ({"ranker": {"good": ["y", "z"], "bad": ["x"], "_": []}}, [2, 1, 1]),
    ],
)
def test_label_studio_rankings_are_read(write: Write, value: Any, ranks: list[int]):
    imported = read_import(write([label_studio(value)]))
    (answer,) = imported.answers[0]
    assert (imported.kind, answer.content, answer.labeler, answer.seconds) == ("rank", {"ranks": ranks}, "3", 4.2)
    assert imported.tasks[0].content["completions"] == ["text x", "text y", "text z"]
    assert bool(imported.notes) == ("good" in str(value)), "an order that the file does not number is said"


def test_label_studio_pairs_and_canceled_ones_are_read(write: Write):
    imported = read_import(write([label_studio({"selected": "right"}, "pairwise")]))
    assert (imported.kind, imported.answers[0][0].content) == ("compare", {"preference": "second"})
    both = label_studio({"selected": "left"}, "pairwise")
    both["annotations"].append(both["annotations"][0] | {"completed_by": 4, "was_cancelled": True})
    assert [each.action for each in read_import(write([both])).answers[0]] == ["answer", "skip"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (label_studio({"ranker": ["z", "x"]}), r"row 1 annotation 1: the item 'y' is not ranked"),
        (
            label_studio({"ranker": ["z", "x", "y", "w"]}),
            r"annotation 1: an item is ranked that the task does not have",
        ),
        (label_studio({"ranker": {"a": ["x"], "_": ["y", "z"]}}), r"annotation 1: 2 of 3 items are in no bucket"),
        (label_studio({"ranker": ["z", "x", "y", "x"]}), r"annotation 1: an item is ranked twice"),
        (label_studio({"ranker": {"r-1": ["z", "x"], "r-2": ["y", "x"]}}), r"annotation 1: an item is ranked twice"),
        (label_studio({"ranker": ["x", "y", "z"]}, lead_time="5"), r"annotation 1: 'lead_time' must be seconds"),
        (label_studio({"ranker": ["x", "y", "z"]}, completed_by=None), r"annotation 1: no \"completed_by\""),
        (label_studio({"selected": "up"}, "pairwise"), r"annotation 1: the pair has no choice"),
        ({"id": 1, "data": {"prompt": "p"}, "annotations": []}, "no annotation of a type that is read"),
        (label_studio({"ranker": ["x", "y", "z"]}) | {"data": {"prompt": "p"}}, "row 1: no list of items"),
    ],
)
def test_a_bad_label_studio_row_is_refused(write: Write, row: Any, message: str):
    with pytest.raises(UserError, match=message):
        read_import(write([row]))


RANKED = [{"value": "reply-2", "rank": 1}, {"value": "reply-1", "rank": 2}, {"value": "reply-3", "rank": 2}]
AS_COLUMNS = {"value": ["reply-2", "reply-1", "reply-3"], "rank": [1, 2, 2]}
FIELDS = {"prompt": "why?", "reply_1": "a", "reply_2": "b", "reply_3": "c"}


@pytest.mark.parametrize(
    "row",
    [
        {
            "id": "1",
            "fields": FIELDS,
            "responses": {"ranking": [{"value": RANKED, "user_id": "u", "status": "submitted"}]},
        },
        {
            "id": "1",
            "fields": FIELDS,
            "responses": [{"user_id": "u", "status": "submitted", "values": {"ranking": {"value": RANKED}}}],
        },
        {**FIELDS, "ranking": [{"user_id": "u", "value": AS_COLUMNS, "status": "submitted"}], "external_id": "1"},
        {
            "id": "1",
            **FIELDS,
            "ranking.responses": [RANKED],
            "ranking.responses.users": ["u"],
            "ranking.responses.status": ["submitted"],
        },
    ],
)
def test_argilla_rankings_are_read_in_each_of_its_forms(write: Write, row: dict[str, Any]):
    imported = read_import(write([row]))
    assert imported.kind == "rank" and imported.tasks[0].key == "1"
    by_text = dict(zip(imported.tasks[0].content["completions"], imported.answers[0][0].content["ranks"]))
    assert by_text == {"a": 2, "b": 1, "c": 2} and imported.answers[0][0].labeler == "u"


def test_argilla_texts_are_read_and_drafts_counted(write: Write):
    responses = [
        {"value": text, "user_id": text, "status": status} for text, status in (("a", "submitted"), ("b", "draft"))
    ]
    imported = read_import(write([{"id": "1", "fields": {"prompt": "p"}, "responses": {"answer": responses}}]))
    assert imported.kind == "demonstrate" and [each.content for each in imported.answers[0]] == [{"completion": "a"}]
    assert imported.notes == ["1 responses are drafts, pending or discarded, and are left out"]


def test_an_argilla_ranking_of_unknown_fields_is_refused(write: Write):
    row = {"fields": {"prompt": "p", "x": "a"}, "responses": {"r": [{"value": RANKED, "user_id": "u"}]}}
    with pytest.raises(UserError, match="is ranked, and the record has no such field"):
        read_import(write([row]))


RANKED_ROW = {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "labeler": "x"}


def potato(order: str, **columns: Any) -> dict[str, Any]:
    return {"id": "1", "text": "why?", "items": ["a", "b", "c", "d"], "user_id": "u", "ranking": order} | columns


def test_potato_rankings_are_read(write: Write):
    imported = read_import(write([potato("B,D=A,C"), potato("A = B > C,D", id="2")]))
    assert [each[0].content["ranks"] for each in imported.answers] == [[2, 1, 3, 2], [1, 1, 2, 3]]
    nested = potato("") | {"ranking": None, "label_annotations": {"schema": {"order": "D,C,B,A"}}}
    assert read_import(write([nested])).answers[0][0].content["ranks"] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (potato("B,D=A"), r"row 1: the ranking 'B,D=A' does not name each of A, B, C, D once"),
        (potato("B,D=A,C,C"), "once"),
        (potato("A,B,C,E"), "once"),
        (potato("A,B,C,D", user_id=None), "none of labeler, .*: whose answer is it"),
        (potato("A,B,C,D", id=1.5), "row 1: the id must be a text or a number, it is 1.5"),
        ({"fields": FIELDS, "responses": {"r": [{"value": RANKED, "user_id": None}]}}, "without a user"),
        ({"fields": FIELDS, "responses": {"r": [{"value": RANKED[:1] * 2, "user_id": "u"}]}}, "of different fields"),
        (
            {"fields": FIELDS, "responses": {"r": [{"value": AS_COLUMNS | {"rank": [1, 2]}, "user_id": "u"}]}},
            "of different fields",
        ),
        (
            {**FIELDS, "r.responses": [RANKED] * 2, "r.responses.users": ["u"]},
            "'r.responses.users' must be a list of 2",
        ),
        (potato("A,B,C,D", items=None), "no list of texts"),
        (potato("A,B,C,D", text=""), "no prompt"),
        ({"prompt": "p"}, "not an export of"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1, 2], "labeler": "x"}, "must be 2 numbers"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "labeler": None}, "no labeler"),
        ({"prompt": "p", "first": "a", "second": "b", "preference": "left", "labeler": "x"}, "preference is 'left'"),
        ({"prompt": "p", "completion": " ", "labeler": "x"}, "the demonstration is empty"),
        (
            {"prompt": "p", "completions": ["a", "b"], "answer": "a", "overall": 3, "labeler": "x"},
            "a rating is of one completion, and this row has 2",
        ),
        ({**RANKED_ROW, "seconds": -1}, "'seconds' must be seconds, a number from 0"),
        ({**RANKED_ROW, "shown": [0, 0]}, "'shown' must be the order of the completions"),
        ({**RANKED_ROW, "note": 5}, "'note' must be a text"),
        ({**RANKED_ROW, "prompt_flags": ["odd"]}, "'prompt_flags' must be a list of ambiguous"),
        ({**RANKED_ROW, "labeler": ["x"]}, "whose answer is it"),
    ],
)
def test_a_bad_import_is_refused(write: Write, row: Any, message: str):
    with pytest.raises(UserError, match=message):
        read_import(write([row]))


def test_one_person_answers_a_task_once(write: Write):
    with pytest.raises(UserError, match=r"row 2: 'u' answered the task '1' before"):
        read_import(write([potato("A,B,C,D"), potato("B,A,C,D")]))
