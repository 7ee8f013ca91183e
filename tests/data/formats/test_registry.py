"""Formats: which columns become which record, which rows are skipped with which reason, which are refused."""

import sys

import pytest

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration, Instruction
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from tests.helpers.rows import assistant, convert, user

HEAD = "\n\nHuman: h\n\nAssistant: x\n\nHuman: j\n\nAssistant:"
GOOD_PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
GOOD_RANKING = {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]}


@pytest.mark.parametrize(
    ("fields", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "response": "c"}, "p", "c"),
        ({"prompt": [user("p")], "completion": "c"}, [user("p")], "c"),
        ({"question": "p", "answer": "c"}, Instruction("p"), "c"),
        ({"instruction": "p", "response": "c", "id": 1}, Instruction("p"), "c"),
        ({"instruction": "p", "context": "m", "response": "c"}, Instruction("p", "m"), "c"),
        ({"instruction": "p", "input": "i", "output": "c"}, Instruction("p", "i"), "c"),
        ({"instruction": "p", "input": None, "output": "c"}, Instruction("p"), "c"),
        ({"messages": [user("p"), assistant("c")]}, [user("p")], "c"),
        (
            {
                "messages": [
                    {"role": "prompter", "text": "p"},
                    {"role": "assistant", "text": "q"},
                    user("r"),
                    assistant("c"),
                ]
            },
            [user("p"), assistant("q"), user("r")],
            "c",
        ),
    ],
)
def test_demonstrations_and_their_prompts(fields, prompt, completion):
    (record,), _ = convert("demonstration", fields)
    assert (record.prompt, record.completion) == (prompt, completion)
    assert (record.fields, record.origin) == (fields, "rows.jsonl:1")
    (prompt_record,), _ = convert("prompt", fields)
    assert prompt_record.prompt == prompt  # the same row has the same prompt in every kind of data


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (GOOD_PAIR, ("p", ["a", "b"], [0, 1], None)),
        (
            {"instruction": "p", "input": "i", "chosen": "a", "rejected": "b"},
            (Instruction("p", "i"), ["a", "b"], [0, 1], None),
        ),
        (
            {"chosen": f"{HEAD} a", "rejected": f"{HEAD} b"},
            (HEAD, [" a", " b"], [0, 1], None),
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "labeler": 7},
            ("p", ["a", "b", "c"], [1, 0, 1], "7"),
        ),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [0.5, -1.0]}, ("p", ["a", "b"], [1, 0], None)),
        (
            {"context": [{"role": "prompter", "text": "p"}], "responses": ["a", "b"], "ranks": [1, 0]},
            ([user("p")], ["a", "b"], [1, 0], None),
        ),
    ],
)
def test_rankings(fields, expected):
    (record,), _ = convert("ranking", fields)
    assert tuple(record[:4]) == expected


def four(labels):
    return {
        "question": "q",
        "passages": [["Title", "One."], ["Other", "Two.", "Three."]],
        **{f"prediction {number}": letter for number, letter in enumerate("abcd", start=1)},
        "preference": labels,
    }


def test_pair_labels_become_ranks():
    # 1 = the first is better; pairs (1,2)(1,3)(1,4)(2,3)(2,4)(3,4); d > a = b > c, all labels agreeing
    (record,), report = convert("ranking", four([0, 1, 2, 1, 2, 2]))
    assert record.completions == ["a", "b", "c", "d"] and record.ranks == [1, 1, 2, 0]
    assert record.prompt == Instruction("q", "Title\nOne.\n\nOther\nTwo.\nThree.")
    assert report.flagged == {}


def test_contradicting_pair_labels_are_counted():
    # a > b > c > a, and all beat d: the three tie by wins, against three labels
    (record,), report = convert("ranking", four([1, 2, 1, 1, 1, 1]))
    assert record.ranks == [0, 0, 0, 1]
    assert report.flagged == {"ranks by wins contradict a pair label": 1}


