"""PPO: it learns, the first ratio is 1, and results depend neither on ranks nor on micro-batches."""

from typing import Any

import lightning as L
import pytest
import torch

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.modules.critics import LoRACritic, SharedBackboneCritic
from lit_rlhf.rollout.advantages import GRPOAdvantage, RLOOAdvantage
from lit_rlhf.rollout.kl_controller import AdaptiveKLController, FixedKLController
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.ranks import on_ranks
from tests.helpers.varlen_kernel import use_reference_kernel


class RecordMetrics(L.Callback):
    """Records the metrics of every iteration and the initial weights."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.initial: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the trainable weights."""
        self.initial = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the metrics of the iteration."""
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def make_module(model: str, **settings: Any) -> PPOModule:
    """Return a small PPO module."""
    ppo = {"rollout_batch_size": 64, "micro_batch_size": 8, "critic_learning_rate": 5e-3, **settings.pop("ppo", {})}
    defaults = {"kl": FixedKLController(0.02), "optimizer": lambda p: torch.optim.Adam(p, lr=2e-3)}
    return PPOModule(model, WordShare(), SamplingParams(max_new_tokens=8), PPOConfig(**ppo), **{**defaults, **settings})


@pytest.mark.parametrize("critic", [None, SharedBackboneCritic()], ids=["separate", "shared_backbone"])
def test_gae_raises_the_score_toward_a_known_optimum(critic, llama, make_trainer):
    recorder = RecordMetrics()
    module = make_module(llama, critic=critic)
    make_trainer(max_epochs=18, accumulate_grad_batches=2, callbacks=[recorder]).fit(module, datamodule=PromptData())
    scores = [epoch["reward/score"] for epoch in recorder.metrics]
    assert scores[0] < 0.15 and scores[-1] > 0.5, scores
    assert recorder.metrics[-1]["value/explained_variance"] > 0.2
    assert recorder.metrics[0]["reward/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("estimator", [GRPOAdvantage, RLOOAdvantage])
def test_estimators_without_a_critic_raise_it_too(estimator, llama, make_trainer):
    recorder = RecordMetrics()
    module = make_module(llama, advantages=estimator(), ppo={"samples_per_prompt": 4})
    trainer = make_trainer(max_epochs=18, accumulate_grad_batches=2, callbacks=[recorder])
    trainer.fit(module, datamodule=PromptData())
    scores = [epoch["reward/score"] for epoch in recorder.metrics]
    assert scores[0] < 0.15 and scores[-1] > 0.5, scores
    assert not [name for name in recorder.metrics[-1] if name.startswith("value/")]
    assert module.critic is None and len(trainer.optimizers[0].param_groups) == 1
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy"}


def test_the_adaptive_controller_holds_its_target(llama, make_trainer):
    recorder, target = RecordMetrics(), 3.0
    module = make_module(llama, kl=AdaptiveKLController(0.05, target=target, horizon=400))
    make_trainer(max_epochs=60, accumulate_grad_batches=2, callbacks=[recorder]).fit(module, datamodule=PromptData())
    held = [epoch["reward/kl"] for epoch in recorder.metrics[-25:]]
    assert abs(sum(held) / len(held) / target - 1) < 0.2, held


def test_the_first_minibatch_has_ratio_one_and_advantages_of_mean_zero(llama, make_trainer):
    recorder = RecordMetrics()
    module = make_module(llama, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), ppo={"critic_learning_rate": 0.0})
    make_trainer(max_epochs=1, callbacks=[recorder]).fit(module, datamodule=PromptData())
    assert recorder.metrics[0]["policy/clip_fraction"] == 0
    assert recorder.metrics[0]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    # at ratio 1 the loss is minus the mean of the advantages, which were whitened
    assert recorder.metrics[0]["policy/loss"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_filtered_sampling_starts_at_ratio_one_and_kl_zero(old_logprobs, llama, make_trainer):
    recorder = RecordMetrics()
    module = make_module(
        llama,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        ppo={"old_logprobs": old_logprobs, "forward_batch_size": 5},
    )
    module.sampling = SamplingParams(8, 1.3, top_k=9, top_p=0.8, min_new_tokens=3)
    make_trainer(max_epochs=1, callbacks=[recorder]).fit(module, datamodule=PromptData())
    metrics = recorder.metrics[0]
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["reward/kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["response/length"] >= 3
    assert 0 <= metrics["rollout/logprob_mismatch"] < 1e-5
    assert metrics["rollout/logprob_mismatch"] <= metrics["rollout/logprob_mismatch_max"] < 1e-4


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["weights", "adapters"])
def test_with_the_variable_length_kernel_an_iteration_is_the_same(adapter, llama, make_trainer, monkeypatch):
    """Prompts of four responses each; a reference computes in place of the kernel of a GPU."""
    metrics = []
    for _ in range(2):
        recorder = RecordMetrics()
        critic = None if adapter is None else LoRACritic()
        module = make_module(llama, adapter=adapter, critic=critic, ppo={"samples_per_prompt": 4})
        make_trainer(max_epochs=1, callbacks=[recorder]).fit(module, datamodule=PromptData())
        metrics.append({name: value for name, value in recorder.metrics[0].items() if not name.startswith("time/")})
        use_reference_kernel(monkeypatch)
    plain, kernel = metrics
    assert plain.pop("update/padding_fraction") > kernel.pop("update/padding_fraction") == 0
    assert kernel == pytest.approx(plain, rel=1e-3, abs=1e-5)


class WrongLogprobs(CachedGenerator):
    """An engine whose log-probs are half a nat too low."""

    def generate(self, *args: Any, **settings: Any) -> Any:
        """Generate, then shift the log-probs."""
        output = super().generate(*args, **settings)
        return output._replace(logprobs=output.logprobs - 0.5 * output.response_mask)


def test_logprobs_of_an_engine_that_disagrees_are_reported_and_can_be_recomputed(llama, make_trainer):
    metrics = {}
    for old_logprobs in ("rollout", "recompute"):
        recorder = RecordMetrics()
        fixed_policy = {"ppo": {"old_logprobs": old_logprobs}, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
        module = make_module(llama, generator=WrongLogprobs(), **fixed_policy)
        make_trainer(max_epochs=1, callbacks=[recorder]).fit(module, datamodule=PromptData())
        metrics[old_logprobs] = recorder.metrics[0]
        assert metrics[old_logprobs]["rollout/logprob_mismatch"] == pytest.approx(0.5, abs=1e-5)
        assert metrics[old_logprobs]["rollout/logprob_mismatch_max"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["rollout"]["policy/approx_kl"] > 0.1
    assert metrics["recompute"]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)


def test_the_samples_of_a_prompt_are_consecutive_episodes_on_any_number_of_ranks(llama, tmp_path):
    def run(devices: int) -> list[torch.Tensor]:
        module = make_module(llama, ppo={"rollout_batch_size": 24, "samples_per_prompt": 3, "micro_batch_size": 4})
        recorded: list[torch.Tensor] = []
        collect = module.collect_experience

        def collect_and_record(prompts: Any) -> Any:
            iteration = collect(prompts)
            recorded.extend((*iteration.trajectories[:3], iteration.trajectories.prompt_index))
            return iteration

        module.collect_experience = collect_and_record  # type: ignore[method-assign]
        torch.manual_seed(0)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        strategy = "ddp" if devices > 1 else "auto"
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, logger=False,
            default_root_dir=tmp_path, **quiet,
        )  # fmt: skip
        trainer.fit(module, datamodule=PromptData())
        return recorded

    ids, attention, mask, prompt_index = run(1)
    assert prompt_index.tolist() == [prompt for prompt in range(8) for _ in range(3)]
    prompts = ids[:, : -mask.shape[1]]
    assert torch.equal(prompts[::3], prompts[1::3]) and torch.equal(prompts[::3], prompts[2::3])
    assert len({tuple(row) for row in ids.tolist()}) > 16, "the samples differ"
    for rank in on_ranks(lambda: run(2), tmp_path):
        for actual, expected in zip(rank, (ids, attention, mask, prompt_index), strict=True):
            assert torch.equal(actual, expected)


def test_samples_that_do_not_divide_are_refused_before_loading(llama, make_trainer):
    module = make_module(llama, ppo={"rollout_batch_size": 64, "samples_per_prompt": 5})
    with pytest.raises(UserError, match="rollout_batch_size 64 is not a multiple of samples_per_prompt 5 x 1 ranks"):
        make_trainer(max_epochs=1).fit(module, datamodule=PromptData())


def train(
    model: str, folder: Any, text: str | None = None, variant: str = "separate", **settings: Any
) -> dict[str, Any]:
    """Train two iterations of two minibatches and two PPO epochs; return weights and metrics."""
    torch.manual_seed(0)
    recorder = RecordMetrics()
    callbacks: list[L.Callback] = [recorder]
    if text:
        callbacks.append(PretrainingMix(text, coefficient=2.0, micro_batch_size=settings.pop("mix_batch"), seq_len=16))
    module = make_module(
        model,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        ppo={
            "rollout_batch_size": 16,
            "micro_batch_size": settings.pop("micro_batch_size"),
            "critic_learning_rate": 0.05,
            "ppo_epochs": 2,
            **VARIANT_PPO[variant],
        },
        **VARIANTS[variant](),
    )
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=callbacks,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        **quiet,
        **settings,
    )
    trainer.fit(module, datamodule=PromptData())
    metrics = {name: value for name, value in recorder.metrics[-1].items() if not name.startswith(("time/", "update/"))}
    unchanged = [
        name
        for name, p in module.named_parameters()
        if name in recorder.initial and torch.equal(p, recorder.initial[name])
    ]
    return {"weights": [p.detach().clone() for p in module.parameters()], "metrics": metrics, "unchanged": unchanged}


VARIANTS: dict[str, Any] = {
    "separate": dict,
    "shared_backbone": lambda: {"critic": SharedBackboneCritic()},
    "lora": lambda: {"critic": LoRACritic(), "adapter": LoRA(rank=2)},
    "grpo": lambda: {"advantages": GRPOAdvantage()},
}
VARIANT_PPO: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS} | {"grpo": {"samples_per_prompt": 4}}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare weights and metrics."""
    for one, other in zip(actual["weights"], expected["weights"]):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert actual["metrics"].keys() == expected["metrics"].keys()
    for name, value in actual["metrics"].items():
        assert value == pytest.approx(expected["metrics"][name], abs=1e-5, rel=1e-5), name


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Pretraining text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{(i * 7 + j * 3) % 28}" for j in range(40)) for i in range(30)))
    return str(path)


