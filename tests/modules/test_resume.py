"""A resumed run has the settings of its recipe and the moments of its checkpoint, in sizes that may be others."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lit_rlhf.callbacks import EMA, MetricGuard, PretrainingMix
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.data.prompts import PromptSource
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from lit_rlhf.modules.base import LitModule
from lit_rlhf.modules.resume import class_path, step_scheduler
from lit_rlhf.rollout.experience_loader import BatchSizes
from lit_rlhf.rollout.kl_controller import AdaptiveKLController, FixedKLController, KLController
from lit_rlhf.schedules import ConstantWithWarmup, CosineWithMinLR, TrainerLengthSchedule
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.small_runs import demonstrations, quiet_trainer, write_rows

STEP, STEPS_PER_EPOCH, EPOCHS = 3, 8, 2
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


class RecordStep(L.Callback):
    """Records weights and gradients before the first optimizer step, and the weights after it."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.gradients: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        if not self.before:
            named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
            self.before = {name: p.detach().double() for name, p in named.items()}
            self.gradients = {name: p.grad.double() for name, p in named.items() if p.grad is not None}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.before and not self.after:
            self.after = {name: p.detach().double() for name, p in pl_module.named_parameters() if name in self.before}


def fit_sft(model: str, folder: Path, start: Any = None, make: Any = None, schedule: Any = None, **trainer: Any) -> Any:
    """Train 16 rows in minibatches of 2, to the checkpoint at `STEP` or on from it."""
    rows = write_rows(folder / "rows.jsonl", demonstrations(16))
    module = SFTModule(model, make or (lambda groups: AdamW(groups, **ADAMW)), schedule)
    recorder = RecordStep()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [recorder, *trainer.pop("callbacks", []), *([] if start else [save])]
    sizes = {"max_epochs": EPOCHS, "max_steps": -1 if start else STEP} | trainer
    run = quiet_trainer(folder, callbacks=callbacks, **{"enable_checkpointing": start is None} | sizes)
    run.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=2), ckpt_path=start)
    return module, run, recorder


