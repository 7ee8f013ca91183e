"""Dialogues: the prompt of a comparison is the turns that chosen and rejected share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data.formats.hh_dialogues import split_shared_prefix, split_turns
from lit_rlhf.data.records import Instruction
from lit_rlhf.errors import UserError
from tests.helpers.rows import assistant, convert, user

H, A = "\n\nHuman:", "\n\nAssistant:"


words = st.lists(st.sampled_from(["a", "b", "Human:", "\n\n", "Assistant:"]), max_size=3).map(
    lambda each: "".join(each)
)
dialogue = st.lists(st.tuples(st.sampled_from([H, A]), words).map("".join), min_size=1, max_size=5).map("".join)


@given(dialogue, dialogue)
def test_a_split_is_lossless_and_shares_as_many_turns_as_possible(one, other):
    split = split_shared_prefix(split_turns(one), split_turns(other))
    shared = "".join(split.shared)
    assert shared + "".join(split.chosen) == one and shared + "".join(split.rejected) == other
    assert split.chosen and split.rejected
    one_turn_left = len(split.chosen) == 1 or len(split.rejected) == 1
    assert split.chosen[0] != split.rejected[0] or one_turn_left


GOOD = {"chosen": f"{H} h{A} a", "rejected": f"{H} h{A} b"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason", "prompt"),
    [
        (f"{H} q{A} same", f"{H} q{A} same", "chosen equals rejected", f"{H} q{A}"),
        (f"{H} q{A} one", f"{H} q{A}", "empty completion", f"{H} q{A}"),
        (f"{H} q{A} one", f"{H} r{A} two", "chosen and rejected differ before the last reply", f"{H} q{A}"),
        # they differ at a reply, and one of them continues: the prompt is shared, the replies cannot be compared
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


SYSTEM = {"role": "system", "content": "s"}
DOUBLED = "turns of column 'prompt' are among those of chosen and rejected: given twice"


@pytest.mark.parametrize(
    ("given", "shared", "prompt", "flagged"),
    [
        ([user("q")], [user("q")], [user("q")], {}),
        ([user("q")], [user("q"), assistant("a"), user("r")], [user("q"), assistant("a"), user("r")], {}),
        ([SYSTEM, user("q")], [user("q")], [SYSTEM, user("q")], {}),
        ([SYSTEM], [user("q")], [SYSTEM, user("q")], {}),
        ([user("q")], [SYSTEM, user("q")], [user("q"), SYSTEM, user("q")], {DOUBLED: 1}),
    ],
)
def test_a_prompt_beside_full_dialogues_is_given_once(given, shared, prompt, flagged):
    row = {"prompt": given, "chosen": [*shared, assistant("x")], "rejected": [*shared, assistant("y")]}
    (record,), report = convert("ranking", row)
    assert (record.prompt, record.completions, report.flagged) == (prompt, ["x", "y"], flagged)
    assert convert("prompt", row)[0][0].prompt == prompt
