"""The paper's data steps: each against an independent definition, for any order of the rows; and their table."""

import random
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_rlhf.data.preprocessing.duplicates import drop_duplicates
from lit_rlhf.data.preprocessing.few_shot import expand_few_shot
from lit_rlhf.data.preprocessing.pii import PIIDetector, PresidioPatterns, drop_pii
from lit_rlhf.data.preprocessing.settings import DemonstrationPreprocessing, Preprocessing
from lit_rlhf.data.preprocessing.splits import split_by_column
from lit_rlhf.data.preprocessing.users import cap_prompts_per_user
from lit_rlhf.data.records import Demonstration, Instruction, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError

short = st.text("ab", min_size=1, max_size=5)
# (prompt, completion, user, tree)
rows = st.lists(st.tuples(short, short, st.sampled_from(["x", "y", None]), st.integers(0, 4)), min_size=1, max_size=14)


def make_demonstrations(tuples):
    return [
        Demonstration(prompt, completion, {"user": user, "tree": tree}, f"rows.jsonl:{n}")
        for n, (prompt, completion, user, tree) in enumerate(tuples, start=1)
    ]


def contents(records):
    return sorted((record.prompt, record.completion, repr(record.fields)) for record in records)


def report():
    return DatasetReport("rows.jsonl")


@given(rows, st.integers(1, 4), st.integers(0, 2), st.randoms(use_true_random=False))
def test_no_two_prompts_share_a_long_prefix(tuples, characters, seed, shuffle):
    records, counts = make_demonstrations(tuples), report()
    kept = drop_duplicates(records, characters, seed, counts)
    assert [record for record in records if record in kept] == kept  # in their order
    for record in records:
        duplicates_kept = [
            other
            for other in kept
            if other.prompt == record.prompt
            or (len(record.prompt) >= characters and other.prompt[:characters] == record.prompt[:characters])
        ]
        assert len(duplicates_kept) == 1
    assert list(counts.skipped.values()) == [len(records) - len(kept)]
    others = list(records)
    shuffle.shuffle(others)
    pairs = lambda some: sorted((record.prompt, record.completion) for record in some)  # noqa: E731
    assert pairs(drop_duplicates(others, characters, seed, report())) == pairs(kept)


def test_two_labelers_of_one_prompt_are_no_duplicates():
    rankings = [Ranking("p", ["a", "b"], [0, 1], labeler, {}, labeler) for labeler in ("ann", "bob", "bob")]
    assert [record.labeler for record in drop_duplicates(rankings, 3, 0, report())] == ["ann", "bob"]


@given(rows, st.integers(1, 3), st.integers(0, 2), st.randoms(use_true_random=False))
def test_a_user_has_at_most_limit_prompts(tuples, limit, seed, shuffle):
    records, counts = make_demonstrations(tuples), report()
    kept = cap_prompts_per_user(records, "user", limit, seed, counts)
    given, remaining = defaultdict(set), defaultdict(set)
    for record in records:
        given[record.fields["user"]].add(record.prompt)
    for record in kept:
        remaining[record.fields["user"]].add(record.prompt)
    for user, prompts in given.items():
        assert remaining[user] <= prompts
        assert len(remaining[user]) == (len(prompts) if user is None else min(limit, len(prompts)))
    assert len(kept) == sum(
        record.prompt in remaining[record.fields["user"]] for record in records
    )  # all of each prompt
    others = list(records)
    shuffle.shuffle(others)
    assert contents(cap_prompts_per_user(others, "user", limit, seed, report())) == contents(kept)


@given(rows, st.floats(0.2, 0.8), st.integers(0, 2), st.randoms(use_true_random=False))
def test_a_split_by_column_shares_neither_value_nor_prompt(tuples, fraction, seed, shuffle):
    records, counts = make_demonstrations(tuples), report()
    trees = {record.fields["tree"] for record in records}
    if not 0 < round(fraction * len(trees)) < len(trees):
        with pytest.raises(
            UserError, match=r"preprocessing\.split_by: column 'tree' has \d values? in 'rows\.jsonl'; "
        ):
            split_by_column(records, "tree", fraction, seed, report())
        return
    training, held_out = split_by_column(records, "tree", fraction, seed, counts)
    held_trees = {record.fields["tree"] for record in held_out}
    assert len(held_trees) == round(fraction * len(trees))
    assert held_out == [record for record in records if record.fields["tree"] in held_trees]
    assert not held_trees & {record.fields["tree"] for record in training}
    assert not {record.prompt for record in held_out} & {record.prompt for record in training}
    dropped = [record for record in records if record not in training and record not in held_out]
    assert counts.skipped == {"prompt is also held out for validation": len(dropped)}
    others = list(records)
    shuffle.shuffle(others)
    again = split_by_column(others, "tree", fraction, seed, report())
    assert [contents(part) for part in again] == [contents(training), contents(held_out)]


