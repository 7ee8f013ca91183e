"""The real files: their counts are those in their README."""

from collections import Counter

import pytest

from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule, load_text_blocks
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows

TYPES = {"demonstration": Demonstration, "ranking": Ranking, "prompt": PromptRow}


def convert(path, kind):
    report = DatasetReport(path.name)
    return read_records(read_rows(str(path)), kind, TYPES[kind], "auto", report), report


@pytest.mark.parametrize(
    ("name", "kind", "read", "skipped"),
    [
        ("preferences/finegrained_qa.jsonl.gz", "ranking", 399, {"all completions tied": 11}),
        ("preferences/oasst_kwise.jsonl.gz", "ranking", 164, {}),
        (
            "preferences/hh_harmless.jsonl.gz",
            "ranking",
            1866,
            {"chosen and rejected differ before the last reply": 2, "empty completion": 2},
        ),
        ("preferences/polite_rude.json", "ranking", 1100, {"chosen equals rejected": 6}),
        ("preferences/polite_rude.json", "demonstration", 1100, {}),
        ("demonstrations/small_instructions.json", "demonstration", 1100, {}),
        ("demonstrations/dolly_partial.jsonl.gz", "demonstration", 5051, {}),
        ("demonstrations/gsm8k_train.jsonl.gz", "demonstration", 7473, {}),
        ("prompts/prompt_lottery_en_250_text.jsonl", "prompt", 250, {}),
        ("prompts/awesome_prompts.csv", "prompt", 217, {}),
        ("demonstrations/seed_tasks.jsonl", "prompt", 175, {}),
        ("evaluation/ifeval.jsonl", "prompt", 541, {}),
    ],
)
def test_counts(shared, name, kind, read, skipped):
    records, report = convert(shared / name, kind)
    assert (report.num_read, report.skipped) == (read, skipped)
    assert len(records) == report.num_kept == read - sum(skipped.values())


def test_sizes_of_rankings(shared):
    records, _ = convert(shared / "preferences" / "oasst_kwise.jsonl.gz", "ranking")
    sizes = Counter(len(record.completions) for record in records)
    assert sizes == {3: 90, 2: 42, 4: 22, 6: 6, 5: 2, 9: 1, 8: 1}
    assert all(sorted(record.ranks) == list(range(len(record.ranks))) for record in records)
    records, _ = convert(shared / "preferences" / "finegrained_qa.jsonl.gz", "ranking")
    assert {len(record.completions) for record in records} == {4}
    assert all(record.prompt.input for record in records)


def test_pair_labels_against_an_independent_count(shared):
    rows = read_rows(str(shared / "preferences" / "finegrained_qa.jsonl.gz"))
    labels = Counter(label for row in rows for label in row.fields["preference"])
    assert labels == {0: 307, 1: 1255, 2: 832}
    records, report = convert(shared / "preferences" / "finegrained_qa.jsonl.gz", "ranking")
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    contradicted = 0
    for record in records:
        order = [
            0 if record.ranks[i] == record.ranks[j] else 1 if record.ranks[i] < record.ranks[j] else 2 for i, j in pairs
        ]
        contradicted += order != record.fields["preference"]
    assert report.flagged == {"ranks by wins contradict a pair label": contradicted}
    assert 0 < contradicted < len(records) / 4


def test_texts(shared, gpt2):
    for name, documents in (("inaugural.jsonl.gz", 59), ("tinyshakespeare.txt.gz", 7222)):
        assert len(read_rows(str(shared / "pretraining" / name))) == documents
    blocks = load_text_blocks(str(shared / "pretraining" / "inaugural.jsonl.gz"), gpt2, 256)
    joined = blocks.blocks.flatten().tolist()
    assert joined.count(gpt2.eos_token_id) in (58, 59)  # one after each document; the last may be truncated
    first = read_rows(str(shared / "pretraining" / "inaugural.jsonl.gz"))[0].fields["text"]
    assert gpt2.decode(joined[: joined.index(gpt2.eos_token_id)]) == first


def test_real_demonstrations_with_the_real_tokenizer(shared, gpt2, attach):
    path = str(shared / "preferences" / "polite_rude.json")
    data = attach(DemonstrationDataModule(path, micro_batch_size=8), gpt2)
    rows = {row.fields["output"]: row.fields for row in read_rows(path)}
    for batch in data.train_dataloader():
        for line, loss_mask in zip(batch.input_ids, batch.loss_mask):
            completion = line[loss_mask].tolist()
            assert completion[-1] == gpt2.eos_token_id and gpt2.decode(completion[:-1]) in rows
            assert completion.count(gpt2.eos_token_id) == 1
    prompts = attach(PromptDataModule(path), gpt2).prompts.prompts
    comparisons = attach(ComparisonDataModule(path), gpt2).training_rows
    trained = [[i for i, target in zip(row.input_ids, row.loss_mask) if not target] for row in data.training_rows]
    assert [prompt.input_ids for prompt in prompts] == trained
    differing = [
        prompt.input_ids for prompt in prompts if prompt.row["chosen"].strip() != prompt.row["rejected"].strip()
    ]
    assert [row.prompt for row in comparisons] == differing and len(differing) == 1094


def test_real_dialogues_split_at_the_last_reply(shared):
    path = shared / "preferences" / "hh_harmless.jsonl.gz"
    records, _ = convert(path, "ranking")
    originals = {row.origin: row.fields for row in read_rows(str(path))}
    for record in records:
        assert [record.prompt + each for each in record.completions] == list(originals[record.origin].values())
        assert record.prompt.endswith("\n\nAssistant:")
