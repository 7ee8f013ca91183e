"""`ppo.offload_frozen`: frozen models are on the device while episodes are scored only; results do not change."""

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
from tests.helpers.small_runs import full_weights, quiet_trainer, sgd

HOST, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # the same memory under two names


@pytest.fixture
def reward_model(llama: str, tmp_path: Path) -> str:
    """The folder of a reward model with a random head."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    model.config.score_shift, model.config.score_scale = 0.5, 2.0
    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(llama, ModelLoadingConfig()).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def make_module(model: str, reward: Any, offload: bool, **settings: Any) -> PPOModule:
    sizes = PPOConfig(
        rollout_batch_size=24, micro_batch_size=6, ppo_epochs=1, forward_batch_size=5, offload_frozen=offload
    )
    return PPOModule(model, reward, SamplingParams(6), sizes, optimizer=sgd(0.05), **settings)


class Journal(L.Callback):
    """Records moves of the frozen models and the forward passes between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        for kind, name in ((PreTrainedModel, "reference"), (ScalarModel, "reward model")):
            monkeypatch.setattr(kind, "to", self.recording_to(name))
        monkeypatch.setattr(PPOModule, "device", DEVICE)

    def recording_to(self, name: str) -> Any:
        def to(model: Any, device: torch.device) -> Any:
            self.lines.append(f"{name} to {'host' if device == HOST else 'device'}")
            return torch.nn.Module.to(model, device)

        return to

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record forward passes from here on."""
        module: Any = pl_module
        for model, name in (
            (module.frozen["reference"], "reference"),
            (module.reward.model, "reward model"),
            (module.policy, "policy"),
        ):
            model.register_forward_pre_hook(lambda *_, name=name: self.write(f"{name} computes"))

    def write(self, line: str) -> None:
        """Add a line; several equal ones in a row count once."""
        if self.lines[-1] != line:
            self.lines.append(line)


def test_models_are_moved_once_per_iteration_around_their_passes(llama, reward_model, monkeypatch, tmp_path):
    journal = Journal(monkeypatch)
    module = make_module(llama, RewardModelScorer(reward_model), offload=True)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[journal]).fit(module, datamodule=PromptData())
    to_device = ["reference to device", "reward model to device"]
    to_host = ["reference to host", "reward model to host"]
    scoring = [*to_device, "reward model computes", "reference computes", *to_host]
    first = journal.lines.index("policy computes")
    assert journal.lines[first - 2 : first] == to_host, "in host memory from the start"
    update = ["policy computes"]  # and the next generation
    assert journal.lines[first:] == ["policy computes", *scoring, *update, *scoring, *update]


def test_offloading_changes_no_number(llama, reward_model, tmp_path, caplog):
    def run(offload: bool) -> tuple[Any, dict[str, float]]:
        module = make_module(llama, RewardModelScorer(reward_model), offload)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[PPOInvariantCheck()])
        trainer.fit(module, datamodule=PromptData())
        return full_weights(module), {n: float(v) for n, v in trainer.callback_metrics.items() if "time/" not in n}

    resident, offloaded = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(resident[0], offloaded[0]))
    assert resident[1] == offloaded[1]
    assert "in host memory: reference; in host memory: reward model" in caplog.text


def test_the_invariant_check_scores_on_the_device(llama, reward_model, monkeypatch, tmp_path):
    journal = Journal(monkeypatch)
    module = make_module(llama, RewardModelScorer(reward_model), offload=True)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[PPOInvariantCheck(), journal]).fit(module, datamodule=PromptData())
    location = "nowhere"
    for line in journal.lines:
        if line.startswith("reward model to"):
            location = line
        assert line != "reward model computes" or location == "reward model to device", journal.lines


def test_a_setup_with_nothing_to_move_is_refused(llama, reward_model, tmp_path):
    def setup(reward: Any, **settings: Any) -> list[str]:
        module = make_module(llama, reward, offload=True, critic=llama, **settings)
        module.check_models()
        return module.offloaded

    function = FunctionReward(function="math.fsum")
    model = RewardModelScorer(reward_model)
    four_bits = RewardModelScorer(reward_model, loading=ModelLoadingConfig(quantization="nf4"))
    lora = {"adapter": LoRA(rank=2)}
    assert setup(function) == ["reference"]
    assert setup(model, **lora) == ["reward model"]
    assert setup(EnsembleReward([model, four_bits, model]), **lora) == ["reward model", "reward model"]
    for reward, settings in ((function, lora), (four_bits, lora)):
        with pytest.raises(UserError, match=r"ppo.offload_frozen: .* set ppo.offload_frozen to false"):
            setup(reward, **settings)
    quantized = {**lora, "loading": ModelLoadingConfig(quantization="nf4"), "reference": llama}
    with pytest.raises(UserError, match="offload_frozen"):
        setup(function, **quantized)
