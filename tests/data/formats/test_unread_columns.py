"""Columns that mean something: they are turns before the prompt, or the report counts their rows."""

import datetime

import pytest

from lit_rlhf.data.formats.registry import _RECORD_TYPES, read_records
from lit_rlhf.data.preprocessing.few_shot import expand_few_shot
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration, PromptInContext, to_messages, to_plain_text
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
KINDS = {  # rows that each kind reads, with a prompt that is no text
    "demonstration": [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "instances": [{"output": "a"}]},
        {"question": "q", "answer": "a"},
        {"messages": [USER, REPLY]},
        {"conversations": SHARE},
        {"prompt": [USER], "completion": "a"},
    ],
    "ranking": [
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "b"}]},
        {"context": [USER], "responses": ["a", "b"], "ranks": [0, 1]},
    ],
}
KINDS["prompt"] = [*KINDS["demonstration"], *KINDS["ranking"]]
CASES = [(kind, row) for kind, rows in KINDS.items() for row in rows]


def read(kind, *rows):
    report = DatasetReport("rows")
    rows = [Row(row, f"rows:{n}") for n, row in enumerate(rows, start=1)]
    return read_records(rows, kind, _RECORD_TYPES[kind], "auto", report), report


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_system_and_history_are_turns_before_the_prompt(tokenizer, kind, row):
    tokenizer.chat_template = CHAT
    template = PromptTemplate(tokenizer)
    (plain,), report = read(kind, row)
    assert report.flagged == {}
    assert template.render(plain.prompt) == "[user]q[assistant]"
    for columns, before in (
        ({"system": "s"}, "[system]s"),
        ({"system_prompt": "s", "system": ""}, "[system]s"),
        ({"history": [["u", "v"], ["w", "x"]]}, "[user]u[assistant]v[user]w[assistant]x"),
        ({"system": "s", "system_prompt": "s", "history": [["u", "v"]]}, "[system]s[user]u[assistant]v"),
    ):
        (record,), report = read(kind, {**row, **columns})
        assert template.render(record.prompt, record.fields, "rows:1") == before + "[user]q[assistant]"
        used = {name for name, value in columns.items() if value}
        assert report.flagged == {f"column {name!r} is put before the prompt as turns": 1 for name in used}
        headings = PromptTemplate(tokenizer, "instruction").render(record.prompt)
        start = "s\n\n### Instruction:\n" if "[system]" in before else "### Instruction:\nu\n\n### Response:\nv"
        assert headings.startswith(start)
        assert headings.endswith("### Instruction:\nq\n\n### Response:\n")


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_what_is_not_read_is_counted_with_the_first_row(kind, row):
    unread = {
        "tools": [{"name": "f"}], "weight": 0, "train": False, "labels": [1], "label": False, "System": "x",
        "functions": "f", "images": ["i.png"], "chat_template_kwargs": {"x": 1}, "margin": 0.5, "history": "text",
        "passage": "p",
    }  # fmt: skip
    harmless = {"id": 3, "source": "web", "date": datetime.date(2024, 1, 1)}
    defaults = {"tools": [], "weight": 1, "train": True, "system": None, "history": [], "labels": float("nan")}
    (_, two), report = read(kind, {**row, **harmless, **defaults}, {**row, **unread})
    assert report.flagged == {f"column {name!r} is not read by the format": 1 for name in unread}
    line = next(line for line in report.format_table().split("\n") if "'tools'" in line)
    assert line.split() == [
        "of",
        "these:",
        "column",
        "'tools'",
        "is",
        "not",
        "read",
        "by",
        "the",
        "format",
        "1",
        "first:",
        "rows:2",
    ]
    assert two.fields["weight"] == 0


def test_a_system_column_that_cannot_be_put_before_is_counted():
    own = {"messages": [{"role": "system", "content": "own"}, USER, REPLY]}
    for row in ({"prompt": "text", "completion": "a"}, own):
        (plain,), _ = read("demonstration", row)
        (record,), report = read("demonstration", {**row, "system": "s"})
        assert record.prompt == plain.prompt
        assert report.flagged == {"column 'system' is not read by the format": 1}
    (_,), report = read("demonstration", {"instruction": "q", "output": "a", "system": "s", "system_prompt": "t"})
    assert len(report.flagged) == 2
    # its text is in the prompt already
    assert read("demonstration", {"prompt": "s\n\ntext", "completion": "a", "system": "s"})[1].flagged == {}


@pytest.mark.parametrize("name", ["weight", "train", "tool_calls", "reasoning_content", "loss_mask"])
def test_keys_of_turns_are_counted(name):
    for row in ({"messages": [USER, {**REPLY, name: 0}]}, {"prompt": [{**USER, name: [0]}], "completion": "a"}):
        assert read("demonstration", row)[1].flagged == {f"{name!r} of a turn is not read by the format": 1}
    defaults = {"messages": [{**USER, "weight": 1, "train": True}, {**REPLY, name: None}]}
    assert read("demonstration", defaults)[1].flagged == {}


