"""Conversation trees: one tree becomes many records."""

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from tests.helpers.rows import assistant, convert, user

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
        "rows read                                           1\n"
        "  made into records                                 4\n"
        "  skipped: deleted message, with all replies to it  1  first: rows.jsonl:1\n"
        "rows kept                                           3"
    )
    (ranking,), _ = convert("ranking", TREE)
    assert ranking[:3] == ([user("q")], ["a", "b"], [1, 0])
    prompts, _ = convert("prompt", TREE)
    assert [record.prompt for record in prompts] == [[user("q")], [user("q"), assistant("a"), user("r")]]


def test_real_trees_hold_the_real_rankings(shared):
    """The groups of `oasst_kwise` were extracted from the same trees independently."""

    def read(name, kind, record_type):
        path = str(shared / name)
        return read_records(read_rows(path), kind, record_type, "auto", DatasetReport(path))

    def content(record):
        return repr(record.prompt), tuple(sorted(zip(record.ranks, record.completions)))

    trees = read("demonstrations/oasst_trees.jsonl.gz", "ranking", Ranking)
    groups = read("preferences/oasst_kwise.jsonl.gz", "ranking", Ranking)
    assert len(trees) == 164 and sorted(map(content, trees)) == sorted(map(content, groups))
    assert len(read("demonstrations/oasst_trees.jsonl.gz", "demonstration", Demonstration)) == 544
