"""The four data modules: the content of their batches, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lit_rlhf.data import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PretrainingDataModule,
    PromptDataModule,
    PromptSource,
    TextBlocks,
    load_text_blocks,
)
from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.data.loader import BatchShape, epoch_permutation
from lit_rlhf.errors import UserError

DEMONSTRATIONS = [
    {"instruction": f"say {'x' * n}", "input": "", "output": f"answer {'y' * (n % 5)}"} for n in range(12)
]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_loss_is_on_completion_and_eos_only(attach, write, tokenizer):
    data = attach(DemonstrationDataModule(write(DEMONSTRATIONS), micro_batch_size=4))
    count = 0
    for batch in data.train_dataloader():
        assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.bool and batch.normalizer.dtype == torch.float32
        assert batch.normalizer.shape == () and batch.normalizer == batch.loss_mask.sum()
        for line, mask, loss_mask in zip(batch.input_ids, batch.attention_mask, batch.loss_mask):
            text = tokenizer.decode(line[mask.bool()])
            n = text.count("x")
            completion = [*ids(tokenizer, f"answer {'y' * (n % 5)}"), tokenizer.eos_token_id]
            prompt = ids(tokenizer, f"### Instruction:\nsay {'x' * n}\n\n### Response:\n")
            width = len(prompt) + len(completion)
            assert line.tolist() == prompt + completion + [tokenizer.pad_token_id] * (len(line) - width)
            assert mask.tolist() == [1] * width + [0] * (len(line) - width)
            assert loss_mask.nonzero().flatten().tolist() == list(range(len(prompt), width))
            count += 1
    assert count == 12


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "as is ", "completion": "c"}],
        [{"instruction": "do", "input": "it", "output": "c", "topic": "t"}],
        [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}]}],
    ],
)
@pytest.mark.parametrize("template", [None, "instruction", "{{ prompt }}?"])
def test_prompt_ids_are_the_same_in_training_and_generation(attach, write, bos_tokenizer, rows, template):
    path = write(rows)
    settings = {"template": template}
    demonstration = attach(DemonstrationDataModule(path, micro_batch_size=1, **settings), bos_tokenizer)
    comparison_rows = [
        {**row, "prompt": row.get("prompt"), "chosen": "c", "rejected": "d"} for row in rows if "prompt" in row
    ]
    (batch,) = demonstration.train_dataloader()
    trained = batch.input_ids[0][~batch.loss_mask[0]].tolist()
    prompts = attach(PromptDataModule(path, **settings), bos_tokenizer).prompts.get_batch(0, 1)
    assert prompts.input_ids[0].tolist() == trained
    assert trained[0] == 2 and trained.count(2) == 1
    if comparison_rows:
        data = attach(
            ComparisonDataModule(write(comparison_rows, "c.jsonl"), micro_batch_size=1, **settings), bos_tokenizer
        )
        assert data.training_rows[0].prompt == trained


def test_validation_fraction_keeps_a_prompt_on_one_side(attach, write):
    rows = [{"prompt": f"p{n % 20}", "completion": f"c{n}"} for n in range(60)]
    data = attach(DemonstrationDataModule(write(rows), validation_fraction=0.25, micro_batch_size=1, seed=3))

    def prompts(rows):
        return {tuple(i for i, target in zip(row.input_ids, row.loss_mask) if not target) for row in rows}

    assert (len(data.training_rows), len(data.validation_rows)) == (45, 15)
    assert not prompts(data.training_rows) & prompts(data.validation_rows)
    again = attach(DemonstrationDataModule(write(rows[::-1]), validation_fraction=0.25, micro_batch_size=1, seed=3))
    assert prompts(again.validation_rows) == prompts(data.validation_rows)
    other = attach(DemonstrationDataModule(write(rows), validation_fraction=0.25, micro_batch_size=1, seed=4))
    assert prompts(other.validation_rows) != prompts(data.validation_rows)


def test_validation_over_two_ranks_counts_every_target_once(attach, write):
    path = write(DEMONSTRATIONS[:3])
    num_targets = 0
    for rank in range(2):
        data = attach(
            DemonstrationDataModule(path, validation_path=path, micro_batch_size=1), world_size=2, global_rank=rank
        )
        batches = list(data.val_dataloader())
        assert len(batches) == 2
        num_targets += sum(int(batch.loss_mask.sum()) for batch in batches)
    assert num_targets == sum(len(f"answer {'y' * n}") + 1 for n in range(3))
    assert not batches[1].loss_mask.any()  # the second rank's second batch is a copy without targets


def test_limits_are_counted(attach, write, caplog):
    rows = [{"prompt": "p" * n, "completion": "c" * n} for n in range(1, 9)]
    with caplog.at_level("INFO"):
        data = attach(
            DemonstrationDataModule(write(rows), max_prompt_length=6, max_completion_length=5, micro_batch_size=1)
        )
    assert [sum(row.loss_mask) for row in data.training_rows] == [2, 3, 4, 5, 5, 5]
    assert "skipped: prompt longer than 6 tokens  2" in caplog.text
    assert "of these: completion cut to 5 tokens  2" in caplog.text
    with pytest.raises(UserError, match=r"no row is left of .*: rows read 7 · kept 0 · 7 prompt longer than 1 tokens"):
        attach(DemonstrationDataModule(write(rows[1:]), max_prompt_length=1, micro_batch_size=1))


def test_rankings_stay_together(attach, write, tokenizer):
    rows = [
        {"prompt": f"p{k}", "completions": [f"c{k}{i}" for i in range(k)], "ranks": [i // 2 for i in range(k)]}
        for k in (3, 4, 5)
    ]
    data = attach(ComparisonDataModule(write(rows), micro_batch_size=3))
    (batch,) = data.train_dataloader()
    assert batch.normalizer == 3 and batch.input_ids.shape == (12, 6)
    assert sorted(batch.ranking_index.bincount().tolist()) == [3, 4, 5]
    assert batch.ranking_index.diff().min() == 0 and batch.ranking_index[0] == 0  # the rows of a ranking are adjacent
    for number in range(3):
        lines = batch.ranking_index == number
        k = int(lines.sum())
        assert batch.ranks[lines].tolist() == [i // 2 for i in range(k)]
        assert [tokenizer.decode(line) for line in batch.input_ids[lines]] == [f"p{k}c{k}{i}<eos>" for i in range(k)]
    copy = data.without_targets(data.training_rows[0])
    assert set(copy.ranks) == {0} and copy.completions == data.training_rows[0].completions


def test_completions_equal_within_the_limit_are_skipped(attach, write):
    rows = [
        {"prompt": "p", "chosen": "same but", "rejected": "same or"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    data = attach(ComparisonDataModule(write(rows), max_completion_length=4, micro_batch_size=1))
    assert len(data.training_rows) == 1


def test_prompt_batches_are_left_padded_and_carry_their_rows(attach, write, tokenizer):
    rows = [{"prompt": "p" * n, "level": n} for n in range(1, 6)]
    data = attach(PromptDataModule(write(rows), validation_path=write(rows, "v.jsonl"), validation_batch_size=2))
    batch = data.prompts.get_batch(0, 4)
    for line, mask, row in zip(batch.input_ids, batch.attention_mask, batch.rows):
        n = row["level"]
        assert row["prompt"] == "p" * n
        assert mask.tolist() == [0] * (len(line) - n) + [1] * n
        assert line.tolist() == [tokenizer.pad_token_id] * (len(line) - n) + ids(tokenizer, "p" * n)
    assert batch.index.tolist() == [0, 1, 2, 3]
    indices = [index for batch in data.val_dataloader() for index in batch.index.tolist()]
    assert indices == [0, 1, 2, 3, 4]
    given = []
    data.trainer.lightning_module.experience_loader = lambda prompts: given.append(prompts) or "loader"
    assert data.train_dataloader() == "loader" and given == [data.prompts]


def test_a_rank_without_a_validation_prompt_yields_index_minus_one(attach, write):
    path = write([{"prompt": "p"}] * 3)
    data = attach(PromptDataModule(path, validation_path=path, validation_batch_size=1), world_size=2, global_rank=1)
    assert [batch.index.tolist() for batch in data.val_dataloader()] == [[1], [-1]]


@given(total=st.integers(1, 20), iteration=st.integers(0, 5), world_size=st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=40, deadline=None)
def test_an_iteration_has_the_same_prompts_for_any_world_size(total, iteration, world_size):
    source = PromptSource([TokenizedPrompt([n + 1], {"prompt": str(n)}) for n in range(total)], pad_id=0, seed=5)
    stream = [index for epoch in range(iteration * 6 // total + 7) for index in epoch_permutation(total, 5, epoch)]
    batches = [source.get_batch(iteration, 6, rank, world_size) for rank in range(world_size)]
    assert [int(row["prompt"]) for batch in batches for row in batch.rows] == stream[iteration * 6 :][:6]
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(6))


def test_prompts_not_divisible_by_the_ranks(attach, write):
    source = PromptSource([TokenizedPrompt([1], {})], pad_id=0)
    with pytest.raises(UserError, match="5 prompts per iteration are not divisible by 2 ranks"):
        source.get_batch(0, 5, 0, 2)


def test_blocks_are_the_documents_concatenated_with_eos(tmp_path, bos_tokenizer):
    path = tmp_path / "t.txt"
    path.write_text("abc\n\ndefgh\n\ni\n")
    # <bos>abc<eos><bos>defgh<eos><bos>i<eos>: 5 + 7 + 3 tokens
    blocks = load_text_blocks(str(path), bos_tokenizer, seq_len=4)
    texts = [bos_tokenizer.decode(block.input_ids) for block in blocks]
    assert texts == ["<bos>abc", "<eos><bos>de", "fgh<eos>"]
    batch = blocks.get_batch(0, 0, BatchShape(3))
    assert batch.loss_mask.tolist() == [[False, True, True, True]] * 3
    assert batch.normalizer == 9 and batch.attention_mask.all() and batch.input_ids.dtype == torch.int64
    with pytest.raises(UserError, match=r"holds 15 tokens, fewer than one block; lower seq_len \(16\)"):
        load_text_blocks(str(path), bos_tokenizer, seq_len=16)
    shuffled = load_text_blocks(str(path), bos_tokenizer, 15, shuffle_documents=True, seed=1)
    assert sorted(shuffled[0].input_ids.tolist()) == sorted(
        load_text_blocks(str(path), bos_tokenizer, 15)[0].input_ids.tolist()
    )
    assert len(blocks[:2]) == 2


def test_text_batches_do_not_depend_on_the_batch_shape():
    blocks = TextBlocks(torch.arange(40).view(10, 4), seed=2)

    def rows(minibatch, micro_batch_size, accumulate, world_size):
        shapes = [
            (step, BatchShape(micro_batch_size, accumulate, world_size, r))
            for step in range(accumulate)
            for r in range(world_size)
        ]
        batches = [blocks.get_batch(minibatch, *each) for each in shapes]
        assert {float(batch.normalizer) for batch in batches} == {8 * 3.0}
        return sorted(line[0] for batch in batches for line in batch.input_ids.tolist())

    for minibatch in range(4):
        assert rows(minibatch, 8, 1, 1) == rows(minibatch, 2, 2, 2) == rows(minibatch, 1, 2, 4)
    assert len(set(rows(0, 8, 1, 1))) == 8


def test_pretraining_module(attach, tmp_path, tokenizer):
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(letter * 9 for letter in "abcdefghij"))
    data = attach(
        PretrainingDataModule(str(path), validation_fraction=0.2, seq_len=10, micro_batch_size=2), world_size=2
    )
    assert (len(data.training_rows), len(data.validation_rows)) == (8, 2)
    texts = [tokenizer.decode(line) for batch in data.train_dataloader() for line in batch.input_ids]
    assert all(text == text[0] * 9 + "<eos>" for text in texts) and len(texts) == 4
    validation = list(data.val_dataloader())
    assert [batch.loss_mask.sum() for batch in validation] == [9]
    assert not data.collate([data.without_targets(data.training_rows[0])], 1.0).loss_mask.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction: 1.0 must be at least 0 and below 1"),
        ({"validation_fraction": 0.1, "validation_path": "x"}, "exclude each other"),
        ({"micro_batch_size": 0}, "micro_batch_size: 0 must be at least 1"),
        ({"max_prompt_length": 0}, "max_prompt_length: 0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        DemonstrationDataModule("rows.jsonl", **settings)


def test_bad_settings_of_the_others():
    with pytest.raises(UserError, match="seq_len: 1 must be at least 2"):
        PretrainingDataModule("t.txt", seq_len=1)
    with pytest.raises(UserError, match="validation_batch_size: 0"):
        PromptDataModule("t.txt", validation_batch_size=0)


def test_settings_that_do_not_match_the_data(attach, write):
    path = write(DEMONSTRATIONS)
    data = attach(DemonstrationDataModule(path, micro_batch_size=4), world_size=2, accumulate_grad_batches=2)
    with pytest.raises(UserError, match=r"12 rows .* 16 = micro_batch_size 4 × accumulate_grad_batches 2 × 2 ranks"):
        data.train_dataloader()
    with pytest.raises(UserError, match=r"validation_fraction: 0\.01 of 12 distinct prompts"):
        attach(DemonstrationDataModule(path, validation_fraction=0.01))
    data = attach(DemonstrationDataModule(path, micro_batch_size=4))
    data.trainer.callbacks = [GradientAccumulationScheduler({0: 1, 2: 4})]
    with pytest.raises(UserError, match="GradientAccumulationScheduler: a minibatch is planned before it is split"):
        data.train_dataloader()


def test_a_tokenizer_without_pad_is_refused(attach, write, tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="the tokenizer has no pad_token"):
        attach(DemonstrationDataModule(write(DEMONSTRATIONS)))


@pytest.mark.parametrize(
    "name", ["DemonstrationDataModule", "ComparisonDataModule", "PromptDataModule", "PretrainingDataModule"]
)
def test_settings_from_the_command_line(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = parser.parse_args(
        [f"--data=lit_rlhf.data.{name}", "--data.path=rows.jsonl", "--data.validation_path=v.txt"]
    )
    data = parser.instantiate_classes(given).data
    assert (type(data).__name__, data.path, data.validation_path) == (name, "rows.jsonl", "v.txt")
    assert 1 <= len(vars(given.data.init_args)) <= 12