def adamw_step(recorder: RecordStep, moments: dict[str, Any], step: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the weights after one step of AdamW, from its formula (Loshchilov and Hutter, 2019), in float64."""
    (beta1, beta2), expected = settings["betas"], {}
    for name, weight in recorder.before.items():
        gradient, state = recorder.gradients[name], moments[name]
        first = beta1 * state["exp_avg"].double() + (1 - beta1) * gradient
        second = beta2 * state["exp_avg_sq"].double() + (1 - beta2) * gradient.square()
        denominator = (second / (1 - beta2**step)).sqrt() + settings["eps"]
        decay = settings["weight_decay"] if weight.ndim > 1 else 0.0
        rate = settings["lr"] if "critic" not in name else settings["critic_lr"]
        expected[name] = weight * (1 - rate * decay) - rate * first / (1 - beta1**step) / denominator
    return expected


def read_moments(checkpoint: Path, names: list[str]) -> dict[str, Any]:
    """Return the moments of a checkpoint by parameter name; `names` are in the order of its parameter groups."""
    content = torch.load(checkpoint, weights_only=True)
    ids = [number for group in content["optimizer_states"][0]["param_groups"] for number in group["params"]]
    return {name: content["optimizer_states"][0]["state"][number] for name, number in zip(names, ids, strict=True)}


def names_by_group(module: Any, decays: bool) -> list[str]:
    """Return the names of the parameters in the order of the optimizer's groups: with weight decay, matrices first."""
    named = [(name, p.ndim) for name, p in module.named_parameters()]
    return [name for name, ndim in named if ndim > 1 or not decays] + [n for n, d in named if d <= 1 and decays]


def cosine(least: float, warmup: int = 0) -> Any:
    return lambda optimizer: CosineWithMinLR(optimizer, least, warmup)


def cosine_factor(least: float, total: int, warmup: int = 0) -> float:
    progress = (STEP - warmup) / (total - warmup)
    return (STEP + 1) / warmup if warmup > STEP else least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2


TOTAL = STEPS_PER_EPOCH * EPOCHS
CHANGES = {
    "nothing": ({}, None, None, 1.0),
    "lr": ({"lr": 1e-5}, None, None, 1.0),
    "betas": ({"betas": (0.5, 0.6)}, None, None, 1.0),
    "eps": ({"eps": 0.1}, None, None, 1.0),
    "weight decay": ({"weight_decay": 0.5}, None, None, 1.0),
    "lr of a schedule": ({"lr": 1e-4}, cosine(0.1), cosine(0.1), cosine_factor(0.1, TOTAL)),
    "betas of a schedule": ({"betas": (0.5, 0.6)}, cosine(0.1), cosine(0.1), cosine_factor(0.1, TOTAL)),
    "least rate": ({}, cosine(0.1), cosine(1.0), 1.0),
    "warm-up": ({}, cosine(0.1), cosine(0.1, 8), cosine_factor(0.1, TOTAL, 8)),
    "schedule added": ({}, None, cosine(0.1), cosine_factor(0.1, TOTAL)),
    "schedule removed": ({}, cosine(0.1, 8), None, 1.0),
    "another schedule": ({}, cosine(0.1), lambda o: ConstantWithWarmup(o, 1, 0.5), 0.5 + 0.5 * STEP / STEPS_PER_EPOCH),
    "warm-up iterations": (
        {}, lambda o: ConstantWithWarmup(o, 1, 0.5), lambda o: ConstantWithWarmup(o, 2, 0.2), 0.2 + 0.8 * STEP / TOTAL
    ),
    "step size": ({}, lambda o: StepLR(o, 1, 0.5), lambda o: StepLR(o, 2, 0.5), 0.5),
    "gamma": ({"lr": 1e-4}, lambda o: ExponentialLR(o, 0.5), lambda o: ExponentialLR(o, 0.9), 0.9**STEP),
    "T_max": (
        {}, lambda o: CosineAnnealingLR(o, 6), lambda o: CosineAnnealingLR(o, 12), (1 + math.cos(math.pi / 4)) / 2
    ),
    "from PyTorch's to the paper's": ({}, lambda o: OneCycleLR(o, 1e-3, 16), cosine(0.0), cosine_factor(0.0, TOTAL)),
    "from the paper's to a sequence": (
        {}, cosine(0.0), lambda o: SequentialLR(o, [ExponentialLR(o, 0.5), ExponentialLR(o, 0.5)], [2]), 0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_step_after_a_resume_is_that_of_the_new_settings(change, model_folders, tmp_path):
    settings, before, after, factor = CHANGES[change]
    model, start = model_folders["gpt2"], tmp_path / f"step={STEP}.ckpt"
    module, _, _ = fit_sft(model, tmp_path, schedule=before)
    now = ADAMW | settings
    _, _, recorder = fit_sft(model, tmp_path, start, lambda groups: AdamW(groups, **now), after)
    moments = read_moments(start, names_by_group(module, decays=False))
    expected = adamw_step(recorder, moments, STEP + 1, now | {"lr": now["lr"] * factor})
    for name, weight in recorder.after.items():
        change = (weight - recorder.before[name]).abs().max()
        torch.testing.assert_close(weight, expected[name], atol=float(change) * 1e-3 + 1e-9, rtol=1e-6, msg=name)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.1), (0.5, 0.5), (0.0, 0.0)])
def test_weight_decay_can_be_switched_on_and_off(before, after, model_folders, tmp_path):
    model, start = model_folders["gpt2"], tmp_path / f"step={STEP}.ckpt"
    given = ADAMW | {"weight_decay": before}
    module, _, _ = fit_sft(model, tmp_path, make=lambda groups: AdamW(groups, **given))
    now = ADAMW | {"weight_decay": after, "lr": 1e-2}
    _, run, recorder = fit_sft(model, tmp_path, start, lambda groups: AdamW(groups, **now))
    moments = read_moments(start, names_by_group(module, decays=before > 0))
    expected = adamw_step(recorder, moments, STEP + 1, now)
    for name, weight in recorder.after.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    assert run.global_step == TOTAL