def test_cyclic_pair_labels_are_skipped():
    # a > b > c > d > a, the others tie
    records, report = convert("ranking", four([1, 0, 2, 1, 0, 1]), four([1, 1, 1, 1, 1, 1]))
    assert [record.ranks for record in records] == [[0, 1, 2, 3]]
    assert report.skipped == {"pair labels cancel each other out": 1}


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3, 1, 1]])
def test_bad_pair_labels(labels):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'preference' must hold 6 labels 0, 1 or 2 for 4 predictions"):
        convert("ranking", four(labels))


@pytest.mark.parametrize(
    ("kind", "good", "bad", "reason"),
    [
        ("demonstration", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " \n"}, "empty completion"),
        ("demonstration", {"prompt": "p", "completion": "c"}, {"prompt": "", "completion": "c"}, "empty prompt"),
        (
            "demonstration",
            {"messages": [user("p"), assistant("c")]},
            {"messages": [user("p")]},
            "conversation does not end with a reply",
        ),
        ("demonstration", {"messages": [user("p"), assistant("c")]}, {"messages": [assistant("c")]}, "empty prompt"),
        ("ranking", GOOD_PAIR, {"prompt": "p", "chosen": "a ", "rejected": "a"}, "chosen equals rejected"),
        ("ranking", GOOD_PAIR, {"prompt": "p", "chosen": "a", "rejected": ""}, "empty completion"),
        ("ranking", GOOD_RANKING, {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1]}, "all completions tied"),
        (
            "ranking",
            GOOD_RANKING,
            {"prompt": "p", "completions": ["a", "a"], "ranks": [0, 1]},
            "all completions identical",
        ),
        ("ranking", GOOD_RANKING, {"prompt": "p", "completions": ["a"], "ranks": [0]}, "a single completion"),
        (
            "ranking",
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
            {"chosen": "x\n\nAssistant: a", "rejected": "y\n\nAssistant: b"},
            "chosen and rejected differ before the last reply",
        ),
        (
            "ranking",
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
            {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant:"},
            "empty completion",
        ),
        ("prompt", {"prompt": "p"}, {"prompt": " "}, "empty prompt"),
        ("text", {"text": "p"}, {"text": ""}, "empty document"),
    ],
)
def test_skipped_and_counted(kind, good, bad, reason):
    records, report = convert(kind, good, bad, bad)
    assert len(records) == 1
    assert (report.num_read, report.num_kept, report.skipped) == (3, 1, {reason: 2})
    assert "first: rows.jsonl:2" in report.format_table()


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (
            "demonstration",
            [{"prompt": "p", "completion": "c"}, {"prompt": "p", "text": "c"}],
            r"rows\.jsonl:2: no column 'completion'; the row has 'prompt', 'text'",
        ),
        (
            "demonstration",
            [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}],
            r"rows\.jsonl:2: column 'completion' must be text, it is null",
        ),
        (
            "demonstration",
            [{"prompt": "p"}],
            r"rows\.jsonl:1: no column 'completion' \(format prompt_completion\); the row has 'prompt'",
        ),
        (
            "demonstration",
            [{"a": 1, "b": 2}],
            r"rows\.jsonl:1: the columns 'a', 'b' are of no known demonstration format",
        ),
        (
            "demonstration",
            [{"messages": [{"role": "user"}]}],
            r":1: turn 1 of 'messages' must have a 'role' and a text 'content'",
        ),
        (
            "demonstration",
            [{"messages": [{"role": "tool", "content": "x"}]}],
            r":1: turn 1 of 'messages' has the role 'tool'",
        ),
        (
            "demonstration",
            [{"instruction": "p", "input": 3, "output": "c"}],
            r"column 'input' must be text, it is a int",
        ),
        (
            "ranking",
            [GOOD_RANKING, {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1]}],
            r"rows\.jsonl:2: 2 ranks for 3 completions",
        ),
        ("ranking", [{"prompt": "p", "completions": ["a", "b"], "ranks": [0, "1"]}], r":1: the ranks must be numbers"),
        (
            "ranking",
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [0, float("nan")]}],
            r":1: the ranks must be numbers",
        ),
        ("ranking", [{"prompt": "p", "completions": ["a", 1], "ranks": [0, 1]}], r":1: the completions must be texts"),
        (
            "ranking",
            [{"prompt": "p", "completions": "ab", "ranks": [0, 1]}],
            r":1: column 'completions' must be a list of texts",
        ),
        (
            "ranking",
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [0, 0]}] * 3,
            r"no ranking is left of 'rows\.jsonl': rows read 3 · kept 0 · 3 all completions tied",
        ),
        ("ranking", [{"chosen": "a", "rejected": "b"}], r":1: column 'chosen' holds no .*Assistant:"),
        ("text", [{"text": "a"}, {"body": "b"}], r"rows\.jsonl:2: no column 'text'; the row has 'body'"),
    ],
)
def test_refused_with_file_and_line(kind, rows, message):
    with pytest.raises(UserError, match=message):
        convert(kind, *rows)


