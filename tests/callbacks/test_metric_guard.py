"""MetricGuard: warns, stops, rolls back, and refuses what it cannot do."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_rlhf.callbacks import EMA, MetricGuard, MetricLimit
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rollout.kl_controller import AdaptiveKLController
from tests.helpers.ppo_fakes import PromptData


class FractionOfW3(Reward):
    """Scores the fraction of one word."""

    def score(self, episodes: Any) -> torch.Tensor:
        return torch.tensor([response.split().count("w3") / 6 for response in episodes.responses])


class LogSchedule(L.Callback):
    """Log a metric by schedule, just before MetricGuard checks it, and store the weights of the policy."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values, self.weights, self.steps = values, [], []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.log("scheduled", self.values.get(trainer.current_epoch, 0.0))
        self.weights.append(pl_module.policy.lm_head.weight.detach().clone())
        self.steps.append(trainer.global_step)


def build_module(llama: str) -> PPOModule:
    """Build a module with four steps per iteration and a large learning rate."""
    settings = PPOConfig(rollout_batch_size=16, micro_batch_size=4)
    kl = AdaptiveKLController(0.1, target=1.0, horizon=200)
    return PPOModule(
        llama,
        FractionOfW3(),
        SamplingParams(max_new_tokens=6),
        settings,
        kl,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
    )


def train(
    make_trainer: Any, llama: str, values: dict[int, float], epochs: int, **settings: Any
) -> tuple[Any, Any, Any]:
    """Train with a schedule of metric values; return schedule, MetricGuard and module."""
    schedule, module = LogSchedule(values), build_module(llama)
    limit = {"scheduled": MetricLimit(above=1.0, action="rollback")}
    callback = MetricGuard(**{"limits": limit, "keep_every_n_epochs": 1, **settings})
    make_trainer(max_epochs=epochs, callbacks=[schedule, callback]).fit(module, datamodule=PromptData())
    return schedule, callback, module


def test_a_warning_names_metric_value_limit_and_iteration(llama, make_trainer):
    with pytest.warns(
        UserWarning, match=r"MetricGuard: scheduled is 3 in iteration 1, the limit is at least -1 and at most 2"
    ):
        train(make_trainer, llama, {1: 3.0}, 2, limits={"scheduled": MetricLimit(above=2.0, below=-1.0)})


def test_a_stop_is_an_error_and_counts_iterations_in_a_row(llama, make_trainer):
    limits = {"scheduled": MetricLimit(above=1.0, patience=2, action="stop")}
    with pytest.raises(UserError, match=r"MetricGuard: scheduled is 5 in iteration 4.*\(2 iterations in a row\)"):
        train(make_trainer, llama, {1: 5.0, 3: 5.0, 4: 5.0}, 6, limits=limits)


def test_nan_violates_every_limit():
    assert MetricLimit(above=1.0).is_violated_by(float("nan")) and MetricLimit(below=1.0).is_violated_by(float("nan"))


def test_a_rollback_takes_the_weights_that_sampled_the_last_good_rollout(llama, make_trainer, tmp_path):
    """Iteration 3 violates a limit: the weights after iteration 1, which sampled 2, are the last good ones."""
    with pytest.warns(UserWarning, match=r"scheduled is 9 in iteration 3.*rolled back to the weights of step 8"):
        schedule, callback, module = train(make_trainer, llama, {3: 9.0}, 4)
    assert schedule.steps == [4, 8, 12, 16]
    assert not torch.equal(schedule.weights[1], schedule.weights[3])
    assert torch.equal(module.policy.lm_head.weight, schedule.weights[1])
    assert callback.num_rollbacks == 1
    good = torch.load(tmp_path / "metric_guard" / "good.ckpt", weights_only=True)
    assert module.kl.coefficient == good["kl_controller"]["coefficient"]
    assert good["global_step"] == 8


def test_weights_that_were_given_up_are_never_good(llama, make_trainer, tmp_path):
    """Those after iteration 1 sampled 2, which violates: iteration 3 is good, and sampled by the ones before them."""
    with pytest.warns(UserWarning, match="rolled back"):
        train(make_trainer, llama, {2: 9.0}, 4)
    good = torch.load(tmp_path / "metric_guard" / "good.ckpt", weights_only=True)
    assert good["global_step"] == 4


def test_a_run_continues_after_a_rollback(llama, make_trainer):
    with pytest.warns(UserWarning, match="rolled back"):
        schedule, _, module = train(make_trainer, llama, {2: 9.0}, 5)
    assert schedule.steps[-1] == 20  # a rollback does not reset the step, which selects prompts and noise
    assert not torch.equal(schedule.weights[3], schedule.weights[0])
    assert all(torch.isfinite(p).all() for p in module.policy.parameters())