def test_earlier_replies_are_targets_behind_a_system_column(attach, write, tokenizer):
    from lit_rlhf.data import DemonstrationDataModule

    tokenizer.chat_template = CHAT
    turns = [USER, REPLY, {**USER, "content": "r"}, {**REPLY, "content": "b"}]
    rows = [{"messages": turns, "system": "s"}, {"messages": [{"role": "system", "content": "s"}, *turns]}]
    module = attach(DemonstrationDataModule(write(rows), micro_batch_size=1), tokenizer)
    column, turn = module.training_rows
    assert column == turn and sum(turn.loss_mask) == len("a") + len("b") + 1


def test_a_template_that_names_the_column_places_it_itself(tokenizer):
    (record,), _ = read("demonstration", {"instruction": "q", "input": "i", "output": "a", "system": "s"})
    render = lambda text: PromptTemplate(tokenizer, text).render(record.prompt, record.fields)  # noqa: E731
    assert render("{{ system }}|{{ instruction }}|{{ input }}|{{ messages | length }}") == "s|q|i|1"
    assert render("{{ instruction }}|{{ input }}|{{ messages | length }}") == "s\n\nq|i|2"
    assert render("{{ prompt }}") == "s\n\nq\n\ni" == to_plain_text(record.prompt)


def test_few_shot_examples_share_their_context():
    rows = [{"instruction": "do", "input": i, "output": i * 2, "system": "s", "task": "t"} for i in "xyz"]
    records, report = read("demonstration", *rows)
    for record in expand_few_shot(records, "task", None, 0, report):
        assert isinstance(record.prompt, PromptInContext)
        roles = [message["role"] for message in to_messages(record.prompt)]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


def test_an_empty_turn_is_as_an_empty_text():
    blank = {"role": "user", "content": " "}
    for kind, rows in {
        "demonstration": [{"prompt": [blank], "completion": "a"}, {"messages": [USER, REPLY, blank, REPLY]}],
        "ranking": [{"prompt": [USER, REPLY, blank], "completions": ["a", "b"], "ranks": [0, 1]}],
        "prompt": [{"prompt": [blank]}],
    }.items():
        for row in rows:
            good = {**row, "prompt": [USER]} if "prompt" in row else {"messages": [USER, REPLY]}
            _, report = read(kind, row, good)
            assert report.skipped == {"empty prompt": 1} and report.flagged == {}
    _, report = read("demonstration", {"messages": [USER, {**REPLY, "content": ""}, USER, REPLY]})
    assert report.flagged == {"a turn of the conversation is empty": 1}


def test_a_file_of_mixed_message_styles_is_read():
    first = {"role": None, "content": None, "from": "human", "value": "q"}
    mixed = [first, {**REPLY, "from": None, "value": float("nan")}]
    (record,), _ = read("demonstration", {"messages": mixed})
    assert (record.prompt, record.completion) == ([USER], "a")
    for turn in ({**USER, "value": "other"}, {**USER, "from": "gpt"}):
        with pytest.raises(UserError, match="rows:2: turn 1 of 'messages' has different values under "):
            read("demonstration", {"messages": [USER, REPLY]}, {"messages": [turn, REPLY]})


@pytest.mark.parametrize("ranks", [[0, float("nan")], [0, float("inf")], [0, "1"], [0, True], [0, None], [[0], 1]])
def test_ranks_that_are_no_numbers(ranks):
    with pytest.raises(UserError, match="rows:1: the ranks must be numbers"):
        read("ranking", {"prompt": "q", "completions": ["a", "b"], "ranks": ranks})


def test_huge_ranks_are_numbers():
    (record,), _ = read("ranking", {"prompt": "q", "completions": ["a", "b"], "ranks": [10**400, -(10**400)]})
    assert record.ranks == [1, 0]


@pytest.mark.parametrize(
    "record",
    [
        Demonstration(None, "a"),
        Demonstration([{"role": "tool", "content": "x"}], "a"),
        Demonstration([USER, "b"], "a"),
        Demonstration("q", 5),
        Demonstration("q\ud83d", "a"),
        {"prompt": "q", "completion": "\ud83d"},
    ],
)
def test_a_function_of_ones_own_returns_texts(record, monkeypatch):
    monkeypatch.setattr("lit_rlhf.data.formats.registry.import_function", lambda path, setting: lambda fields: record)
    with pytest.raises(UserError, match=r"^rows:1: (the record's|a text holds)"):
        read_records([Row({}, "rows:1")], "demonstration", Demonstration, "my.function", DatasetReport("rows"))
