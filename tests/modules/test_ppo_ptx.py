"""PPO-ptx: the recipe's γ keeps the pretraining loss of the model, γ = 0 does not (Figure 33 in miniature)."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import PretrainingMix
from lit_rlhf.commands.recipes import shipped_recipes
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rollout.kl_controller import FixedKLController
from tests.helpers.ppo_fakes import PromptData, WordShare
from tests.helpers.small_runs import quiet_trainer

SEQ_LEN = 16


class RecordScores(L.Callback):
    """Records the mean score of every iteration."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.scores.append(float(trainer.callback_metrics["reward/score"]))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count up in threes from any word."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{(7 * i + 3 * j) % 28}" for j in range(SEQ_LEN - 1)) for i in range(28)))
    return path


def tokenize(text: Path, tokenizer: Any) -> torch.Tensor:
    return torch.tensor([[*tokenizer.encode(document), 1] for document in text.read_text().split("\n\n")])


def text_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss per token."""
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    total, count = causal_lm_loss(model, ids, targets, torch.ones_like(ids))
    return total / count


@pytest.fixture(scope="module")
def pretrained(llama: str, text: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The folder of a model trained on the text, and its loss on it."""
    model, ids = AutoModelForCausalLM.from_pretrained(llama), tokenize(text, tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        text_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), float(text_loss(model, ids).detach())


def read_recipe_coefficient() -> float:
    """Return γ of the quickstart's recipe."""
    recipe = yaml.safe_load(shipped_recipes()["quickstart/ppo-ptx"].read_text())
    mixes = [c for c in recipe["trainer"]["callbacks"] if c["class_path"].endswith("PretrainingMix")]
    return float(mixes[0]["init_args"]["coefficient"])


def test_the_recipes_coefficient_keeps_the_loss_on_pretraining_text(pretrained, text, tokenizer, tmp_path):
    folder, before = pretrained
    ids, after, gained = tokenize(text, tokenizer), {}, {}
    for coefficient in (0.0, read_recipe_coefficient()):
        settings = PPOConfig(rollout_batch_size=64, micro_batch_size=32, critic_learning_rate=5e-3)
        module = PPOModule(
            folder,
            WordShare(),
            SamplingParams(max_new_tokens=8),
            settings,
            kl=FixedKLController(0.0),
            optimizer=lambda p: torch.optim.Adam(p, lr=4e-3),
        )
        recorder = RecordScores()
        mix = PretrainingMix(str(text), coefficient, micro_batch_size=14, seq_len=SEQ_LEN)
        trainer = quiet_trainer(tmp_path, max_epochs=10, callbacks=[mix, recorder])
        trainer.fit(module, datamodule=PromptData())
        with torch.no_grad():
            after[coefficient] = float(text_loss(module.policy, ids))
        gained[coefficient] = recorder.scores[-1] - recorder.scores[0]
    (_, without_mix), (_, with_mix) = after.items()
    assert without_mix > before + 0.3, "without the mix the text is forgotten"
    assert with_mix < before + 0.1, "with the mix it is not"
    assert min(gained.values()) > 0.05, "the score rose in both runs"