class RecordSettings(L.Callback):
    """Records learning rate and weight decay of every optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.decays: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.decays.append(optimizer.param_groups[0]["weight_decay"])


def test_learning_rate_and_settings_go_on_after_a_rollback(llama, make_trainer):
    """The good checkpoint may be of a recipe whose weight decay was 0, which has other parameter groups."""
    path = None
    for decay, epochs in ((0.0, 3), (0.5, 5)):
        recorder, module = RecordSettings(), build_module(llama)
        module.make_optimizer = lambda groups, decay=decay: torch.optim.AdamW(groups, lr=1e-3, weight_decay=decay)
        module.make_scheduler = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        guard = MetricGuard({"scheduled": MetricLimit(above=1.0, action="rollback")}, keep_every_n_epochs=1)
        trainer = make_trainer(max_epochs=epochs, callbacks=[LogSchedule({3: 9.0}), guard, recorder])
        trainer.fit(module, datamodule=PromptData(), ckpt_path=path)
        path = f"{trainer.default_root_dir}/resumed.ckpt"
        trainer.save_checkpoint(path)
    assert guard.num_rollbacks == 1
    assert recorder.rates == pytest.approx([1e-3 * 0.9**step for step in range(12, 20)], rel=1e-9)
    assert recorder.decays == [0.5] * 8


def test_too_many_rollbacks_stop_the_run(llama, make_trainer):
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match="has rolled back 1 times and violates a limit again"),
    ):
        train(make_trainer, llama, {2: 9.0, 3: 9.0}, 5, max_rollbacks=1)


def test_a_rollback_without_a_good_checkpoint_is_an_error(llama, make_trainer):
    with pytest.raises(UserError, match="no good checkpoint to roll back to yet"):
        train(make_trainer, llama, {0: 9.0}, 2)


def test_a_metric_that_is_not_logged_is_an_error(llama, make_trainer):
    with pytest.raises(UserError, match=r"no metric 'reward/klx' is logged; there are .*reward/kl,"):
        train(make_trainer, llama, {}, 1, limits={"reward/klx": MetricLimit(above=1.0)})


def test_the_default_limits_accept_a_healthy_run(llama, make_trainer, recwarn):
    make_trainer(max_epochs=2, callbacks=[MetricGuard()]).fit(build_module(llama), datamodule=PromptData())
    assert not [each for each in recwarn if "MetricGuard" in str(each.message)]


def test_a_limit_without_a_bound_and_a_sharded_strategy_are_refused(llama):
    with pytest.raises(UserError, match="needs above or below"):
        MetricLimit()
    from lit_rlhf.strategies import FSDP2Strategy

    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(), logger=False)
    with pytest.raises(UserError, match="FSDP2Strategy keeps them in parts"):
        MetricGuard({"a": MetricLimit(above=1.0, action="rollback")}).setup(trainer, build_module(llama), "fit")


def test_counts_survive_a_restart():
    one, other = MetricGuard(), MetricGuard()
    one.num_violations, one.num_rollbacks = {"reward/kl": 2}, 1
    other.load_state_dict(one.state_dict())
    assert (other.num_violations, other.num_rollbacks) == ({"reward/kl": 2}, 1)


def test_limits_come_from_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "guard.yaml").write_text(
        "trainer: {callbacks+: [{class_path: lit_rlhf.callbacks.MetricGuard, init_args: {limits: {reward/kl: "
        "{above: 20, action: rollback}}}}]}"
    )
    assert main(["fit", "-c", "small/ppo", "-c", str(tmp_path / "guard.yaml"), "--print_config"]) == 0
    assert "action: rollback" in capsys.readouterr().out


def test_checkpoints_of_another_run_in_the_folder_are_not_rolled_back_to(llama, make_trainer, tmp_path):
    folder = tmp_path / "metric_guard"
    folder.mkdir()
    for name in ("good.ckpt", "candidate.ckpt"):
        (folder / name).write_bytes(b"of another run")
    with pytest.raises(UserError, match="there is no good checkpoint to roll back to yet"):
        train(make_trainer, llama, {0: 9.0}, 1)
    assert not any(folder.iterdir())


def test_a_rollback_takes_the_average_back_too(llama, make_trainer, tmp_path):
    module, average = build_module(llama), EMA(0.9)
    guard = MetricGuard({"scheduled": MetricLimit(above=1.0, action="rollback")}, keep_every_n_epochs=1)
    callbacks = [LogSchedule({2: 9.0}), guard, average]
    with pytest.warns(UserWarning, match="rolled back to the weights of step 4"):
        make_trainer(max_epochs=3, callbacks=callbacks).fit(module, datamodule=PromptData())
    good = torch.load(tmp_path / "metric_guard" / "good.ckpt", weights_only=True)["average"]
    assert average._average_model is not None and int(average._average_model.n_averaged) == good["updates"] == 4
    for name, weight in average.get_average().items():
        assert torch.equal(weight, good["weights"][name])
