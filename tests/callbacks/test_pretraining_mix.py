"""The pretraining mix: the gradient of a step is that of the stage plus γ times that of the text, however it is cut."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from small_runs import demonstrations, quiet_trainer, sgd, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.modules import SFTModule
from lit_rlhf.strategies import FSDP2Strategy

GAMMA = 2.5
LENGTH = 12


class Gradients(L.Callback):
    """The gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        self.steps.append([(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in gradients])


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """8 demonstrations: one minibatch."""
    return demonstrations(8)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """48 tokens with their ends: one minibatch of 4 blocks of 12."""
    documents = [" ".join(f"w{(5 * i + 3 * j) % 28}" for j in range(7)) for i in range(6)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    return str(tmp_path / "text.txt")


def expected(model: str, tokenizer: Any, rows: list[dict[str, Any]], text: str) -> list[Tensor]:
    """grad of the mean over completion tokens plus γ grad of the mean over text tokens, row by row, in plain torch."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    pairs = [(tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), 1]) for row in rows]
    stage = torch.zeros(())
    for prompt, completion in pairs:
        logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        stage = stage + F.cross_entropy(logits, torch.tensor(completion), reduction="sum")
    stream = [token for each in Path(text).read_text().split("\n\n") for token in [*tokenizer.encode(each), 1]]
    blocks = torch.tensor(stream).view(-1, LENGTH)
    assert len(blocks) == 4
    logits = plain(blocks).logits[:, :-1]
    mixed = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="mean")
    loss = stage / sum(len(completion) for _, completion in pairs) + GAMMA * mixed
    return list(torch.autograd.grad(loss, list(plain.parameters())))


def gradients(model: str, path: str, text: str, folder: Path, cut: int, **settings: Any) -> list[list[Tensor]]:
    """Two steps of SFT with the mix at a learning rate of 0; `cut` parts a minibatch."""
    watch = Gradients()
    mix = PretrainingMix(text, GAMMA, micro_batch=4 // cut, block_length=LENGTH)
    if settings.get("strategy") == "fsdp":
        settings["strategy"] = FSDP2Strategy()
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[mix, watch], **settings)
    trainer.fit(SFTModule(model, sgd(0.0)), datamodule=DemonstrationDataModule(path, micro_batch=8 // cut))
    return watch.steps


def assert_each_step(steps: list[list[Tensor]], reference: list[Tensor]) -> None:
    assert len(steps) == 2
    for step in steps:
        for mine, theirs in zip(step, reference, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_gradient_on_one_process(accumulate, llama, tokenizer, rows, text, tmp_path):
    path, reference = write_rows(tmp_path / "rows.jsonl", rows), expected(llama, tokenizer, rows, text)
    steps = gradients(llama, path, text, tmp_path, accumulate, accumulate_grad_batches=accumulate)
    assert_each_step(steps, reference)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_on_two_ranks(accumulate, strategy, llama, tokenizer, rows, text, tmp_path):
    path, reference = write_rows(tmp_path / "rows.jsonl", rows), expected(llama, tokenizer, rows, text)
    sizes = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": accumulate}
    for steps in on_ranks(lambda: gradients(llama, path, text, tmp_path, 2 * accumulate, **sizes), tmp_path):
        assert_each_step(steps, reference)


def test_a_step_reads_text_by_its_number_so_a_resumed_run_goes_on(llama, rows, tmp_path):
    """Every block once in a pass, in an order that does not begin anew after a checkpoint."""
    (tmp_path / "long.txt").write_text("\n\n".join(" ".join(f"w{i}" for _ in range(LENGTH - 1)) for i in range(8)))
    path = write_rows(tmp_path / "rows.jsonl", rows)

    class Recording(SFTModule):
        read: list[int]

        def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
            if type(batch).__name__ == "PretrainingBatch":
                self.read += batch.input_ids[:, 0].tolist()
            return super().training_step(batch, batch_idx)

    def run(epochs: int, **resume: Any) -> tuple[list[int], L.Trainer]:
        module = Recording(llama, sgd(0.0))
        module.read = []
        mix = PretrainingMix(str(tmp_path / "long.txt"), GAMMA, micro_batch=2, block_length=LENGTH)
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[mix])
        trainer.fit(module, datamodule=DemonstrationDataModule(path, micro_batch=8), **resume)
        return module.read, trainer

    whole, _ = run(4)
    assert len(set(whole)) == 8
    first, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = run(4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert first + rest == whole


def test_senseless_settings_are_refused():
    with pytest.raises(UserError, match="coefficient must not be negative, got -1"):
        PretrainingMix("text.txt", coefficient=-1)
    with pytest.raises(UserError, match="micro_batch must be at least 1, got 0"):
        PretrainingMix("text.txt", micro_batch=0)


def test_missing_text_is_refused_before_the_model_is_loaded(llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.modules.sft.load_causal_lm", lambda *_: pytest.fail("the model was loaded"))
    data = DemonstrationDataModule(write_rows(tmp_path / "rows.jsonl", rows), micro_batch=8)
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, callbacks=[PretrainingMix(str(tmp_path / "texd.txt"), block_length=64)]
    )
    with pytest.raises(UserError, match="no data file"):
        trainer.fit(SFTModule(llama), datamodule=data)