@pytest.mark.parametrize("ptx", [False, True], ids=["ppo", "ppo_ptx"])
def test_micro_batches_and_ranks_change_nothing(ptx, llama, text, tmp_path):
    """One process with micro-batches of 8, 2 and 1; two ranks with 2."""

    def run(micro_batch_size: int, accumulate: int, devices: int = 1) -> dict[str, Any]:
        sizes = {"micro_batch_size": micro_batch_size, "accumulate_grad_batches": accumulate, "devices": devices}
        sizes |= {"mix_batch": micro_batch_size} if ptx else {}
        return train(llama, tmp_path, text if ptx else None, **sizes, **({"strategy": "ddp"} if devices > 1 else {}))

    expected = run(8, 1)
    for micro_batch_size in (2, 1):
        assert_same(run(micro_batch_size, 8 // micro_batch_size), expected)
    for rank in on_ranks(lambda: run(2, 2, 2), tmp_path):
        assert_same(rank, expected)


@pytest.mark.parametrize("variant", ["shared_backbone", "lora", "grpo"])
def test_ranks_change_nothing_with_another_critic_or_none(variant, llama, text, tmp_path):
    expected = train(llama, tmp_path, text, variant, micro_batch_size=8, mix_batch=8, devices=1)
    # lora_A gets no gradient before lora_B has left 0
    assert [name for name in expected["unchanged"] if "lora_A" not in name] == [], "every trainable weight changed"
    sizes = {"micro_batch_size": 2, "mix_batch": 2, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    for rank in on_ranks(lambda: train(llama, tmp_path, text, variant, **sizes), tmp_path):
        assert_same(rank, expected)


def test_lora_trains_the_adapters_alone_and_takes_the_base_as_reference(llama, make_trainer):
    recorder = RecordMetrics()
    module = make_module(llama, adapter=LoRA(rank=4), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    make_trainer(max_epochs=12, accumulate_grad_batches=2, callbacks=[recorder]).fit(module, datamodule=PromptData())
    assert "reference" not in module.frozen
    assert recorder.metrics[0]["reward/kl"] == pytest.approx(0.0, abs=1e-5)
    assert recorder.metrics[-1]["reward/kl"] > 0.05
    assert recorder.metrics[-1]["reward/score"] > recorder.metrics[0]["reward/score"] + 0.1


def test_batch_sizes_that_do_not_divide_are_refused_before_loading(llama, make_trainer):
    with pytest.raises(UserError, match="rollout_batch_size 64 is not a multiple of the minibatch 24"):
        make_trainer(max_epochs=1, accumulate_grad_batches=3).fit(make_module(llama), datamodule=PromptData())


def test_a_reward_that_is_not_a_number_stops_the_run(llama, make_trainer):
    module = make_module(llama)
    module.reward.score = lambda episodes: torch.full((len(episodes.responses),), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="64 of 64 scores at step 0 are not finite"):
        make_trainer(max_epochs=1).fit(module, datamodule=PromptData())


def test_critic_warmup_trains_the_critic_alone_and_the_gradient_norm_is_logged(llama, text, make_trainer):
    recorder = RecordMetrics()
    mix = PretrainingMix(text, coefficient=1.0, micro_batch_size=4, seq_len=16)
    warmup = {"rollout_batch_size": 16, "critic_warmup_iterations": 2}
    module = make_module(llama, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), ppo=warmup)
    policies: list[torch.Tensor] = []

    class RecordPolicy(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            policies.append(torch.cat([p.detach().flatten() for p in pl_module.policy.parameters()]))

    trainer = make_trainer(max_epochs=3, callbacks=[recorder, RecordPolicy(), mix])
    trainer.fit(module, datamodule=PromptData())
    start = torch.cat([recorder.initial[f"policy.{name}"].flatten() for name, _ in module.policy.named_parameters()])
    assert torch.equal(policies[0], start) and torch.equal(policies[1], start) and not torch.equal(policies[2], start)
    assert recorder.metrics[1]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert recorder.metrics[1]["value/loss"] != recorder.metrics[0]["value/loss"]
    assert 0 < recorder.metrics[0]["train/grad_norm"] < recorder.metrics[2]["train/grad_norm"]


def test_the_entropy_bonus_is_of_the_full_distribution(llama, make_trainer):
    """Without advantages (a constant reward and GRPO) the bonus alone trains the policy: entropy rises."""
    metrics = []
    for coefficient in (0.0, 1.0):
        recorder = RecordMetrics()
        module = make_module(
            llama,
            advantages=GRPOAdvantage(),
            kl=FixedKLController(0.0),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            ppo={"entropy_coefficient": coefficient, "samples_per_prompt": 2, "rollout_batch_size": 16},
        )
        module.reward.score = lambda episodes: torch.ones(len(episodes.responses))  # type: ignore[method-assign]
        make_trainer(max_epochs=2, callbacks=[recorder]).fit(module, datamodule=PromptData())
        metrics.append(recorder.metrics)
        unchanged = all(torch.equal(p, recorder.initial[name]) for name, p in module.named_parameters())
        assert unchanged == (coefficient == 0)
    assert "policy/entropy" not in metrics[0][-1]
    assert metrics[1][1]["policy/entropy"] > metrics[1][0]["policy/entropy"]
    # the mean over sampled tokens of -log p estimates the same number
    assert metrics[1][0]["policy/entropy"] == pytest.approx(metrics[1][0]["policy/entropy_estimate"], rel=0.25)


def test_critic_warmup_without_a_critic_is_refused(llama):
    with pytest.raises(UserError, match=r"ppo\.critic_warmup_iterations: GRPOAdvantage has no critic to warm up"):
        make_module(llama, advantages=GRPOAdvantage(), ppo={"critic_warmup_iterations": 1})
    with pytest.raises(UserError, match=r"critic: RLOOAdvantage reads no values; leave model\.critic out"):
        make_module(llama, advantages=RLOOAdvantage(), critic=SharedBackboneCritic())