def test_another_optimizer_is_refused_before_the_first_step(llama, tmp_path):
    fit_sft(llama, tmp_path)
    start = tmp_path / f"step={STEP}.ckpt"
    for optimizer in (SGD, Adam, RMSprop):
        with pytest.raises(
            UserError, match=f"optimizer is torch.optim.adamw.AdamW, whose state .*{optimizer.__name__} "
        ):
            fit_sft(llama, tmp_path, start, lambda groups, optimizer=optimizer: optimizer(groups, lr=0.1))


def test_settings_that_need_another_state_are_refused_and_others_begin_it(llama, tmp_path):
    fit_sft(llama, tmp_path)
    with pytest.raises(UserError, match="AdamW has no max_exp_avg_sq, which its settings need now"):
        fit_sft(llama, tmp_path, tmp_path / f"step={STEP}.ckpt", lambda groups: AdamW(groups, **ADAMW, amsgrad=True))
    (tmp_path / "sgd").mkdir()
    fit_sft(llama, tmp_path / "sgd", make=lambda groups: SGD(groups, lr=0.1))
    start = tmp_path / "sgd" / f"step={STEP}.ckpt"
    _, run, _ = fit_sft(llama, tmp_path / "sgd", start, lambda groups: SGD(groups, lr=0.1, momentum=0.9))
    assert all("momentum_buffer" in state for state in run.optimizers[0].state.values())


def test_a_checkpoint_of_weights_alone_is_refused(llama, tmp_path):
    _, run, _ = fit_sft(llama, tmp_path)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(UserError, match="holds weights only"):
        fit_sft(llama, tmp_path, tmp_path / "weights.ckpt")


def test_a_schedule_of_fewer_steps_than_the_run_has_is_refused(llama, tmp_path):
    fit_sft(llama, tmp_path)
    with pytest.raises(UserError, match=f"the run is at step {STEP}, and .*OneCycleLR: "):
        fit_sft(llama, tmp_path, tmp_path / f"step={STEP}.ckpt", schedule=lambda o: OneCycleLR(o, 1e-3, 2))


def test_the_paper_s_schedule_ends_with_the_run_in_any_sizes(llama, tmp_path):
    fit_sft(llama, tmp_path, schedule=cosine(0.1), max_steps=4)
    # 4 steps of 2 rows, then minibatches of 4: 2 steps to the end of the epoch, and 4 in the next
    _, run, recorder = fit_sft(
        llama, tmp_path, tmp_path / "step=4.ckpt", schedule=cosine(0.1), accumulate_grad_batches=2
    )
    assert run.global_step == 10
    expected = [1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2) for step in range(4, 10)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected, rel=1e-9)