def test_a_missing_or_constant_column_is_refused():
    records = make_demonstrations([("p", "c", "x", 1), ("q", "c", "x", 2)])
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: no column 'usr', which preprocessing\.split_by names; .*'user'"
    ):
        split_by_column(records, "usr", 0.5, 0, report())
    with pytest.raises(
        UserError, match=r"column 'user' has 1 value in 'rows\.jsonl'; it cannot be split by that column"
    ):
        split_by_column(records, "user", 0.5, 0, report())
    with pytest.raises(UserError, match=r"no column 'usr', which preprocessing\.user_column names"):
        cap_prompts_per_user(records, "usr", 1, 0, report())


class Digits(PIIDetector):
    def find(self, text):
        return ["NUMBER"] if any(character.isdigit() for character in text) else []


def test_personal_data_in_prompt_or_reply_is_dropped():
    demonstrations = [Demonstration(*each, {}, each[0]) for each in (("a", "b"), ("a1", "b"), ("c", "b 2"))]
    counts = report()
    assert drop_pii(demonstrations, Digits(), counts) == demonstrations[:1]
    assert counts.skipped == {"personal data: NUMBER": 2} and "first: a1" in counts.format_table()
    rankings = [Ranking("p", [" x", "3"], [0, 1]), Ranking(Instruction("i", "4"), ["x", "y"], [0, 1])]
    assert drop_pii(rankings, Digits(), report()) == []
    prompts = [PromptRow([{"role": "user", "content": "5"}]), PromptRow("six")]
    assert drop_pii(prompts, Digits(), report()) == prompts[1:]


def test_presidio_finds_patterns_without_network(monkeypatch):
    pytest.importorskip("presidio_analyzer")
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **settings: pytest.fail("it looked up a host"))
    detector = PresidioPatterns()
    for text, kind in {
        "write to jane.doe@example.com": "EMAIL_ADDRESS",
        "call +1 415 555 2671": "PHONE_NUMBER",
        "pay with 4111 1111 1111 1111": "CREDIT_CARD",
        "to DE89 3704 0044 0532 0130 00": "IBAN_CODE",
        "from 192.168.1.77": "IP_ADDRESS",
    }.items():
        assert kind in detector.find(text)
    assert detector.find("Write a story about 3 bears, and mail@home.") == []
    with pytest.raises(UserError, match=r"no recognizer 'EmailRecognizr' \(did you mean 'EmailRecognizer'\?\)"):
        PresidioPatterns(["EmailRecognizr"]).find("x")


def test_presidio_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(UserError, match=r"PresidioPatterns needs presidio-analyzer .*pip install 'lit-rlhf\[pii\]'"):
        PresidioPatterns().find("x")
    found = SimpleNamespace(entity_type="BADGE", score=0.9)
    own = SimpleNamespace(supported_entities=["BADGE"], analyze=lambda text, *_: [found] * text.count("badge"))
    detector = PresidioPatterns([own])  # a recognizer that was built already
    assert (detector.find("badge 7, badge 8"), detector.find("x")) == (["BADGE"], [])


def make_pairs(*tuples, prompt=lambda text: text):
    return [Demonstration(prompt(p), c, {"task": task}, p) for p, c, task in tuples]


def test_k_pairs_become_k_few_shot_examples():
    records = make_pairs(("a:", "1", "t"), ("b:", "2", "t"), ("c:", "3", "t"), ("d:", "4", "u"))
    counts = report()
    expanded = expand_few_shot(records, "task", None, 0, counts)
    assert [record.completion for record in expanded] == ["1", "2", "3", "4"]
    for record, example in zip(records[:3], expanded):
        *context, prompt = example.prompt.split("\n\n")
        assert prompt == record.prompt
        assert sorted(context) == sorted(f"{each.prompt}{each.completion}" for each in records[:3] if each != record)
    assert expanded[3] == records[3]
    assert counts.flagged == {"few-shot: the only pair of its 'task', without context": 1}
    with pytest.raises(UserError, match=r"no column 'tsk', which preprocessing\.few_shot_by names"):
        expand_few_shot(records, "tsk", None, 0, report())


def test_a_shared_instruction_is_given_once():
    records = make_pairs(("x", "1", "t"), ("y", "2", "t"), prompt=lambda text: Instruction("Do.", text))
    first, second = expand_few_shot(records, "task", None, 0, report())
    assert first.prompt == [
        {"role": "user", "content": "Do.\n\ny"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "x"},
    ]
    assert [turn["content"] for turn in second.prompt] == ["Do.\n\nx", "1", "y"]
    differing = [first._replace(prompt=Instruction("Do.", "x")), second._replace(prompt=Instruction("Go.", "y"))]
    assert expand_few_shot(differing, "task", None, 0, report())[0].prompt[-1]["content"] == "Do.\n\nx"


