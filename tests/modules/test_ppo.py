"""PPO: it learns, its first ratio is 1, and its numbers depend neither on ranks nor on micro-batches."""

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
from tests.helpers.ppo_fakes import CountOf, PromptData
from tests.helpers.ranks import on_ranks


class Watch(L.Callback):
    """Keeps the metrics of every iteration and batch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.start: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights that will be trained."""
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the iteration's."""
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def make(model: str, **settings: Any) -> PPOModule:
    """Return a small PPO module."""
    ppo = {"rollout_batch_size": 64, "micro_batch_size": 8, "critic_learning_rate": 5e-3, **settings.pop("ppo", {})}
    defaults = {"kl": FixedKLController(0.02), "optimizer": lambda p: torch.optim.Adam(p, lr=2e-3)}
    return PPOModule(model, CountOf(), SamplingParams(max_new_tokens=8), PPOConfig(**ppo), **{**defaults, **settings})


@pytest.mark.parametrize("critic", [None, SharedBackboneCritic()], ids=["separate", "shared_trunk"])
def test_gae_approaches_a_known_optimum(critic, llama, trainer_of):
    watch = Watch()
    module = make(llama, critic=critic)
    trainer_of(max_epochs=18, accumulate_grad_batches=2, callbacks=[watch]).fit(module, datamodule=PromptData())
    scores = [epoch["reward/score"] for epoch in watch.epochs]
    assert scores[0] < 0.15 and scores[-1] > 0.5, scores
    assert watch.epochs[-1]["value/explained_variance"] > 0.2
    assert watch.epochs[0]["reward/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("estimator", [GRPOAdvantage, RLOOAdvantage])
def test_without_a_critic_it_is_approached_too(estimator, llama, trainer_of):
    watch = Watch()
    module = make(llama, advantages=estimator(), ppo={"samples_per_prompt": 4})
    trainer = trainer_of(max_epochs=18, accumulate_grad_batches=2, callbacks=[watch])
    trainer.fit(module, datamodule=PromptData())
    scores = [epoch["reward/score"] for epoch in watch.epochs]
    assert scores[0] < 0.15 and scores[-1] > 0.5, scores
    assert not [name for name in watch.epochs[-1] if name.startswith("value/")]
    assert module.critic is None and len(trainer.optimizers[0].param_groups) == 1
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy"}


def test_the_adaptive_controller_holds_its_target(llama, trainer_of):
    watch, target = Watch(), 3.0
    module = make(llama, kl=AdaptiveKLController(0.05, target=target, horizon=400))
    trainer_of(max_epochs=60, accumulate_grad_batches=2, callbacks=[watch]).fit(module, datamodule=PromptData())
    held = [epoch["reward/kl"] for epoch in watch.epochs[-25:]]
    assert abs(sum(held) / len(held) / target - 1) < 0.2, held


def test_the_first_minibatch_has_ratio_one_and_advantages_of_mean_zero(llama, trainer_of):
    watch = Watch()
    module = make(llama, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), ppo={"critic_learning_rate": 0.0})
    trainer_of(max_epochs=1, callbacks=[watch]).fit(module, datamodule=PromptData())
    assert watch.epochs[0]["policy/clip_fraction"] == 0
    assert watch.epochs[0]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    # at ratio 1 the loss is minus the mean of the advantages, which were whitened
    assert watch.epochs[0]["policy/loss"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("logprobs", ["sampled", "recomputed"])
def test_truncated_sampling_starts_at_ratio_one_and_kl_zero(logprobs, llama, trainer_of):
    watch = Watch()
    module = make(llama, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), ppo={"logprobs": logprobs, "chunk": 5})
    module.sampling = SamplingParams(8, 1.3, top_k=9, top_p=0.8, min_new_tokens=3)
    trainer_of(max_epochs=1, callbacks=[watch]).fit(module, datamodule=PromptData())
    figures = watch.epochs[0]
    assert figures["policy/clip_fraction"] == 0
    assert figures["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert figures["reward/kl"] == pytest.approx(0, abs=1e-5)
    assert figures["response/length"] >= 3
    assert 0 <= figures["rollout/logprob_mismatch"] < 1e-5
    assert figures["rollout/logprob_mismatch"] <= figures["rollout/logprob_mismatch_max"] < 1e-4


class OffByAHalf(CachedGenerator):
    """An engine whose log-probs are wrong."""

    def generate(self, *args: Any, **settings: Any) -> Any:
        """Generate, then shift."""
        rollout = super().generate(*args, **settings)
        return rollout._replace(logprobs=rollout.logprobs - 0.5 * rollout.response_mask)


def test_log_probs_of_an_engine_that_disagrees_are_reported_and_can_be_recomputed(llama, trainer_of):
    figures = {}
    for logprobs in ("sampled", "recomputed"):
        watch = Watch()
        still = {"ppo": {"logprobs": logprobs}, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
        module = make(llama, generator=OffByAHalf(), **still)
        trainer_of(max_epochs=1, callbacks=[watch]).fit(module, datamodule=PromptData())
        figures[logprobs] = watch.epochs[0]
        assert figures[logprobs]["rollout/logprob_mismatch"] == pytest.approx(0.5, abs=1e-5)
        assert figures[logprobs]["rollout/logprob_mismatch_max"] == pytest.approx(0.5, abs=1e-4)
    assert figures["sampled"]["policy/approx_kl"] > 0.1
    assert figures["recomputed"]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)


def test_the_samples_of_a_prompt_are_consecutive_episodes_on_any_number_of_ranks(llama, tmp_path):
    def roll(devices: int) -> list[torch.Tensor]:
        module = make(llama, ppo={"rollout_batch_size": 24, "samples_per_prompt": 3, "micro_batch_size": 4})
        seen: list[torch.Tensor] = []
        collect = module.collect_experience

        def keep(prompts: Any) -> Any:
            iteration = collect(prompts)
            seen.extend((*iteration.trajectories[:3], iteration.trajectories.prompt_index))
            return iteration

        module.collect_experience = keep  # type: ignore[method-assign]
        torch.manual_seed(0)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        strategy = "ddp" if devices > 1 else "auto"
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, logger=False,
            default_root_dir=tmp_path, **quiet,
        )  # fmt: skip
        trainer.fit(module, datamodule=PromptData())
        return seen

    ids, attention, mask, group = roll(1)
    assert group.tolist() == [prompt for prompt in range(8) for _ in range(3)]
    prompts = ids[:, : -mask.shape[1]]
    assert torch.equal(prompts[::3], prompts[1::3]) and torch.equal(prompts[::3], prompts[2::3])
    assert len({tuple(row) for row in ids.tolist()}) > 16, "the samples differ"
    for rank in on_ranks(lambda: roll(2), tmp_path):
        for mine, whole in zip(rank, (ids, attention, mask, group), strict=True):
            assert torch.equal(mine, whole)