class DrawAtStart(L.Callback):
    """Draws random numbers before training starts, as another program might."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.rand(7)


def test_another_seed_is_not_replaced_by_the_random_state_of_the_checkpoint(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    fit_sft(llama, tmp_path)
    start = tmp_path / f"step={STEP}.ckpt"
    saved = torch.load(start, weights_only=True)["lit_rlhf"]["random"][0]["torch"]
    for seed, continues in (("1", True), ("2", False)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        fit_sft(llama, tmp_path, start, max_steps=STEP + 1, callbacks=[DrawAtStart()])
        assert torch.equal(torch.get_rng_state(), saved) == continues


def test_epoch_means_go_on_in_the_middle_of_an_epoch(llama, tmp_path):
    means = {}
    for name, start in (("uninterrupted", None), ("resumed", tmp_path / "uninterrupted" / f"step={STEP}.ckpt")):
        (tmp_path / name).mkdir()
        _, run, _ = fit_sft(llama, tmp_path / name, start, max_epochs=1, max_steps=-1)
        means[name] = float(run.callback_metrics["train/grad_norm"])
    assert means["resumed"] == pytest.approx(means["uninterrupted"], rel=1e-6)


class RecordEpochs(L.Callback):
    """Records which hooks of an epoch are called, with its number."""

    def __init__(self) -> None:
        self.hooks: list[tuple[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.hooks.append(("last batch" if trainer.is_last_batch else "batch", trainer.current_epoch))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.hooks.append(("validation", trainer.current_epoch))

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.hooks.append(("end", trainer.current_epoch))


def test_the_end_of_an_epoch_comes_once_in_other_sizes(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", demonstrations(16))
    writers = {
        "last batch": {"every_n_train_steps": 1},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "end": {"every_n_epochs": 1, "save_on_train_epoch_end": True, "mode": "max"},  # for a state key of its own
    }
    saves = [ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, **at) for name, at in writers.items()]

    def fit(micro_batch_size: int, accumulate: int, *callbacks: Any, **settings: Any) -> L.Trainer:
        sizes = {"accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0, "enable_checkpointing": True}
        run = quiet_trainer(tmp_path, max_epochs=settings.pop("max_epochs", 2), callbacks=list(callbacks), **sizes)
        data = DemonstrationDataModule(rows, rows, micro_batch_size=micro_batch_size)
        run.fit(SFTModule(llama), datamodule=data, **settings)
        return run

    fit(2, 1, *saves, max_epochs=1)
    second = [("batch", 1)] * 3 + [("last batch", 1), ("validation", 1), ("end", 1)]
    for number, point in enumerate(writers):
        recorder = RecordEpochs()
        run = fit(4, 2, recorder, ckpt_path=tmp_path / point / "step=8.ckpt")
        rest = [("validation", 0), ("end", 0)][number:]
        assert recorder.hooks == rest + second, point
        assert run.global_step == 8 + 2


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_settings_of_lightning_s_callbacks_are_those_of_the_recipe(llama, tmp_path):
    def callbacks(patience: int, kept: int) -> list[Any]:
        stop = EarlyStopping("train/loss", patience=patience, check_on_train_epoch_end=True)
        save = ModelCheckpoint(
            tmp_path / "best", monitor="step", mode="max", every_n_train_steps=1, save_top_k=kept, filename="{step}"
        )
        return [stop, save]

    fit_sft(llama, tmp_path, callbacks=callbacks(3, 3), enable_checkpointing=True)
    stop, save = callbacks(7, 1)
    fit_sft(llama, tmp_path, tmp_path / f"step={STEP}.ckpt", callbacks=[stop, save], enable_checkpointing=True)
    assert stop.patience == 7
    assert list(save.best_k_models) == [str(tmp_path / "best" / f"step={TOTAL}.ckpt")]
    # those of the earlier recipe stay, of the new one the best
    assert sorted(path.name for path in (tmp_path / "best").glob("*.ckpt")) == [
        "step=1.ckpt", f"step={TOTAL}.ckpt", "step=2.ckpt"
    ]  # fmt: skip


def test_callbacks_can_be_added_and_removed(llama, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": " ".join(f"w{i % 28}" for i in range(200))}])
    average, mix = EMA(0.5), PretrainingMix(text, 0.5, micro_batch_size=2, seq_len=8)
    fit_sft(llama, tmp_path, callbacks=[MetricGuard()])
    start = tmp_path / "step=2.ckpt"
    fit_sft(llama, tmp_path, start, callbacks=[average, mix], max_steps=3, accumulate_grad_batches=2)
    assert int(average._average_model.n_averaged) == 1, "the average begins after the first step"
    assert mix.first_sequence == 0 and mix.first_step == 2


def record_text(mix: PretrainingMix) -> list[list[int]]:
    """Return a list that gets every sequence of text that is trained on."""
    taken: list[list[int]] = []
    setup = mix.setup

    def record(*args: Any, **given: Any) -> None:
        setup(*args, **given)
        assert mix.blocks is not None
        get_batch = mix.blocks.get_batch

        def get(*given: Any) -> Any:
            batch = get_batch(*given)
            taken.extend(batch.input_ids.tolist())
            return batch

        mix.blocks.get_batch = get

    mix.setup = record
    return taken


@pytest.mark.parametrize(("micro_batch_size", "passes", "accumulate"), [(2, 1, 1), (4, 1, 1), (1, 3, 1), (3, 1, 2)])
def test_the_pretraining_mix_takes_every_sequence_once_in_any_sizes(
    micro_batch_size, passes, accumulate, llama, tmp_path
):
    text = write_rows(tmp_path / "text.jsonl", [{"text": " ".join(f"w{i * i % 28}" for i in range(900))}])
    before = PretrainingMix(text, 0.5, micro_batch_size=2, seq_len=8, gradient_norms=False)
    taken = record_text(before)
    fit_sft(llama, tmp_path, callbacks=[before], max_steps=4)
    now = PretrainingMix(text, 0.5, micro_batch_size, passes, seq_len=8, gradient_norms=False)
    rest = record_text(now)
    _, run, _ = fit_sft(llama, tmp_path, tmp_path / "step=4.ckpt", callbacks=[now], accumulate_grad_batches=accumulate)
    steps = run.global_step - 4
    assert len(taken) == 8 and len(rest) == steps * micro_batch_size * passes * accumulate
    blocks = now.blocks
    in_order = [blocks.blocks[index].tolist() for index in infinite(len(blocks), 8 + len(rest))]
    assert taken + rest == in_order


def infinite(num_rows: int, count: int) -> list[int]:
    from lit_rlhf.data.loader import epoch_permutation

    return [row for epoch in range(1 + count // num_rows) for row in epoch_permutation(num_rows, 0, epoch)][:count]


# ------------------------------------------------------------------------------------------------------------------ PPO


class RecordEpisodes(L.Callback):
    """Records the rows of every micro-batch by their text and old log-probs, with the epoch."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, tuple[float, ...]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        for logprobs, mask in zip(batch.old_logprobs, batch.response_mask):
            self.rows.append((trainer.current_epoch, tuple(logprobs[mask].tolist())))