@given(st.integers(2, 17), st.integers(2, 6), st.integers(0, 3))
def test_large_tasks_are_split_into_groups_of_equal_size(num_pairs, max_pairs, seed):
    records = make_pairs(*((f"p{n}:", str(n), "t") for n in range(num_pairs)))
    sizes = [record.prompt.count("\n\n") + 1 for record in expand_few_shot(records, "task", max_pairs, seed, report())]
    assert max(sizes) <= max_pairs and max(sizes) - min(sizes) <= 1
    random.Random(0).shuffle(records)
    again = expand_few_shot(records, "task", max_pairs, seed, report())
    assert sorted(record.prompt.count("\n\n") + 1 for record in again) == sorted(sizes)


def test_the_steps_in_their_order_in_one_table(attach, write, caplog):
    rows = [{"prompt": f"prompt {word}", "user": word[0]} for word in ("aa", "ab", "ac", "ba", "bb", "ca", "da", "db")]
    rows += [{"prompt": "prompt aa again", "user": "a"}, {"prompt": "prompt ba", "user": "b"}]  # duplicates
    rows += [{"prompt": "prompt 1", "user": "e"}, {"prompt": "prompt 2", "user": "f"}]  # personal data
    pairs = [{**row, "chosen": "good", "rejected": "bad"} for row in rows]
    pairs.append({**pairs[0], "rejected": "good"})
    settings = Preprocessing(
        dedup_prefix_chars=9, user_column="user", max_prompts_per_user=2, split_by="user", pii=Digits()
    )
    with caplog.at_level("INFO"):
        data = attach(
            ComparisonDataModule(
                write(pairs),
                validation_fraction=0.5,
                preprocessing=settings,
                max_prompt_length=13,
                micro_batch_size=1,
                seed=1,
            )
        )
    start = caplog.text.index("rows read")
    table = [line.split("  first: ")[0].rsplit(maxsplit=1) for line in caplog.text[start:].splitlines()]
    assert table[:7] == [
        ["rows read", "13"],
        ["  skipped: chosen equals rejected", "1"],
        ["  skipped: prompt shares its first 9 characters with another", "2"],
        ["  skipped: more than 2 prompts of one 'user'", "1"],
        ["  skipped: prompt is also held out for validation", "0"],
        ["  skipped: personal data: NUMBER", "1"],  # of two; the other's user is held out, where PII is not dropped
        ["  skipped: prompt longer than 13 tokens", "1"],
    ]
    # 9 prompts of 6 users were left; 3 of the users are held out
    assert table[7] == ["rows kept", "7"]
    assert len(data.training_rows) + len(data.validation_rows) == 7


def test_personal_data_is_dropped_from_the_training_split_only(attach, write):
    path = write([{"prompt": f"p{n}", "completion": "a" * (n + 1)} for n in range(8)])
    for kind in (DemonstrationDataModule, PromptDataModule):
        settings = {"preprocessing": DemonstrationPreprocessing(pii=OnlyEven()), "validation_path": path}
        data = attach(kind(path, **settings))
        training, validation = (
            (data.training_rows, data.validation_rows)
            if kind is DemonstrationDataModule
            else (data.prompts.prompts, data.validation_prompts.prompts)
        )
        assert (len(training), len(validation)) == (4, 8)


class OnlyEven(PIIDetector):
    def find(self, text):
        return ["ODD"] if text[-1] in "13579" else []


def test_a_detector_by_dotted_path(attach, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_pii.py").write_text(
        "def find(text): return ['AT'] if '@' in text else []\ndef bad(text): return 'AT'\n"
    )
    path = write([{"prompt": "a@b"}, {"prompt": "c"}])
    data = attach(PromptDataModule(path, preprocessing=Preprocessing(pii="my_pii.find")))
    assert [prompt.row["prompt"] for prompt in data.prompts.prompts] == ["c"]
    with pytest.raises(UserError, match=r"preprocessing\.pii: my_pii\.bad returned a str, not a list of kinds"):
        attach(PromptDataModule(path, preprocessing=Preprocessing(pii="my_pii.bad")))
    with pytest.raises(UserError, match=r"preprocessing\.pii: 'my_pii\.nothing' cannot be imported"):
        PromptDataModule(path, preprocessing=Preprocessing(pii="my_pii.nothing"))
    sys.modules.pop("my_pii")