def test_samples_that_do_not_divide_are_refused_before_loading(llama, trainer_of):
    module = make(llama, ppo={"rollout_batch_size": 64, "samples_per_prompt": 5})
    with pytest.raises(UserError, match="rollout_batch_size 64 is not a multiple of samples_per_prompt 5 x 1 ranks"):
        trainer_of(max_epochs=1).fit(module, datamodule=PromptData())


def train(model: str, folder: Any, mix: str | None = None, kind: str = "separate", **settings: Any) -> dict[str, Any]:
    """Train two iterations of two minibatches, twice over; return weights and metrics."""
    torch.manual_seed(0)
    watch = Watch()
    callbacks: list[L.Callback] = [watch]
    if mix:
        callbacks.append(PretrainingMix(mix, coefficient=2.0, micro_batch_size=settings.pop("mix_batch"), seq_len=16))
    module = make(
        model,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        ppo={
            "rollout_batch_size": 16,
            "micro_batch_size": settings.pop("micro_batch_size"),
            "critic_learning_rate": 0.05,
            "epochs": 2,
            **NUMBERS[kind],
        },
        **KINDS[kind](),
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
    metrics = {name: value for name, value in watch.epochs[-1].items() if not name.startswith(("time/", "update/"))}
    still = [name for name, p in module.named_parameters() if name in watch.start and torch.equal(p, watch.start[name])]
    return {"weights": [p.detach().clone() for p in module.parameters()], "metrics": metrics, "still": still}


KINDS: dict[str, Any] = {
    "separate": dict,
    "shared_trunk": lambda: {"critic": SharedBackboneCritic()},
    "adapters": lambda: {"critic": LoRACritic(), "adapter": LoRA(rank=2)},
    "group_relative": lambda: {"advantages": GRPOAdvantage()},
}
NUMBERS: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS} | {"group_relative": {"samples_per_prompt": 4}}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare weights and metrics."""
    for mine, theirs in zip(one["weights"], other["weights"]):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert one["metrics"].keys() == other["metrics"].keys()
    for name, value in one["metrics"].items():
        assert value == pytest.approx(other["metrics"][name], abs=1e-5, rel=1e-5), name


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Pretraining text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{(i * 7 + j * 3) % 28}" for j in range(40)) for i in range(30)))
    return str(path)


@pytest.mark.parametrize("mixed", [False, True], ids=["ppo", "ppo_ptx"])
def test_micro_batches_and_ranks_change_nothing(mixed, llama, text, tmp_path):
    """One process at micro-batch 8, 2 and 1; two ranks at 2."""

    def run(micro_batch_size: int, accumulate: int, devices: int = 1) -> dict[str, Any]:
        sizes = {"micro_batch_size": micro_batch_size, "accumulate_grad_batches": accumulate, "devices": devices}
        sizes |= {"mix_batch": micro_batch_size} if mixed else {}
        return train(llama, tmp_path, text if mixed else None, **sizes, **({"strategy": "ddp"} if devices > 1 else {}))

    whole = run(8, 1)
    for micro_batch_size in (2, 1):
        assert_same(run(micro_batch_size, 8 // micro_batch_size), whole)
    for rank in on_ranks(lambda: run(2, 2, 2), tmp_path):
        assert_same(rank, whole)


@pytest.mark.parametrize("kind", ["shared_trunk", "adapters", "group_relative"])
def test_ranks_change_nothing_with_another_critic_or_none(kind, llama, text, tmp_path):
    whole = train(llama, tmp_path, text, kind, micro_batch_size=8, mix_batch=8, devices=1)
    # the first factor of an adapter moves when its second has
    assert [name for name in whole["still"] if "lora_A" not in name] == [], "all that is trained has moved"
    sizes = {"micro_batch_size": 2, "mix_batch": 2, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    for rank in on_ranks(lambda: train(llama, tmp_path, text, kind, **sizes), tmp_path):
        assert_same(rank, whole)


def test_lora_trains_the_adapters_alone_and_takes_the_base_as_reference(llama, trainer_of):
    watch = Watch()
    module = make(llama, adapter=LoRA(rank=4), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    trainer_of(max_epochs=12, accumulate_grad_batches=2, callbacks=[watch]).fit(module, datamodule=PromptData())
    assert "reference" not in module.frozen
    assert watch.epochs[0]["reward/kl"] == pytest.approx(0.0, abs=1e-5)
    assert watch.epochs[-1]["reward/kl"] > 0.05
    assert watch.epochs[-1]["reward/score"] > watch.epochs[0]["reward/score"] + 0.1


def test_sizes_that_do_not_divide_are_refused_before_loading(llama, trainer_of):
    with pytest.raises(UserError, match="rollout_batch_size 64 is not a multiple of the minibatch 24"):
        trainer_of(max_epochs=1, accumulate_grad_batches=3).fit(make(llama), datamodule=PromptData())


def test_a_reward_that_is_not_a_number_stops_the_run(llama, trainer_of):
    module = make(llama)
    module.reward.score = lambda episodes: torch.full((len(episodes.responses),), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="64 of 64 scores at step 0 are not finite"):
        trainer_of(max_epochs=1).fit(module, datamodule=PromptData())


def test_the_critics_warm_up_moves_the_critic_alone_and_the_gradients_norm_is_logged(llama, text, trainer_of):
    watch = Watch()
    mix = PretrainingMix(text, coefficient=1.0, micro_batch_size=4, seq_len=16)
    warming = {"rollout_batch_size": 16, "critic_warmup_iterations": 2}
    module = make(llama, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), ppo=warming)
    policies: list[torch.Tensor] = []

    class Policies(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            policies.append(torch.cat([p.detach().flatten() for p in pl_module.policy.parameters()]))

    trainer = trainer_of(max_epochs=3, callbacks=[watch, Policies(), mix])
    trainer.fit(module, datamodule=PromptData())
    start = torch.cat([watch.start[f"policy.{name}"].flatten() for name, _ in module.policy.named_parameters()])
    assert torch.equal(policies[0], start) and torch.equal(policies[1], start) and not torch.equal(policies[2], start)
    assert watch.epochs[1]["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert watch.epochs[1]["value/loss"] != watch.epochs[0]["value/loss"]
    assert 0 < watch.epochs[0]["train/grad_norm"] < watch.epochs[2]["train/grad_norm"]


def test_the_entropy_bonus_is_the_full_distributions(llama, trainer_of):
    """Without advantages (a constant reward, group-relative) the bonus alone moves the policy: entropy rises."""
    figures = []
    for coefficient in (0.0, 1.0):
        watch = Watch()
        module = make(
            llama,
            advantages=GRPOAdvantage(),
            kl=FixedKLController(0.0),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            ppo={"entropy_coefficient": coefficient, "samples_per_prompt": 2, "rollout_batch_size": 16},
        )
        module.reward.score = lambda episodes: torch.ones(len(episodes.responses))  # type: ignore[method-assign]
        trainer_of(max_epochs=2, callbacks=[watch]).fit(module, datamodule=PromptData())
        figures.append(watch.epochs)
        still = all(torch.equal(p, watch.start[name]) for name, p in module.named_parameters())
        assert still == (coefficient == 0)
    assert "policy/entropy" not in figures[0][-1]
    assert figures[1][1]["policy/entropy"] > figures[1][0]["policy/entropy"]
    # the mean over sampled tokens of -log p estimates the same number
    assert figures[1][0]["policy/entropy"] == pytest.approx(figures[1][0]["policy/entropy_estimate"], rel=0.25)


def test_a_warm_up_without_a_critic_is_refused(llama):
    with pytest.raises(UserError, match=r"ppo\.critic_warmup_iterations: GRPOAdvantage has no critic to warm up"):
        make(llama, advantages=GRPOAdvantage(), ppo={"critic_warmup_iterations": 1})
    with pytest.raises(UserError, match=r"critic: RLOOAdvantage reads no values; leave model\.critic out"):
        make(llama, advantages=RLOOAdvantage(), critic=SharedBackboneCritic())