class RecordBatches(L.Callback):
    """Records the number of every micro-batch in its epoch, and whether the Trainer takes it for the last."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, bool]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.batches.append((trainer.current_epoch, index, trainer.is_last_batch))


class RecordPrompts(PromptData):
    """Prompts of an infinite supply; records which were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        module, data = self.trainer.lightning_module, self
        next_prompts = module.next_prompts

        def record(prompts: Any) -> Any:
            data.taken.extend(range(module.num_prompts, module.num_prompts + module.sizes.num_prompts))
            return next_prompts(prompts)

        module.next_prompts = record
        return loader


def fit_ppo(
    model: str,
    folder: Path,
    start: Any = None,
    sampling: Any = None,
    kl: Any = None,
    accumulate: int = 1,
    rate: float = 1e-3,
    **settings: Any,
) -> Any:
    trainer = {name: settings.pop(name) for name in ("max_epochs", "max_steps") if name in settings}
    callbacks = settings.pop("callbacks", [])
    sizes = {"rollout_batch_size": 16, "micro_batch_size": 2, "critic_learning_rate": 1e-3} | settings
    module = PPOModule(
        model, WordShare(), sampling or SamplingParams(6), PPOConfig(**sizes), kl or FixedKLController(0.1),
        optimizer=lambda groups: AdamW(groups, **ADAMW | {"lr": rate}),
    )  # fmt: skip
    episodes, recorder, data = RecordEpisodes(), RecordStep(), RecordPrompts()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = quiet_trainer(
        folder, callbacks=[episodes, recorder, *callbacks, *([] if start else [save])],
        accumulate_grad_batches=accumulate, enable_checkpointing=start is None, **{"max_epochs": 3} | trainer,
    )  # fmt: skip
    run.fit(module, datamodule=data, ckpt_path=start)
    return module, run, episodes.rows, recorder, data.taken


