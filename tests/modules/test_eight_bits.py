"""AdamW with 8-bit state learns like AdamW, needs a quarter of the memory for its state, and resumes exactly."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.modules import SFTModule
from tests.helpers.small_runs import demonstrations, quiet_trainer, write_rows

# every matrix has the 4,096 elements from which on bitsandbytes uses 8 bits
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
)
ADAM = {32: torch.optim.AdamW, 8: bitsandbytes.optim.AdamW8bit}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    folder = str(tmp_path_factory.mktemp("wide"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: str, folder: Path, bits: int, steps: int, **settings: Any) -> tuple[SFTModule, Any]:
    rows = write_rows(folder / "rows.jsonl", demonstrations(256))
    data = DemonstrationDataModule(rows, rows, micro_batch_size=32)
    module = SFTModule(model, lambda p: ADAM[bits](p, lr=2e-3, betas=(0.9, 0.95)))
    start = settings.pop("start", None)
    trainer = quiet_trainer(folder, max_steps=steps, max_epochs=-1, num_sanity_val_steps=0, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=start)
    return module, trainer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_the_loss_matches_32_bits_and_the_state_is_a_quarter(wide, tmp_path):
    loss, size = {}, {}
    for bits in (32, 8):
        _, trainer = train(wide, tmp_path, bits, steps=64)
        loss[bits] = float(trainer.callback_metrics["validation/loss"])
        size[bits] = state_bytes(trainer.optimizers[0])
    assert loss[32] < 2.0, "it learned"
    assert loss[8] == pytest.approx(loss[32], rel=0.02)
    assert size[8] <= 0.3 * size[32], size


def test_a_resumed_run_equals_the_uninterrupted_one(wide, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    uninterrupted, _ = train(wide, tmp_path, 8, 5, callbacks=[checkpoints], enable_checkpointing=True)
    resumed, trainer = train(wide, tmp_path, 8, 5, start=tmp_path / "step=2.ckpt")
    assert trainer.global_step == 5
    for (name, one), (_, other) in zip(uninterrupted.named_parameters(), resumed.named_parameters()):
        assert torch.equal(one, other), name
