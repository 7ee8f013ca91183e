"""Settings of the Trainer that would train something else are refused in Python as by the command."""

from typing import Any

import pytest

from lit_rlhf.commands.support.compatibility import RULES
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule, SFTModule
from lit_rlhf.modules import trainer_settings as own
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "bf16-true"}, own.HALF_PRECISION),
        ({"overfit_batches": 1}, own.OVERFITS),
        ({"reload_dataloaders_every_n_epochs": 1}, own.RELOADS),
    ],
)
def test_settings_of_any_module_are_refused_before_a_model_is_loaded(settings, reason, llama, tmp_path):
    module: Any = SFTModule(llama)
    with pytest.raises(UserError) as refusal:
        quiet_trainer(tmp_path, max_epochs=1, **settings).fit(module, DemonstrationDataModule(demonstrations(4)))
    assert str(refusal.value) == reason and not hasattr(module, "model")


def test_a_part_of_a_rollout_is_refused_and_a_dry_run_is_not(llama, tmp_path):
    settings = PPOConfig(rollout_batch_size=4, micro_batch_size=2)
    with pytest.raises(UserError) as refusal:
        module = PPOModule(llama, WordShare(), SamplingParams(2), settings, optimizer=sgd(0.1))
        quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, datamodule=PromptData())
    assert str(refusal.value) == own.LIMITS_ROLLOUT
    module = PPOModule(llama, WordShare(), SamplingParams(2), settings, optimizer=sgd(0.1))
    quiet_trainer(tmp_path, fast_dev_run=1).fit(module, datamodule=PromptData())


def test_a_part_of_a_minibatch_is_refused_and_a_dry_run_is_not(llama, tmp_path):
    data = DemonstrationDataModule(demonstrations(8), micro_batch_size=2)
    with pytest.raises(UserError, match=r"3 batches end within a minibatch of accumulate_grad_batches 2"):
        quiet_trainer(tmp_path, limit_train_batches=3, accumulate_grad_batches=2).fit(SFTModule(llama), data)
    quiet_trainer(tmp_path, fast_dev_run=1, accumulate_grad_batches=2).fit(SFTModule(llama), data)
    five = DemonstrationDataModule(demonstrations(10), micro_batch_size=2)  # 5 batches, or 4 in whole minibatches
    settings = {"limit_train_batches": 1000, "accumulate_grad_batches": 2, "max_steps": 1}
    quiet_trainer(tmp_path, **settings).fit(SFTModule(llama), five)


def test_the_command_gives_the_same_reasons():
    assert {own.HALF_PRECISION, own.OVERFITS, own.RELOADS, own.LIMITS_ROLLOUT} <= {reason for _, reason in RULES}