def test_conversations_of_either_naming_train_on_all_replies():
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    (record,), report = convert("demonstration", {"conversations": [*turns, *turns, {"from": "human", "value": "v"}]})
    assert record[:2] == ([user("u"), assistant("a"), user("u")], "a") and record.train_on_all_replies
    assert report.flagged == {"turns after the last reply left out": 1}
    (record,), _ = convert("demonstration", {"prompt": [user("u"), assistant("x"), user("v")], "completion": "a"})
    assert not record.train_on_all_replies
    (record,), _ = convert("demonstration", {"prompt": [user("u")], "completion": [assistant("a")]})
    assert record[:2] == ([user("u")], "a")
    with pytest.raises(UserError, match=r":1: column 'completion' must hold one reply, it has 2 turns"):
        convert("demonstration", {"prompt": "p", "completion": [user("u"), assistant("a")]})


def test_instances_of_an_instruction():
    row = {"instruction": "i", "id": 3, "instances": [{"input": "x", "output": "a"}, {"input": "", "output": "b"}]}
    records, report = convert("demonstration", row)
    assert [record[:2] for record in records] == [(Instruction("i", "x"), "a"), (Instruction("i"), "b")]
    assert records[1].fields == {"instruction": "i", "id": 3, "input": "", "output": "b"}
    assert (report.num_read, report.num_kept) == (1, 2)
    assert [record.prompt for record in convert("prompt", row)[0]] == [Instruction("i", "x"), Instruction("i")]
    with pytest.raises(UserError, match=r":1: instance 1 must have 'input' and 'output'"):
        convert("demonstration", {"instruction": "i", "instances": ["a"]})


def test_real_instances(shared):
    path = str(shared / "demonstrations" / "seed_tasks.jsonl")
    records = read_records(read_rows(path), "demonstration", Demonstration, "auto", DatasetReport(path))
    assert len(records) == 175
    assert sum(isinstance(record.prompt, Instruction) and bool(record.prompt.input) for record in records) > 50


def test_a_named_format_overrides_detection():
    fields = {"prompt": "p", "completion": "c", "instruction": "i", "response": "r"}
    (record,), _ = convert("demonstration", fields, format="instruction_response")
    assert record.completion == "r"
    with pytest.raises(UserError, match=r"no demonstration format is named 'alpacca' \(did you mean 'alpaca'\?\)"):
        convert("demonstration", fields, format="alpacca")
    with pytest.raises(UserError, match=r"no text format is named 'zzz'; known are text"):
        convert("text", {"text": "a"}, format="zzz")