@pytest.mark.parametrize(
    ("step", "micro_batch_size", "accumulate"),
    [(3, 2, 1), (3, 1, 2), (3, 1, 1), (4, 4, 1), (4, 4, 2), (12, 1, 4), (8, 4, 4), (6, 2, 2)],
)
def test_ppo_in_other_sizes_takes_every_episode_and_every_prompt_once(
    step, micro_batch_size, accumulate, llama, tmp_path, recwarn
):
    _, _, before, _, prompts = fit_ppo(llama, tmp_path, max_steps=step)
    start = tmp_path / f"step={step}.ckpt"
    recorder = RecordBatches()
    sizes = {"micro_batch_size": micro_batch_size, "accumulate": accumulate}
    _, run, after, _, more = fit_ppo(llama, tmp_path, start, callbacks=[recorder], **sizes)
    per_epoch = 16 // micro_batch_size
    first = 2 * step // micro_batch_size
    assert recorder.batches == [
        (number // per_epoch, number % per_epoch, (number + 1) % per_epoch == 0)
        for number in range(first, 3 * per_epoch)
    ]
    rows = before + after
    for epoch in range(3):
        of_epoch = [logprobs for number, logprobs in rows if number == epoch]
        assert len(of_epoch) == 16 and len(set(of_epoch)) == 16, epoch
    size = micro_batch_size * accumulate
    assert run.global_step == step + (48 - 2 * step) // size
    assert prompts + more == list(range(48))
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_ppo_of_another_number_of_episodes_continues_between_iterations_with_the_next_prompts(llama, tmp_path):
    _, _, _, _, prompts = fit_ppo(llama, tmp_path, max_steps=8)
    module, _, after, _, more = fit_ppo(llama, tmp_path, tmp_path / "step=8.ckpt", rollout_batch_size=24)
    assert prompts + more == list(range(16 + 24 + 24)) and len(after) == 48
    assert module.num_iterations == 3, "the sampling noise of an iteration is of its number"


def test_the_prompts_after_any_number_of_them_are_the_next_of_the_supply(llama):
    supply = PromptSource([TokenizedPrompt([number], {}) for number in range(7)], 0, seed=3)
    module = PPOModule(llama, WordShare())
    for count in (1, 2, 3, 6, 7, 16):
        module.sizes = BatchSizes(count, count, 1, 1, 1)
        for module.num_prompts in range(40):
            expected = supply.get_prompts(0, module.num_prompts + count)[module.num_prompts :]
            assert [each.input_ids for each in module.next_prompts(supply)] == [each.input_ids for each in expected]


def test_samples_of_a_prompt_keep_their_order_in_an_unfinished_iteration(llama, tmp_path):
    _, _, before, _, _ = fit_ppo(llama, tmp_path, max_steps=2, micro_batch_size=4, samples_per_prompt=4)
    # a prompt's samples fit no minibatch of two: a new iteration would be shuffled by single episodes
    _, _, after, _, _ = fit_ppo(
        llama, tmp_path, tmp_path / "step=2.ckpt", samples_per_prompt=4, micro_batch_size=2, max_epochs=1
    )
    assert len({logprobs for _, logprobs in before + after}) == 16


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"rollout_batch_size": 32},
            "in the middle of an iteration of 16 episodes, and ppo.rollout_batch_size is 32 now",
        ),
        (
            {"rollout_batch_size": 8},
            "in the middle of an iteration of 16 episodes, and ppo.rollout_batch_size is 8 now",
        ),
        (
            {"micro_batch_size": 4},
            "after 6 episodes of its iteration, .* take a minibatch of 1, 2, or a checkpoint at the",
        ),
        ({"micro_batch_size": 16}, "after 6 episodes of its iteration"),
        (
            {"sampling": SamplingParams(6, temperature=0.5)},
            "sampled with .*'temperature': 1.0.* has .*'temperature': 0.5",
        ),
        ({"sampling": SamplingParams(6, top_k=3)}, "sampled with .*'top_k': None.* has .*'top_k': 3"),
    ],
)
def test_an_unfinished_iteration_that_cannot_continue_is_refused_in_one_line(changed, line, llama, tmp_path):
    fit_ppo(llama, tmp_path, max_steps=3)
    with pytest.raises(UserError, match=line) as refusal:
        fit_ppo(llama, tmp_path, tmp_path / "step=3.ckpt", **changed)
    assert "\n" not in str(refusal.value)
    _, run, _, _, _ = fit_ppo(llama, tmp_path, tmp_path / "step=3.ckpt", sampling=SamplingParams(4), max_epochs=1)
    assert run.global_step == 8, "a setting of the next rollout alone can change"


