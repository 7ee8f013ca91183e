"""PPO's frozen models in host memory: there for an iteration's scoring and no longer, at the same numbers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_rlhf.callbacks import PPOInvariantCheck
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import EnsembleReward, FunctionReward, RewardModelScorer
from tests.helpers.ppo_fakes import PromptData
from tests.helpers.small_runs import quiet_trainer, sgd, whole_weights

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # one place, two names


@pytest.fixture
def reward_model(llama: str, tmp_path: Path) -> str:
    """A folder of a reward model with a drawn head."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    model.config.score_shift, model.config.score_scale = 0.5, 2.0
    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(llama, ModelLoadingConfig()).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def module_of(model: str, reward: Any, offload: bool, **settings: Any) -> PPOModule:
    sizes = PPOConfig(
        rollout_batch_size=24, micro_batch_size=6, ppo_epochs=1, forward_batch_size=5, offload_frozen=offload
    )
    return PPOModule(model, reward, SamplingParams(6), sizes, optimizer=sgd(0.05), **settings)


class Journal(L.Callback):
    """Where the frozen models were put, and which passes and updates came in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        for kind, name in ((PreTrainedModel, "reference"), (ScalarModel, "reward model")):
            monkeypatch.setattr(kind, "to", self.move_of(name))
        monkeypatch.setattr(PPOModule, "device", DEVICE)

    def move_of(self, name: str) -> Any:
        def to(model: Any, device: torch.device) -> Any:
            self.lines.append(f"{name} to {'host' if device == HOST else 'device'}")
            return torch.nn.Module.to(model, device)

        return to

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the passes from here on."""
        module: Any = pl_module
        for model, name in (
            (module.frozen["reference"], "reference"),
            (module.reward.model, "reward model"),
            (module.policy, "policy"),
        ):
            model.register_forward_pre_hook(lambda *_, name=name: self.write(f"{name} computes"))

    def write(self, line: str) -> None:
        """Once for several in a row."""
        if self.lines[-1] != line:
            self.lines.append(line)


def test_they_are_moved_once_an_iteration_around_their_passes(llama, reward_model, monkeypatch, tmp_path):
    journal = Journal(monkeypatch)
    module = module_of(llama, RewardModelScorer(reward_model), offload=True)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[journal]).fit(module, datamodule=PromptData())
    there = ["reference to device", "reward model to device"]
    back = ["reference to host", "reward model to host"]
    scoring = [*there, "reward model computes", "reference computes", *back]
    first = journal.lines.index("policy computes")
    assert journal.lines[first - 2 : first] == back, "in host memory from the start"
    update = ["policy computes"]  # and the next generation
    assert journal.lines[first:] == ["policy computes", *scoring, *update, *scoring, *update]


def test_the_numbers_are_those_without(llama, reward_model, tmp_path, capsys):
    def run(offload: bool) -> tuple[Any, dict[str, float]]:
        module = module_of(llama, RewardModelScorer(reward_model), offload)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[PPOInvariantCheck()])
        trainer.fit(module, datamodule=PromptData())
        return whole_weights(module), {n: float(v) for n, v in trainer.callback_metrics.items() if "time/" not in n}

    plain, offloaded = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(plain[0], offloaded[0]))
    assert plain[1] == offloaded[1]
    assert "in host memory: reference; in host memory: reward model" in capsys.readouterr().out


def test_self_check_scores_on_the_device(llama, reward_model, monkeypatch, tmp_path):
    journal = Journal(monkeypatch)
    module = module_of(llama, RewardModelScorer(reward_model), offload=True)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[PPOInvariantCheck(), journal]).fit(module, datamodule=PromptData())
    place = "nowhere"
    for line in journal.lines:
        if line.startswith("reward model to"):
            place = line
        assert line != "reward model computes" or place == "reward model to device", journal.lines


def test_what_has_nothing_to_move_is_refused(llama, reward_model, tmp_path):
    def setup(reward: Any, **settings: Any) -> list[str]:
        module = module_of(llama, reward, offload=True, critic=llama, **settings)
        module.check_models()
        return module.offloaded

    one = FunctionReward(function="math.fsum")
    model = RewardModelScorer(reward_model)
    four_bits = RewardModelScorer(reward_model, loading=ModelLoadingConfig(quantization="nf4"))
    riding = {"adapter": LoRA(rank=2)}
    assert setup(one) == ["reference"]
    assert setup(model, **riding) == ["reward model"]
    assert setup(EnsembleReward([model, four_bits, model]), **riding) == ["reward model", "reward model"]
    for reward, settings in ((one, riding), (four_bits, riding)):
        with pytest.raises(UserError, match=r"ppo.offload_frozen: .* set ppo.offload_frozen to false"):
            setup(reward, **settings)
    quantised = {**riding, "loading": ModelLoadingConfig(quantization="nf4"), "reference": reward_model}
    with pytest.raises(UserError, match="offload_frozen"):
        setup(one, **quantised)
