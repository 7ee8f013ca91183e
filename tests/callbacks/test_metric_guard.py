"""MetricGuard: warns, stops, goes back, and says why it cannot."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_rlhf.callbacks import Limit, MetricGuard
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rollout.kl_controller import AdaptiveKLController
from tests.helpers.ppo_fakes import PromptData


class WordsOf:
    """Scores the share of one word."""

    def prepare(self, *_: Any) -> None:
        """Nothing to load."""

    def score(self, episodes: Any) -> torch.Tensor:
        """Return the share."""
        return torch.tensor([response.split().count("w3") / 6 for response in episodes.responses])


class Schedule(L.Callback):
    """Metrics as the test wants them, the last thing before the watch looks; the policy's weights as it finds them."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values, self.weights, self.steps = values, [], []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log one."""
        pl_module.log("drill", self.values.get(trainer.current_epoch, 0.0))
        self.weights.append(pl_module.policy.lm_head.weight.detach().clone())
        self.steps.append(trainer.global_step)


def module_of(llama: str) -> PPOModule:
    """Four steps an iteration, at a rate that moves weights visibly."""
    settings = PPOConfig(rollout_batch_size=16, micro_batch_size=4)
    kl = AdaptiveKLController(0.1, target=1.0, horizon=200)
    return PPOModule(
        llama,
        WordsOf(),
        SamplingParams(max_new_tokens=6),
        settings,
        kl,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
    )


def watch(trainer_of: Any, llama: str, values: dict[int, float], epochs: int, **settings: Any) -> tuple[Any, Any, Any]:
    """Run with the metric's course; return schedule, watch and module."""
    schedule, module = Schedule(values), module_of(llama)
    limit = {"drill": Limit(above=1.0, action="go_back")}
    callback = MetricGuard(**{"limits": limit, "keep_every_n_epochs": 1, **settings})
    trainer_of(max_epochs=epochs, callbacks=[schedule, callback]).fit(module, datamodule=PromptData())
    return schedule, callback, module


def test_a_warning_names_metric_value_limit_and_iteration(llama, trainer_of):
    with pytest.warns(UserWarning, match=r"drift: drill is 3 in iteration 1, the limit is at least -1 and at most 2"):
        watch(trainer_of, llama, {1: 3.0}, 2, limits={"drill": Limit(above=2.0, below=-1.0)})


def test_a_stop_is_an_error_and_counts_iterations_in_a_row(llama, trainer_of):
    limits = {"drill": Limit(above=1.0, iterations=2, action="stop")}
    with pytest.raises(UserError, match=r"drift: drill is 5 in iteration 4.*\(2 iterations in a row\)"):
        watch(trainer_of, llama, {1: 5.0, 3: 5.0, 4: 5.0}, 6, limits=limits)


def test_what_is_not_a_number_is_beyond_every_limit():
    assert Limit(above=1.0).broken_by(float("nan")) and Limit(below=1.0).broken_by(float("nan"))


def test_going_back_takes_the_weights_that_made_the_last_good_rollout(llama, trainer_of, tmp_path):
    """Iteration 3 is bad: the weights after 1, whose rollout was 2's, were the last to be found good."""
    with pytest.warns(UserWarning, match=r"drill is 9 in iteration 3.*went back to the weights of step 8"):
        schedule, callback, module = watch(trainer_of, llama, {3: 9.0}, 4)
    assert schedule.steps == [4, 8, 12, 16]
    assert not torch.equal(schedule.weights[1], schedule.weights[3])
    assert torch.equal(module.policy.lm_head.weight, schedule.weights[1])
    assert callback.returns == 1
    good = torch.load(tmp_path / "drift_watch" / "good.ckpt", weights_only=True)
    assert module.kl.coefficient == good["kl_controller"]["coefficient"]
    assert good["global_step"] == 8


def test_a_run_goes_on_after_going_back(llama, trainer_of):
    with pytest.warns(UserWarning, match="went back"):
        schedule, _, module = watch(trainer_of, llama, {2: 9.0}, 5)
    assert schedule.steps[-1] == 20  # steps, and with them prompts and noise, are not taken back
    assert not torch.equal(schedule.weights[3], schedule.weights[0])
    assert all(torch.isfinite(p).all() for p in module.policy.parameters())


def test_too_many_returns_stop_the_run(llama, trainer_of):
    with pytest.warns(UserWarning), pytest.raises(UserError, match="has gone back 1 times and drifts again"):
        watch(trainer_of, llama, {2: 9.0, 3: 9.0}, 5, max_rollbacks=1)


def test_nothing_to_go_back_to(llama, trainer_of):
    with pytest.raises(UserError, match="no good checkpoint to go back to yet"):
        watch(trainer_of, llama, {0: 9.0}, 2)


def test_a_metric_that_nobody_logs(llama, trainer_of):
    with pytest.raises(UserError, match=r"no metric 'reward/klx' is logged; there are .*reward/kl,"):
        watch(trainer_of, llama, {}, 1, limits={"reward/klx": Limit(above=1.0)})


def test_the_usual_limits_let_a_sound_run_pass(llama, trainer_of, recwarn):
    trainer_of(max_epochs=2, callbacks=[MetricGuard()]).fit(module_of(llama), datamodule=PromptData())
    assert not [each for each in recwarn if "drift" in str(each.message)]


def test_a_limit_that_limits_nothing_and_a_sharded_strategy_are_refused(llama):
    with pytest.raises(UserError, match="needs above or below"):
        Limit()
    from lit_rlhf.strategies import FSDP2Strategy

    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(), logger=False)
    with pytest.raises(UserError, match="FSDP2Strategy keeps them in parts"):
        MetricGuard({"a": Limit(above=1.0, action="go_back")}).setup(trainer, module_of(llama), "fit")


def test_counts_survive_a_restart():
    one, other = MetricGuard(), MetricGuard()
    one.streaks, one.returns = {"reward/kl": 2}, 1
    other.load_state_dict(one.state_dict())
    assert (other.streaks, other.returns) == ({"reward/kl": 2}, 1)


def test_limits_come_from_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "watch.yaml").write_text(
        "trainer: {callbacks+: [{class_path: lit_rlhf.callbacks.MetricGuard, init_args: {limits: {reward/kl: "
        "{above: 20, action: go_back}}}}]}"
    )
    assert main(["fit", "-c", "small/ppo", "-c", str(tmp_path / "watch.yaml"), "--print_config"]) == 0
    assert "action: go_back" in capsys.readouterr().out