def test_more_epochs_over_an_unfinished_iteration_and_fewer(llama, tmp_path):
    fit_ppo(llama, tmp_path, max_steps=10, ppo_epochs=2)
    with pytest.raises(UserError, match=r"after 20 episodes in epochs of 16, and ppo\.ppo_epochs is 1"):
        fit_ppo(llama, tmp_path, tmp_path / "step=10.ckpt", ppo_epochs=1)
    _, run, rows, _, _ = fit_ppo(llama, tmp_path, tmp_path / "step=10.ckpt", ppo_epochs=3, max_epochs=1)
    assert run.global_step == 24 and len(rows) == 28


def test_the_learning_rates_of_policy_and_critic_are_those_of_the_recipe(llama, tmp_path):
    module, _, _, _, _ = fit_ppo(llama, tmp_path, max_steps=STEP)
    start = tmp_path / f"step={STEP}.ckpt"
    _, _, _, recorder, _ = fit_ppo(llama, tmp_path, start, rate=1e-4, critic_learning_rate=1e-2, max_steps=STEP + 1)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    names = [n for n in names if "critic" not in n] + [n for n in names if "critic" in n]
    moments = read_moments(start, names)
    expected = adamw_step(recorder, moments, STEP + 1, ADAMW | {"lr": 1e-4, "critic_lr": 1e-2})
    for name, weight in recorder.after.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-6, rtol=1e-6, msg=name)


class SetInTraining(L.Callback):
    """Sets the coefficients of the update when training starts: another way than the recipe."""

    def __init__(self, settings: PPOConfig) -> None:
        self.settings = settings

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.ppo = self.settings


@pytest.mark.parametrize(
    "changed",
    [{"clip_range": 1e-3}, {"value_clip_range": 1e-6}, {"value_coefficient": 3.0}, {"entropy_coefficient": 0.5}],
    ids=lambda changed: next(iter(changed)),
)
def test_coefficients_of_the_update_hold_from_the_next_step_of_an_iteration(changed, llama, tmp_path):
    # in the second iteration, with a KL that the values have to learn
    given: dict[str, Any] = {"rate": 1e-2, "critic_learning_rate": 1e-2}
    fit_ppo(llama, tmp_path, kl=FixedKLController(2.0), max_steps=11, **given)
    start = tmp_path / "step=11.ckpt"
    sizes = {"rollout_batch_size": 16, "micro_batch_size": 2, "critic_learning_rate": 1e-2}
    runs = {
        "recipe": fit_ppo(llama, tmp_path, start, max_steps=12, **given, **changed),
        "set": fit_ppo(
            llama, tmp_path, start, max_steps=12, **given,
            callbacks=[SetInTraining(PPOConfig(**sizes, **changed))],
        ),
        "unchanged": fit_ppo(llama, tmp_path, start, max_steps=12, **given),
    }  # fmt: skip
    gradients = {name: torch.cat([g.flatten() for g in run[3].gradients.values()]) for name, run in runs.items()}
    assert torch.equal(gradients["recipe"], gradients["set"])
    assert not torch.equal(gradients["recipe"], gradients["unchanged"])


