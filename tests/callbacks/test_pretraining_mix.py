"""PretrainingMix: the gradient of a step is that of the stage plus γ times that of the text, for any batch shape."""

import math
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.data.batches import PretrainingBatch
from lit_rlhf.data.loader import BatchShape
from lit_rlhf.errors import UserError
from lit_rlhf.generation import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from lit_rlhf.modules.critics import SharedBackboneCritic
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd, write_rows

GAMMA = 2.5
LENGTH = 12


class Gradients(L.Callback):
    """Store the gradients of every optimizer step."""

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
    """48 tokens, end tokens included: one minibatch of 4 blocks of 12."""
    documents = [" ".join(f"w{(5 * i + 3 * j) % 28}" for j in range(7)) for i in range(6)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    return str(tmp_path / "text.txt")


class Expected(NamedTuple):
    """Gradients of a step, computed in plain torch."""

    stage: list[Tensor]  # of the mean over completion tokens
    pretraining: list[Tensor]  # γ times that of the mean over text tokens

    @property
    def total(self) -> list[Tensor]:
        """The sum of both."""
        return [one + other for one, other in zip(self.stage, self.pretraining)]

    @property
    def norms(self) -> dict[str, float]:
        """The logged norms."""
        pretraining, stage = (math.sqrt(sum(float(g.double().square().sum()) for g in part)) for part in self[::-1])
        names = ("pretraining/grad_norm", "policy/grad_norm", "pretraining/grad_norm_ratio")
        return dict(zip(names, (pretraining, stage, pretraining / stage)))


def compute_expected(model: str, tokenizer: Any, rows: list[dict[str, Any]], text: str) -> Expected:
    """Compute the gradients row by row."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    pairs = [(tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), 1]) for row in rows]
    stage = torch.zeros(())
    for prompt, completion in pairs:
        logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        stage = stage + F.cross_entropy(logits, torch.tensor(completion), reduction="sum")
    stream = [token for document in Path(text).read_text().split("\n\n") for token in [*tokenizer.encode(document), 1]]
    blocks = torch.tensor(stream).view(-1, LENGTH)
    assert len(blocks) == 4
    logits = plain(blocks).logits[:, :-1]
    pretraining = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="mean")
    losses = stage / sum(len(completion) for _, completion in pairs), GAMMA * pretraining
    return Expected(*(list(torch.autograd.grad(loss, list(plain.parameters()))) for loss in losses))


def compute_gradients(
    model: str, path: str, text: str, folder: Path, parts: int, num_micro_batches: int = 1, **settings: Any
) -> tuple[list[list[Tensor]], dict[str, float]]:
    """Run two steps of SFT with the mix at learning rate 0, a minibatch in `parts`; return gradients and metrics."""
    recorder, micro_batch_size = Gradients(), 4 // parts // num_micro_batches
    mix = PretrainingMix(
        text, GAMMA, micro_batch_size=micro_batch_size, num_micro_batches=num_micro_batches, seq_len=LENGTH
    )
    if settings.get("strategy") == "fsdp":
        settings["strategy"] = FSDP2Strategy()
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=[mix, recorder], **settings)
    trainer.fit(SFTModule(model, sgd(0.0)), datamodule=DemonstrationDataModule(path, micro_batch_size=8 // parts))
    return recorder.steps, {name: float(value) for name, value in trainer.callback_metrics.items()}


def assert_each_step(run: tuple[list[list[Tensor]], dict[str, float]], reference: Expected) -> None:
    steps, logged = run
    assert len(steps) == 2
    for step in steps:
        for actual, expected in zip(step, reference.total, strict=True):
            torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)
    for name, norm in reference.norms.items():
        assert logged[name] == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize(("accumulate", "num_micro_batches"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_the_gradient_on_one_process(accumulate, num_micro_batches, llama, tokenizer, rows, text, tmp_path):
    path, reference = write_rows(tmp_path / "rows.jsonl", rows), compute_expected(llama, tokenizer, rows, text)
    run = compute_gradients(
        llama, path, text, tmp_path, accumulate, num_micro_batches, accumulate_grad_batches=accumulate
    )
    assert_each_step(run, reference)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_on_two_ranks(accumulate, strategy, llama, tokenizer, rows, text, tmp_path):
    path, reference = write_rows(tmp_path / "rows.jsonl", rows), compute_expected(llama, tokenizer, rows, text)
    sizes = {"devices": 2, "strategy": strategy, "accumulate_grad_batches": accumulate}

    def run_rank() -> tuple[list[list[Tensor]], dict[str, float]]:
        return compute_gradients(llama, path, text, tmp_path, 2 * accumulate, 2 // accumulate, **sizes)

    for run in on_ranks(run_rank, tmp_path):
        assert_each_step(run, reference)


def build_norms_case(case: str, model: str, path: str, num_ranks: int) -> tuple[L.LightningModule, Any]:
    """Return a module and its data: a run that has a pass without gradients before its first step."""
    if case == "sanity validation":
        data = DemonstrationDataModule(path, micro_batch_size=4 // num_ranks, validation_fraction=0.5)
        return SFTModule(model, sgd(0.3)), data
    settings: dict[str, Any] = {"critic": SharedBackboneCritic()} if case == "shared backbone" else {}
    ppo = PPOConfig(
        rollout_batch_size=8,
        micro_batch_size=4 // num_ranks,
        critic_learning_rate=0.05,
        old_logprobs="recompute" if case == "recompute" else "rollout",
    )
    return PPOModule(model, WordShare(), SamplingParams(4), ppo, optimizer=sgd(0.3), **settings), PromptData()


@pytest.mark.parametrize("case", ["shared backbone", "recompute", "sanity validation"])
def test_gradient_norms_of_sharded_runs_are_those_of_one_process(case, llama, rows, text, tmp_path):
    """After a pass without gradients as well, which leaves weights gathered."""
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def run(**settings: Any) -> dict[str, float]:
        num_ranks = settings.get("devices", 1)
        module, data = build_norms_case(case, llama, path, num_ranks)
        mix = PretrainingMix(text, GAMMA, micro_batch_size=4 // num_ranks, seq_len=LENGTH)
        trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=2, callbacks=[mix], **settings)
        trainer.fit(module, datamodule=data)
        return {name: float(value) for name, value in trainer.callback_metrics.items() if "grad_norm" in name}

    expected = run()
    assert len(expected) == 4 and all(value > 1e-3 for value in expected.values())
    for world_size in (1, 2):
        for norms in on_ranks(partial(run, devices=world_size, strategy=FSDP2Strategy()), tmp_path, world_size):
            assert norms == pytest.approx(expected, rel=1e-4)


class AfterTheStage(PretrainingMix):
    """The order of the paper's formula, which is wrong here: the text after the stage."""

    uses_wrapper: bool

    def on_train_batch_start(self, *_: Any) -> None:
        """Add nothing before the stage."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add the gradient after the reduction of the stage, so that it stays on its rank."""
        shape = BatchShape(self.micro_batch_size, 1, trainer.world_size, trainer.global_rank)
        batch = PretrainingBatch(*self.blocks.get_batch(trainer.global_step, 0, shape))
        if self.uses_wrapper:
            loss = trainer.strategy.training_step(batch, 0)
        else:
            loss = pl_module.training_step(batch, 0)
        (self.coefficient * loss).backward()


class AfterWithoutWrapper(AfterTheStage):
    uses_wrapper = False


class AfterWithWrapper(AfterTheStage):
    uses_wrapper = True


class BeforeWithoutWrapper(PretrainingMix):
    """Text first, without the wrapper of the strategy: right, but outside the autocast of the Trainer."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        shape = BatchShape(self.micro_batch_size, 1, trainer.world_size, trainer.global_rank)
        batch = PretrainingBatch(*self.blocks.get_batch(trainer.global_step, 0, shape))
        (self.coefficient * pl_module.training_step(batch, 0)).backward()


class BetweenForwardAndBackward(BeforeWithoutWrapper):
    """Text between forward and backward pass of the stage."""

    on_train_batch_start = AfterTheStage.on_train_batch_start

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """The wrapper reduces the gradients of the text, which come first, and then not those of the stage."""
        BeforeWithoutWrapper.on_train_batch_start(self, trainer, pl_module)


class SynchronizedBefore(PretrainingMix):
    """Text first, with a reduction of its own, then the stage into the same gradients."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        shape = BatchShape(self.micro_batch_size, 1, trainer.world_size, trainer.global_rank)
        batch = PretrainingBatch(*self.blocks.get_batch(trainer.global_step, 0, shape))
        loss = trainer.strategy.training_step(batch, 0)
        trainer.strategy.backward(self.coefficient * loss, None)


class Outcome(Enum):
    """Result of a way of adding the gradient of the text."""

    RIGHT = "the reference gradient on both ranks"
    SILENTLY_WRONG = "ranks have different gradients, without an error"


WAYS = [
    (PretrainingMix, "ddp", Outcome.RIGHT),
    (PretrainingMix, "fsdp", Outcome.RIGHT),
    (AfterWithoutWrapper, "ddp", Outcome.SILENTLY_WRONG),
    (AfterWithoutWrapper, "fsdp", Outcome.RIGHT),
    (AfterWithWrapper, "ddp", Outcome.RIGHT),
    (BeforeWithoutWrapper, "ddp", Outcome.RIGHT),
    (BetweenForwardAndBackward, "ddp", Outcome.SILENTLY_WRONG),
    (SynchronizedBefore, "ddp", Outcome.RIGHT),
]


@pytest.mark.parametrize(("way", "strategy", "outcome"), WAYS)
def test_ways_of_adding_the_gradient(way, strategy, outcome, llama, tokenizer, rows, text, tmp_path):
    """Why the text goes first, with the wrapper of the strategy and without a reduction."""
    path, reference = write_rows(tmp_path / "rows.jsonl", rows), compute_expected(llama, tokenizer, rows, text)

    def run() -> list[Tensor]:
        recorder, mix = Gradients(), way(text, GAMMA, micro_batch_size=2, seq_len=LENGTH, gradient_norms=False)
        kind = FSDP2Strategy() if strategy == "fsdp" else strategy
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[mix, recorder], devices=2, strategy=kind)
        data = DemonstrationDataModule(path, micro_batch_size=4)
        trainer.fit(SFTModule(llama, sgd(0.0)), datamodule=data)
        return recorder.steps[0]

    ranks, outcomes = on_ranks(run, tmp_path), set()
    for gradient in ranks:
        close = [torch.allclose(a, b, atol=2e-6, rtol=2e-5) for a, b in zip(gradient, reference.total, strict=True)]
        outcomes.add(Outcome.RIGHT if all(close) else Outcome.SILENTLY_WRONG)
    assert outcomes == {outcome}
    if outcome is Outcome.SILENTLY_WRONG:
        assert any(not torch.allclose(a, b) for a, b in zip(*ranks))