def test_prompts_are_held_out_like_demonstrations(attach, write):
    """One split for the three stages: the same prompts are on the validation side of each."""
    path = write([{"prompt": f"p{n % 9}", "completion": "c", "chosen": "a", "rejected": "b"} for n in range(27)])
    settings = {"validation_fraction": 0.3, "seed": 2}
    demonstrations = attach(DemonstrationDataModule(path, micro_batch_size=1, **settings))
    comparisons = attach(ComparisonDataModule(path, micro_batch_size=1, **settings))
    prompts = attach(PromptDataModule(path, **settings))
    held = {tuple(prompt.input_ids) for prompt in prompts.validation_prompts.prompts}
    assert len(held) == 3 and not held & {tuple(prompt.input_ids) for prompt in prompts.prompts.prompts}
    assert {tuple(row.prompt) for row in comparisons.validation_rows} == held
    prompt_ids = [
        [i for i, target in zip(row.input_ids, row.loss_mask) if not target] for row in demonstrations.validation_rows
    ]
    assert {tuple(each) for each in prompt_ids} == held
    assert [batch.index.tolist() for batch in prompts.val_dataloader()] == [list(range(9))]


def test_validation_prompts_in_the_training_data_are_counted(attach, write, caplog):
    path = write([{"prompt": f"p{n}", "completion": "c"} for n in range(4)])
    other = write([{"prompt": f"p{n}", "completion": "d"} for n in (2, 3, 9)], "validation.jsonl")
    with caplog.at_level("INFO"):
        attach(DemonstrationDataModule(path, validation_path=other, micro_batch_size=1))
    assert "of these: prompt is also in the training data  2" in caplog.text


def test_few_shot_demonstrations_reach_the_batch(attach, write, tokenizer):
    path = write([{"prompt": f"{n}=", "completion": str(n), "task": "t"} for n in range(3)])
    settings = DemonstrationPreprocessing(few_shot_by="task")
    data = attach(DemonstrationDataModule(path, preprocessing=settings, micro_batch_size=1))
    for row in data.training_rows:
        text = tokenizer.decode([i for i, target in zip(row.input_ids, row.loss_mask) if not target])
        targets = tokenizer.decode([i for i, target in zip(row.input_ids, row.loss_mask) if target])
        assert targets == f"{text[-2]}<eos>" and text.count("=") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dedup_prefix_chars": 0}, r"preprocessing\.dedup_prefix_chars: 0 must be at least 1"),
        ({"max_prompts_per_user": 0, "user_column": "u"}, r"max_prompts_per_user: 0 must be at least 1"),
        ({"max_prompts_per_user": 200}, r"max_prompts_per_user and preprocessing\.user_column need each other"),
        ({"user_column": "u"}, "need each other: set both"),
        ({"split_by": "u"}, r"preprocessing\.split_by says how to hold out data: set validation_fraction as well"),
        ({"few_shot_pairs": 4}, r"few_shot_pairs has no effect without preprocessing\.few_shot_by"),
        ({"few_shot_pairs": 1, "few_shot_by": "u"}, "few_shot_pairs: 1 must be at least 2"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(UserError, match=message):
        DemonstrationDataModule("rows.jsonl", preprocessing=DemonstrationPreprocessing(**settings))


BLANKS = [None, "", " ", float("nan")]


def test_rows_without_a_user_are_no_user():
    counts = report()
    records = make_demonstrations([(str(n), "c", user, 0) for n, user in enumerate([*BLANKS, "x", "x"])])
    kept = cap_prompts_per_user(records, "user", 1, 0, counts)
    assert len(kept) == 5 and kept[:4] == records[:4]
    assert counts.flagged == {"without a 'user', not limited": 4}


def test_rows_without_a_value_are_split_by_their_prompt():
    counts = report()
    records = make_demonstrations([(str(n % 20), "c", BLANKS[n % 4], 0) for n in range(40)])
    training, validation = split_by_column(records, "user", 0.1, 0, counts)
    assert (len(training), len(validation)) == (36, 4)  # 2 of 20 prompts
    assert not {each.prompt for each in training} & {each.prompt for each in validation}
    assert counts.flagged == {"without a 'user', split by prompt": 40}


def test_demonstrations_without_a_task_are_no_task():
    counts = report()
    records = make_demonstrations([(str(n), "c", user, 0) for n, user in enumerate([*BLANKS, "x", "x"])])
    expanded = expand_few_shot(records, "user", None, 0, counts)
    assert expanded[:4] == records[:4] and expanded[4].prompt == "5c\n\n4"
    assert counts.flagged == {"few-shot: without a 'user', and so without context": 4}
    assert counts.extra_lines == ["few-shot: 2 pairs of 1 tasks by 'user'"]