@pytest.mark.parametrize(
    ("before", "now", "continues"),
    [
        (("adaptive", 0.1, 6.0, 100), ("adaptive", 0.1, 3.0, 100), True),
        (("adaptive", 0.1, 6.0, 100), ("adaptive", 0.1, 6.0, 50), True),
        (("adaptive", 0.1, 6.0, 100), ("adaptive", 0.5, 6.0, 100), False),
        (("adaptive", 0.1, 6.0, 100), ("fixed", 0.5), False),
        (("fixed", 0.1), ("fixed", 0.5), False),
        (("fixed", 0.1), ("adaptive", 0.5, 6.0, 100), False),
    ],
)
def test_the_kl_penalty_is_that_of_the_recipe(before, now, continues, llama, tmp_path):
    def controller(kind: str, *settings: Any) -> Any:
        return AdaptiveKLController(*settings) if kind == "adaptive" else FixedKLController(*settings)

    module, run, _, _, _ = fit_ppo(llama, tmp_path, kl=controller(*before), max_steps=8)
    start_value = module.kl.coefficient if continues else now[1]
    resumed, run, _, _, _ = fit_ppo(llama, tmp_path, tmp_path / "step=8.ckpt", kl=controller(*now), max_epochs=2)
    assert float(run.callback_metrics["reward/kl_coefficient"]) == pytest.approx(start_value, rel=1e-6)
    expected = start_value
    if now[0] == "adaptive":
        error = min(max(float(run.callback_metrics["reward/kl"]) / now[2] - 1, -0.2), 0.2)
        expected *= 1 + error * 16 / now[3]
    assert resumed.kl.coefficient == pytest.approx(expected, rel=1e-5)


class Halving(KLController):
    """A controller of one's own, whose state has a number under the name that `AdaptiveKLController` uses."""

    def __init__(self) -> None:
        self.coefficient = 0.5

    def update(self, kl: float, num_episodes: int) -> None:
        self.coefficient /= 2

    def state_dict(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient, "initial_coefficient": 0.5}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state["coefficient"]


class Doubling(Halving):
    """Another, with the same state."""

    def update(self, kl: float, num_episodes: int) -> None:
        self.coefficient *= 2


CONTROLLERS = (Halving, Doubling, partial(AdaptiveKLController, 0.5), partial(FixedKLController, 0.5))


@pytest.mark.parametrize("now", CONTROLLERS)
@pytest.mark.parametrize("before", CONTROLLERS)
def test_the_state_of_a_kl_controller_is_for_its_own_class_alone(before, now, llama, monkeypatch):
    monkeypatch.setattr(LitModule, "on_load_checkpoint", lambda *_: None)  # checks what is not in this checkpoint
    earlier, module = before(), PPOModule(llama, WordShare(), kl=now())
    earlier.update(0.0, 16)
    checkpoint = {"lit_rlhf": {"kl_controller": class_path(earlier)}, "kl_controller": earlier.state_dict()}
    module.on_load_checkpoint(checkpoint)
    is_same = type(earlier) is type(module.kl) and not isinstance(earlier, FixedKLController)
    assert module.kl.coefficient == (earlier.coefficient if is_same else 0.5)


# ------------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("make", "is_direct"),
    [
        (cosine(0.1, 3), True),
        (lambda o: ConstantWithWarmup(o, 2, 0.2), True),
        (lambda o: LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (step + 1)]), True),
        (lambda o: StepLR(o, 2, 0.5), False),
        (lambda o: CosineAnnealingLR(o, 6), False),
        (lambda o: MultiplicativeLR(o, lambda step: 0.5), False),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_a_new_schedule_is_where_so_many_steps_bring_it(make, is_direct, steps):
    def make_schedule() -> Any:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.5, 0.25)]
        schedule = make(SGD(groups))
        if isinstance(schedule, TrainerLengthSchedule):
            schedule.set_length(10, 5)
        return schedule

    expected, schedule = make_schedule(), make_schedule()
    for each in (expected, schedule):
        each.optimizer.step()  # or torch warns
    for _ in range(steps):
        expected.step()
    calls = []
    take = schedule.step
    schedule.step = lambda: (calls.append(1), take())
    step_scheduler(schedule, steps)
    del schedule.step
    assert len(calls) == (min(steps, 1) if is_direct else steps)
    assert schedule.state_dict() == expected.state_dict()
    for one, other in zip(schedule.optimizer.param_groups, expected.optimizer.param_groups):
        assert one["lr"] == other["lr"]