def test_the_text_of_a_step_depends_on_its_number_so_a_resumed_run_continues(llama, rows, tmp_path):
    """Every block is read once per epoch, in an order that does not restart after a checkpoint."""
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
        mix = PretrainingMix(str(tmp_path / "long.txt"), GAMMA, micro_batch_size=2, seq_len=LENGTH)
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[mix])
        trainer.fit(module, datamodule=DemonstrationDataModule(path, micro_batch_size=8), **resume)
        return module.read, trainer

    uninterrupted, _ = run(4)
    assert len(set(uninterrupted)) == 8
    first, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = run(4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert first + rest == uninterrupted


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="coefficient must not be negative, got -1"):
        PretrainingMix("text.txt", coefficient=-1)
    for name in ("micro_batch_size", "num_micro_batches"):
        with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
            PretrainingMix("text.txt", **{name: 0})


def test_missing_text_is_refused_before_the_model_is_loaded(llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.modules.sft.load_causal_lm", lambda *_: pytest.fail("the model was loaded"))
    data = DemonstrationDataModule(write_rows(tmp_path / "rows.jsonl", rows), micro_batch_size=8)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PretrainingMix(str(tmp_path / "texd.txt"), seq_len=64)])
    with pytest.raises(UserError, match="no data file"):
        trainer.fit(SFTModule(llama), datamodule=data)
