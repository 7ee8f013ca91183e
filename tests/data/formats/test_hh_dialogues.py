"""Dialogues: the prompt of a comparison is what chosen and rejected share, turn by turn; trees become many records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data.formats.hh_dialogues import split_shared_prefix, split_turns
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration, Instruction, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row, read_rows
from lit_rlhf.errors import UserError

TYPES = {"demonstration": Demonstration, "ranking": Ranking, "prompt": PromptRow}
H, A = "\n\nHuman:", "\n\nAssistant:"


def convert(kind, *rows, format="auto"):
    report = DatasetReport("rows.jsonl")
    placed = [Row(fields, f"rows.jsonl:{number}") for number, fields in enumerate(rows, start=1)]
    return read_records(placed, kind, TYPES[kind], format, report), report


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


words = st.lists(st.sampled_from(["a", "b", "Human:", "\n\n", "Assistant:"]), max_size=3).map(
    lambda each: "".join(each)
)
dialogue = st.lists(st.tuples(st.sampled_from([H, A]), words).map("".join), min_size=1, max_size=5).map("".join)


@given(dialogue, dialogue)
def test_parts_make_the_dialogues_again_and_share_all_they_can(one, other):
    parted = split_shared_prefix(split_turns(one), split_turns(other))
    shared = "".join(parted.shared)
    assert shared + "".join(parted.chosen) == one and shared + "".join(parted.rejected) == other
    assert parted.chosen and parted.rejected
    one_left = len(parted.chosen) == 1 or len(parted.rejected) == 1
    assert parted.chosen[0] != parted.rejected[0] or one_left


GOOD = {"chosen": f"{H} h{A} a", "rejected": f"{H} h{A} b"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "prompt"),
    [
        (f"{H} q{A} same", f"{H} q{A} same", "chosen equals rejected", f"{H} q{A}"),
        (f"{H} q{A} one", f"{H} q{A}", "empty completion", f"{H} q{A}"),
        (f"{H} q{A} one", f"{H} r{A} two", "chosen and rejected differ before the last reply", f"{H} q{A}"),
        # they part at a reply, and one of them goes on: the prompt is shared, the replies cannot be compared
        (
            f"{H} q{A} x{H} r{A} y",
            f"{H} q{A} z",
            "chosen and rejected differ before the last reply",
            f"{H} q{A}",
        ),
        (f"{H} q{A} x{A} y", f"{H} q{A} z", "chosen and rejected differ before the last reply", f"{H} q{A}"),
        (f"{H} q{A} x{H} r", f"{H} q{A} x{H} s", "dialogue does not end with a reply", f"{H} q{A}"),
    ],
)
def test_edge_cases_are_counted_and_keep_their_prompt(chosen, rejected, reason, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    records, report = convert("ranking", GOOD, row)
    assert len(records) == 1 and report.skipped == {reason: 1}
    assert [record.prompt for record in convert("prompt", row)[0]] == [prompt]


def test_a_reply_that_spells_a_turn_is_shared_as_one():
    (record,), _ = convert("ranking", {"chosen": f"s{H} h{A} x{A} a", "rejected": f"s{H} h{A} x{A} b"})
    assert record[:2] == (f"s{H} h{A} x{A}", [" a", " b"])


def test_dialogues_as_conversations_for_a_chat_template():
    row = {"chosen": f"Be kind.{H} h{A} x{H} j{A} a ", "rejected": f"Be kind.{H} h{A} x{H} j{A} b"}
    (record,), _ = convert("ranking", row, format="chosen_rejected_chat")
    turns = [{"role": "system", "content": "Be kind."}, user("h"), assistant("x"), user("j")]
    assert record[:3] == (turns, ["a", "b"], [0, 1])
    assert convert("prompt", row, format="chosen_rejected_chat")[0][0].prompt == turns


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]}, [user("u")]),
        ({"prompt": "u", "chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]}, [user("u")]),
        ({"prompt": [user("u")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, [user("u")]),
        ({"prompt": "u", "chosen": [assistant("a")], "rejected": [assistant("b")]}, "u"),
        ({"question": "u", "chosen": "a", "rejected": "b"}, Instruction("u")),
    ],
)
def test_pairs_as_lists_of_messages(fields, prompt):
    (record,), _ = convert("ranking", fields)
    assert record[:3] == (prompt, ["a", "b"], [0, 1])
    assert convert("prompt", fields)[0][0].prompt == prompt


def test_lists_of_messages_that_differ_or_say_nothing():
    good = {"chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]}
    other = {"chosen": [user("v"), assistant("a")], "rejected": [user("u"), assistant("b")]}
    records, report = convert("ranking", good, other)
    assert len(records) == 1 and report.skipped == {"chosen and rejected differ before the last reply": 1}
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 'chosen' and 'rejected' must each hold a message"):
        convert("ranking", good, {"chosen": [], "rejected": [user("u")]})


def test_conversations_of_either_naming_learn_every_reply():
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    (record,), report = convert("demonstration", {"conversations": [*turns, *turns, {"from": "human", "value": "v"}]})
    assert record[:2] == ([user("u"), assistant("a"), user("u")], "a") and record.train_on_all_replies
    assert report.flagged == {"turns behind the last reply left out": 1}
    (record,), _ = convert("demonstration", {"prompt": [user("u"), assistant("x"), user("v")], "completion": "a"})
    assert not record.train_on_all_replies
    (record,), _ = convert("demonstration", {"prompt": [user("u")], "completion": [assistant("a")]})
    assert record[:2] == ([user("u")], "a")
    with pytest.raises(UserError, match=r":1: column 'completion' must hold one reply, it has 2 turns"):
        convert("demonstration", {"prompt": "p", "completion": [user("u"), assistant("a")]})


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "text": "q",
        "role": "prompter",
        "replies": [
            {"text": "a", "role": "assistant", "rank": 1, "replies": [{"text": "r", "role": "prompter"}]},
            {"text": "b", "role": "assistant", "rank": 0},
            {"text": "c", "role": "assistant"},
            {"text": "d", "role": "assistant", "rank": 2, "deleted": True, "replies": [{"text": "e", "role": "user"}]},
        ],
    },
}


def test_a_tree_becomes_a_record_for_each_message():
    records, report = convert("demonstration", TREE)
    assert [record[:2] for record in records] == [([user("q")], "a"), ([user("q")], "b"), ([user("q")], "c")]
    assert records[0].fields == {"message_tree_id": "t", "text": "a", "role": "assistant", "rank": 1}
    assert (report.num_read, report.num_kept) == (1, 3)
    assert report.format_table() == (
        "rows.jsonl\n"
        "rows read                                                 1\n"
        "  made into records                                       4\n"
        "  skipped: deleted message, with all that was said to it  1  first: rows.jsonl:1\n"
        "rows kept                                                 3"
    )
    (ranking,), _ = convert("ranking", TREE)
    assert ranking[:3] == ([user("q")], ["a", "b"], [1, 0])
    prompts, _ = convert("prompt", TREE)
    assert [record.prompt for record in prompts] == [[user("q")], [user("q"), assistant("a"), user("r")]]


def test_real_trees_hold_the_real_rankings(shared):
    """The groups of `oasst_kwise` were cut from the same trees by other hands."""

    def read(name, kind, record_type):
        path = str(shared / name)
        return read_records(read_rows(path), kind, record_type, "auto", DatasetReport(path))

    def content(record):
        return repr(record.prompt), tuple(sorted(zip(record.ranks, record.completions)))

    trees = read("demonstrations/oasst_trees.jsonl.gz", "ranking", Ranking)
    groups = read("preferences/oasst_kwise.jsonl.gz", "ranking", Ranking)
    assert len(trees) == 164 and sorted(map(content, trees)) == sorted(map(content, groups))
    assert len(read("demonstrations/oasst_trees.jsonl.gz", "demonstration", Demonstration)) == 544


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