@pytest.fixture
def custom_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rows.py").write_text(
        "from lit_rlhf.data import Demonstration, Ranking\n"
        "def record(row): return Demonstration(row['a'], row['b']) if row['b'] != 'skip' else None\n"
        "def columns(row): return {'prompt': row['a'], 'completion': row['b']}\n"
        "def ranking(row): return Ranking(row['a'], ['x', 'y'], row['b'])\n"
        "def number(row): return 3\n"
        "def document(row): return {'text': row['a']} if row['a'] else []\n"
        "def tasks(row): return {'instruction': row['a'], 'instances': row['b']}\n"
        "CONSTANT = 1\n"
    )
    yield "my_rows"
    sys.modules.pop("my_rows", None)


def test_custom_function(custom_module):
    rows = [{"a": "p", "b": "c"}, {"a": "p", "b": "skip"}]
    (record,), report = convert("demonstration", *rows, format="my_rows.record")
    assert record[:4] == ("p", "c", rows[0], "rows.jsonl:1")
    assert report.skipped == {"by my_rows.record": 1}
    records, _ = convert("demonstration", *rows, format="my_rows.columns")
    assert [each.completion for each in records] == ["c", "skip"]
    records, report = convert("text", {"a": "some"}, {"a": ""}, {"a": " "}, format="my_rows.document")
    assert records == [("some", "rows.jsonl:1")]
    assert report.skipped == {"by my_rows.document": 1, "empty document": 1}
    instances = [{"input": "i", "output": "1"}, {"input": "j", "output": "2"}]
    records, report = convert("demonstration", {"a": "p", "b": instances}, format="my_rows.tasks")
    assert [(each.completion, each.fields["a"]) for each in records] == [("1", "p"), ("2", "p")]
    assert (report.num_read, report.num_kept) == (1, 2)


@pytest.mark.parametrize(
    ("kind", "fields", "format", "message"),
    [
        ("demonstration", {"a": "p"}, "my_rows.record", r"rows\.jsonl:1: my_rows\.record failed with KeyError: 'b'"),
        (
            "demonstration",
            {"a": "p", "b": "c"},
            "my_rows.number",
            r":1: my_rows\.number returned a int; it must return a Dem",
        ),
        ("demonstration", {"a": "p", "b": ""}, "my_rows.record", "1 empty completion"),
        ("ranking", {"a": "p", "b": [1]}, "my_rows.ranking", r":1: 1 ranks for 2 completions"),
        ("demonstration", {"a": "p"}, "my_rows.absent", r"format: 'my_rows\.absent' cannot be imported from"),
        ("demonstration", {"a": "p"}, "no_such_file.f", r"format: 'no_such_file\.f' cannot be imported from"),
        ("demonstration", {"a": "p"}, "my_rows.CONSTANT", r"'my_rows\.CONSTANT' is a int, not a function"),
    ],
)
def test_custom_function_in_error(custom_module, kind, fields, format, message):
    with pytest.raises(UserError, match=message):
        convert(kind, fields, format=format)


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("text", ["prompt", "instruction", "question"])
def test_prompts_of_a_conversation_are_those_that_demonstrations_train_on(name, text):
    turns = [{"role": "system", "content": "s"}, user("p"), assistant("c")]
    row = {text: "p", "prompt_id": "1", name: turns}
    for kind in ("demonstration", "prompt"):
        (record,), report = convert(kind, row)
        assert record.prompt == turns[:-1] and not report.flagged


def test_a_conversation_that_no_stage_reads_is_counted():
    row = {"prompt": "p", "completion": "c", "messages": [user("p"), assistant("c")]}
    for kind in ("demonstration", "prompt"):
        (record,), report = convert(kind, row)
        assert record.prompt == "p" and report.flagged == {"column 'messages' is not read by the format": 1}
    (record,), _ = convert("prompt", row, format="messages")
    assert record.prompt == [user("p")]


def test_messages_of_openassistant_without_their_tree_are_refused():
    row = {"message_id": "m", "parent_id": None, "text": "hi", "role": "prompter"}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: each row is one message .*trees\.jsonl\.gz"):
        convert("prompt", row)
