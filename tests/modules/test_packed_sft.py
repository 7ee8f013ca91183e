"""Packed SFT against one sequence per row: loss, gradient, weights after training, validation loss."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, MistralConfig

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.data.collation import TokenizedExample, collate_packed
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.modules import SFTModule
from lit_rlhf.strategies import FSDP2Strategy
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


def make_examples(count: int) -> list[TokenizedExample]:
    generator = random.Random(5)
    examples = []
    for _ in range(count):
        prompt, completion = generator.randint(1, 9), generator.randint(1, 12)
        ids = [generator.randrange(2, 32) for _ in range(prompt + completion - 1)]
        examples.append(TokenizedExample([*ids, 1], [False] * prompt + [True] * completion))
    return examples


def compute_gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"])
def test_loss_and_gradient_equal_those_of_separate_rows(model_folders, name, checkpointing):
    module = SFTModule(model_folders[name], loading=ModelLoadingConfig(gradient_checkpointing=checkpointing))
    module.trainer = quiet_trainer(Path("."))
    module.configure_model()
    examples = make_examples(23)
    module.model.train()
    packed, count = module.loss(collate_packed(examples, 1.0))
    actual = compute_gradient(module.model, packed)
    plain = AutoModelForCausalLM.from_pretrained(model_folders[name])
    total = torch.zeros((), dtype=torch.float64)
    for row in examples:  # one at a time, without padding, in float64 after the logits
        ids, start = torch.tensor(row.input_ids), row.loss_mask.index(True)
        logits = plain(ids[None], use_cache=False).logits[0, start - 1 : -1].double()
        total = total + F.cross_entropy(logits, ids[start:], reduction="sum")
    assert int(count) == sum(sum(row.loss_mask) for row in examples)
    assert float(packed.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    expected = compute_gradient(plain, total)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def train(
    model: str, path: str, folder: Path, micro_batch_size: int, batching: Any = "packing", **settings: Any
) -> Any:
    limits = {"max_prompt_length": 12, "max_completion_length": 6}
    data = DemonstrationDataModule(path, micro_batch_size=micro_batch_size, batching=batching, **limits)
    module = SFTModule(model, sgd(0.1))
    quiet_trainer(folder, max_epochs=2, gradient_clip_val=1.0, **settings).fit(module, datamodule=data)
    return full_weights(module)


def test_packing_changes_no_weight_for_any_micro_batch_size(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(36))
    padded = train(llama, path, tmp_path, 12, "group_by_length")
    assert largest_change(list(AutoModelForCausalLM.from_pretrained(llama).parameters()), padded) > 1e-2
    for micro_batch_size, accumulate in ((12, 1), (3, 4), (1, 12)):
        assert_same_weights(train(llama, path, tmp_path, micro_batch_size, accumulate_grad_batches=accumulate), padded)
    two = {"accumulate_grad_batches": 2, "devices": 2}
    for micro_batch_size, strategy in ((3, "ddp"), (3, FSDP2Strategy()), (6, FSDP2Strategy(tensor_parallel_size=2))):
        run = partial(train, llama, path, tmp_path, micro_batch_size, strategy=strategy, **two)
        for weights in on_ranks(run, tmp_path):
            assert_same_weights(weights, padded)


def validation_loss(model: str, path: str, folder: Path, batching: Any, **settings: Any) -> float:
    data = DemonstrationDataModule(path, validation_path=path, micro_batch_size=4, batching=batching)
    trainer = quiet_trainer(folder, **settings)
    return trainer.validate(SFTModule(model), datamodule=data, verbose=False)[0]["validation/loss"]


def test_packed_validation_gives_the_same_mean(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(11))
    padded = validation_loss(llama, path, tmp_path, "group_by_length")
    assert validation_loss(llama, path, tmp_path, "packing") == pytest.approx(padded, rel=1e-6)
    ddp = {"devices": 2, "strategy": "ddp"}
    for loss in on_ranks(lambda: validation_loss(llama, path, tmp_path, "packing", **ddp), tmp_path):
        assert loss == pytest.approx(padded, rel=1e-6)


def test_a_model_whose_attention_would_cross_sequences_is_refused(tokenizer, llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", demonstrations(16))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    MistralConfig(vocab_size=32, intermediate_size=64, sliding_window=4, **size).save_pretrained(tmp_path / "mistral")
    tokenizer.save_pretrained(tmp_path / "mistral")
    # the folder has no weights: refused before any is read
    with pytest.raises(
        UserError,
        match=r"data\.batching: .*mistral' takes 'group_by_length', but no packed rows: the attention .* 4 tok",
    ):
        train(str(tmp_path / "mistral"), path, tmp_path, 4)
    data = DemonstrationDataModule(path, micro_batch_size=4, batching="packing")
    module = SFTModule(llama, loading=ModelLoadingConfig(attn_implementation="flash_attention_2"))
    message = r"'flash_attention_2' is not called sequence .* model\.loading\.attn_implementation"
    with pytest.raises(UserError, match=message):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
