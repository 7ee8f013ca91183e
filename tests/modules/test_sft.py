"""SFT: it learns a task; weights and validation loss depend neither on micro-batches nor on ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.modules import SFTModule
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import (
    assert_same_weights,
    demonstrations,
    full_weights,
    largest_change,
    quiet_trainer,
    sgd,
    write_rows,
)


def test_it_learns_to_repeat_the_first_word(llama, tokenizer, tmp_path):
    rows = [{"prompt": row["prompt"] + " :", "completion": row["prompt"].split()[0]} for row in demonstrations(360)]
    data = DemonstrationDataModule(write_rows(tmp_path / "rows.jsonl", rows[:300]), micro_batch_size=25)
    module = SFTModule(llama, lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    quiet_trainer(tmp_path, max_epochs=12).fit(module, datamodule=data)
    right = 0
    for row in rows[300:]:
        prompt = torch.tensor([tokenizer.encode(row["prompt"])])
        answer = module.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)
        right += tokenizer.decode(answer[0, prompt.shape[1] :]) == f"{row['completion']} <eos>"
    assert right >= 54, right


def train(
    model: str, path: str, folder: Path, micro_batch_size: int, group_by_length: bool = True, **settings: Any
) -> Any:
    data = DemonstrationDataModule(
        path, micro_batch_size=micro_batch_size, batching="group_by_length" if group_by_length else "none"
    )
    module = SFTModule(model, sgd(0.1))
    quiet_trainer(folder, max_epochs=2, gradient_clip_val=1.0, **settings).fit(module, datamodule=data)
    return full_weights(module)


def test_micro_batches_and_ranks_change_no_weight(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(36))
    expected = train(llama, path, tmp_path, 12)
    assert largest_change(list(AutoModelForCausalLM.from_pretrained(llama).parameters()), expected) > 1e-2
    for micro_batch_size, accumulate, group_by_length in ((6, 2, True), (1, 12, True), (4, 3, False)):
        actual = train(llama, path, tmp_path, micro_batch_size, group_by_length, accumulate_grad_batches=accumulate)
        assert_same_weights(actual, expected)
    ddp = {"accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    for weights in on_ranks(lambda: train(llama, path, tmp_path, 3, **ddp), tmp_path):
        assert_same_weights(weights, expected)


def validation_loss(model: str, path: str, folder: Path, micro_batch_size: int, **settings: Any) -> float:
    data = DemonstrationDataModule(path, validation_path=path, micro_batch_size=micro_batch_size)
    return quiet_trainer(folder, **settings).validate(SFTModule(model), datamodule=data, verbose=False)[0][
        "validation/loss"
    ]


def test_validation_loss_is_the_mean_over_all_completion_tokens(llama, tokenizer, tmp_path):
    rows = demonstrations(11)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    plain, total, count = AutoModelForCausalLM.from_pretrained(llama).eval(), 0.0, 0
    for row in rows:  # one at a time, without padding
        prompt, completion = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), 1]
        logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
        count += len(completion)
    for micro_batch_size in (1, 4, 11):
        assert validation_loss(llama, path, tmp_path, micro_batch_size) == pytest.approx(total / count, rel=1e-5)
    ddp = {"devices": 2, "strategy": "ddp"}
    for loss in on_ranks(lambda: validation_loss(llama, path, tmp_path, 4, **ddp), tmp_path):
        assert loss == pytest.approx(total / count, rel=1e-5)
