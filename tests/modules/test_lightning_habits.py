"""The modules in a user's own Trainer: forward, predict, test, load_from_checkpoint, hparams, own loaders, two fits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.cli import main
from lit_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation import SamplingParams
from lit_rlhf.models import LoRA, ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.rollout import AdaptiveKLController
from tests.helpers.small_runs import demonstrations, full_weights, quiet_trainer, rankings, sgd
from tests.helpers.stages import write_stages

PROMPTS = [{"prompt": f"w{n} w{n + 1}", "place": n} for n in range(5)]
SAMPLING = SamplingParams(max_new_tokens=4)


def count_words(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[int]:
    return [len(response.split()) for response in responses]


def make(name: str, model: Any, **settings: Any) -> Any:
    """Return a module of each kind."""
    if name == "sft":
        return SFTModule(model, sgd(0.1), sampling=SAMPLING, **settings)
    if name == "reward":
        return RewardModule(model, sgd(0.1), **settings)
    reward, sizes = settings.pop("reward", count_words), PPOConfig(rollout_batch_size=8, micro_batch_size=4)
    return PPOModule(model, reward, SAMPLING, sizes, optimizer=sgd(0.1), **settings)


def make_data(name: str) -> L.LightningDataModule:
    if name == "sft":
        return DemonstrationDataModule(demonstrations(8), demonstrations(4, 1), micro_batch_size=4)
    if name == "reward":
        return ComparisonDataModule(rankings(8), rankings(4, 1), micro_batch_size=4)
    return PromptDataModule(PROMPTS, PROMPTS[:3])


KINDS = ("sft", "reward", "ppo")
LOADERS: dict[str, Any] = {"sft": demonstrations(4, 1), "reward": rankings(4, 1), "ppo": PROMPTS[:3]}


@pytest.mark.parametrize("name", KINDS)
def test_validate_and_test_what_was_trained(name: str, llama: str, tmp_path: Path) -> None:
    module, trainer = make(name, llama), quiet_trainer(tmp_path, max_epochs=1)
    data = make_data(name)
    trainer.fit(module, data)
    validated = trainer.validate(module, datamodule=data, verbose=False)[0]
    tested = trainer.test(module, DataLoader(LOADERS[name], batch_size=4, collate_fn=list), verbose=False)[0]
    assert {key.replace("validation/", "test/"): value for key, value in validated.items()} == pytest.approx(
        tested, rel=1e-5
    )


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_policies_answer(name: str, llama: str, tokenizer: Any, tmp_path: Path) -> None:
    module = make(name, llama)
    data, loader = PromptDataModule(PROMPTS, validation_batch_size=2), DataLoader(PROMPTS, batch_size=5)
    trainer = quiet_trainer(tmp_path)
    rows = [row for batch in trainer.predict(module, datamodule=data) for row in batch]
    assert [(row["prompt"], row["place"]) for row in rows] == [(row["prompt"], row["place"]) for row in PROMPTS]
    assert all(1 <= len(tokenizer.encode(row["response"])) <= 4 for row in rows if row["response"])
    torch.manual_seed(0)
    assert trainer.predict(module, loader)[0] == rows  # the same noise, whatever the batches
    texts = trainer.predict(module, DataLoader([row["prompt"] for row in PROMPTS], batch_size=5))[0]
    assert [row["response"] for row in texts] == [row["response"] for row in rows]
    ids = trainer.predict(
        module, DataLoader([tokenizer.encode(r["prompt"]) for r in PROMPTS], batch_size=5, collate_fn=list)
    )[0]
    assert [row["response"] for row in ids] == [row["response"] for row in rows]


def test_reward_models_score(llama: str, tokenizer: Any, tmp_path: Path) -> None:
    module, rows = RewardModule(llama), demonstrations(5)
    trainer = quiet_trainer(tmp_path)
    (scores,) = trainer.predict(module, DataLoader(rows, batch_size=5))
    plain = module.model.model.eval()
    for row, score in zip(rows, scores):
        ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["completion"]) + [tokenizer.eos_token_id]
        assert float(plain(torch.tensor([ids])).logits) == pytest.approx(float(score), abs=1e-5)
    ids = [{"input_ids": [*tokenizer.encode(f"{row['prompt']} {row['completion']}"), 1]} for row in rows]
    (from_ids,) = trainer.predict(module, DataLoader(ids, batch_size=5, collate_fn=list))
    torch.testing.assert_close(from_ids, scores)
    data = ComparisonDataModule(rankings(6), micro_batch_size=4)
    predicted = trainer.predict(module, datamodule=data)
    assert [len(each) for each in predicted] == [
        sum(len(row["completions"]) for row in rankings(6)[start : start + 4]) for start in (0, 4)
    ]


def test_forward_is_that_of_the_model(llama: str, tmp_path: Path) -> None:
    ids = torch.tensor([[4, 5, 6]])
    expected = AutoModelForCausalLM.from_pretrained(llama)(ids).logits
    for name in ("sft", "ppo"):
        module = make(name, llama)
        module.configure_model()
        torch.testing.assert_close(module(ids).logits, expected)


# ------------------------------------------------------------------------------------------------ load_from_checkpoint


def checkpoint(module: Any, name: str, folder: Path) -> str:
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(module, make_data(name))
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    return str(folder / f"{name}.ckpt")


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_a_module_without_a_trainer(name: str, llama: str, tmp_path: Path) -> None:
    trained = make(name, llama)
    path = checkpoint(trained, name, tmp_path)
    objects = {"reward": count_words} if name == "ppo" else {}
    loaded = type(trained).load_from_checkpoint(path, **objects)
    for own, other in zip(full_weights(loaded), full_weights(trained), strict=True):
        assert torch.equal(own, other)
    assert loaded.exported_model.config.to_dict() == trained.exported_model.config.to_dict()
    if name == "ppo":
        assert (loaded.sampling, loaded.ppo) == (trained.sampling, trained.ppo)
        assert torch.equal(
            loaded.frozen["reference"].lm_head.weight, AutoModelForCausalLM.from_pretrained(llama).lm_head.weight
        )
    trainer = quiet_trainer(tmp_path)
    own, other = (trainer.validate(each, make_data(name), verbose=False)[0] for each in (loaded, trained))
    assert own == pytest.approx(other, rel=1e-6)
    with pytest.raises(UserError, match="to train on, give optimizer= again"):
        quiet_trainer(tmp_path, max_epochs=1).fit(loaded, make_data(name))
    torch.manual_seed(0)
    quiet_trainer(tmp_path, max_epochs=1).fit(
        type(trained).load_from_checkpoint(path, optimizer=sgd(0.1), **objects), make_data(name)
    )


def test_settings_come_back(llama: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    settings: dict[str, Any] = {
        "kl": AdaptiveKLController(0.1, 3.0, 500),
        "adapter": LoRA(rank=2),
        "loading": ModelLoadingConfig(gradient_checkpointing=True),
    }
    trained = make("ppo", llama, **settings)
    loaded = PPOModule.load_from_checkpoint(checkpoint(trained, "ppo", tmp_path), reward=count_words)
    assert isinstance(loaded.kl, AdaptiveKLController) and loaded.kl.target == 3.0
    assert loaded.adapter == LoRA(rank=2) and loaded.loading.gradient_checkpointing
    assert not [each for each in recwarn if "not in the checkpoint" in str(each.message)]  # the base, of an adapter
    other = RewardModule(llama, head_seed=3, pair_normalizer="all_pairs", shared_prompt=False)
    loaded_reward = RewardModule.load_from_checkpoint(checkpoint(other, "reward", tmp_path))
    assert (loaded_reward.head_seed, loaded_reward.pair_normalizer, loaded_reward.shared_prompt) == (
        3,
        "all_pairs",
        False,
    )


def test_objects_are_to_be_given_again(llama: str, tmp_path: Path) -> None:
    path = checkpoint(make("ppo", AutoModelForCausalLM.from_pretrained(llama)), "ppo", tmp_path)
    with pytest.raises(
        UserError, match=rf"give them again: model= \(it was {llama}\), reward= \(it was .*count_words\)"
    ):
        PPOModule.load_from_checkpoint(path)
    start = AutoModelForCausalLM.from_pretrained(llama)
    loaded = PPOModule.load_from_checkpoint(path, model=start, reward=count_words)
    assert loaded.policy is start
    with pytest.raises(UserError, match=r"reference policy .* is not the one that this run began with"):
        PPOModule.load_from_checkpoint(path, model=loaded.policy, reward=count_words)  # trained weights
    with pytest.raises(UserError, match="the checkpoint is of PPOModule"):
        SFTModule.load_from_checkpoint(path, model=llama)


@pytest.mark.parametrize("stage", KINDS)
def test_checkpoints_of_recipes_load_in_python(
    stage: str, tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stages(tmp_path, llama)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", f"{stage}.yaml"]) == 0
    kind = {"sft": SFTModule, "reward": RewardModule, "ppo": PPOModule}[stage]
    module = kind.load_from_checkpoint(f"runs/{stage}/checkpoints/last.ckpt")
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    expected = auto.from_pretrained(f"runs/{stage}/model").state_dict()
    own = module.exported_model.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    assert {"config.yaml", "metrics.csv"} <= {path.name for path in Path(f"runs/{stage}").iterdir()}


# ------------------------------------------------------------------------------------------------------------- hparams


def test_loggers_and_checkpoints_know_the_settings(llama: str, tmp_path: Path) -> None:
    reward = RewardModelScorer(llama, require_centered=False)
    module = make("ppo", llama, reward=reward, kl=AdaptiveKLController(0.1, 3.0, 500))
    data = PromptDataModule(PROMPTS, max_prompt_length=9)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(tmp_path, max_epochs=1, logger=logger)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "ppo.ckpt")
    content = torch.load(tmp_path / "ppo.ckpt", weights_only=True)
    settings = content["hyper_parameters"]
    assert json.loads(json.dumps(settings)) == settings  # plain values
    assert settings["model"] == llama and settings["sampling"]["init_args"]["max_new_tokens"] == 4
    assert settings["reward"]["class_path"].endswith("RewardModelScorer")
    assert settings["reward"]["init_args"]["require_centered"] is False
    assert settings["kl"]["init_args"] == {"coefficient": 0.1, "target": 3.0, "horizon": 500}
    data_settings = content["datamodule_hyper_parameters"]
    assert data_settings["max_prompt_length"] == 9 and data_settings["path"].startswith("rows ")
    logged = (tmp_path / "hparams.yaml").read_text()
    assert "max_new_tokens: 4" in logged and "max_prompt_length: 9" in logged
    assert "hparams" not in [name for name, _ in module.named_modules()]


def test_no_credential_is_recorded(llama: str) -> None:
    class Served(RewardModelScorer):
        def __init__(self, api_key: str, url: str) -> None:
            super().__init__(llama)
            self.api_key, self.url = api_key, url

    module = make("ppo", llama, reward=Served("sk-secret-secret-secret", "https://me:word@host/v1"))
    assert "secret-secret" not in json.dumps(dict(module.hparams)) and "word@" not in json.dumps(dict(module.hparams))


# ---------------------------------------------------------------------------------------------------------- own loaders


class OwnData(L.LightningDataModule):
    """A user's own data module: a DataLoader over rows."""

    def __init__(self, rows: list[Any], **settings: Any) -> None:
        super().__init__()
        self.rows, self.settings = rows, settings

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=4, **self.settings)


def sft_forms(tokenizer: Any) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    rows = demonstrations(8)
    texts = [f"{row['prompt']} {row['completion']}" for row in rows]
    yield "columns", rows, {}
    yield "rows", rows, {"collate_fn": list}
    yield "strings", texts, {}
    yield "ids", [[*tokenizer.encode(text), 1] for text in texts], {"collate_fn": list}
    yield "tensors", [torch.tensor([*tokenizer.encode(text), 1]) for text in texts], {"collate_fn": list}

    def padded(batch: list[str]) -> Any:
        return tokenizer([f"{text} <eos>" for text in batch], padding=True, return_tensors="pt")

    yield "dict", texts, {"collate_fn": padded}
    yield "matrix", texts, {"collate_fn": lambda batch: padded(batch)["input_ids"]}


def test_own_data_of_text_or_ids_trains_sft(llama: str, tokenizer: Any, tmp_path: Path) -> None:
    weights = {}
    for name, rows, settings in sft_forms(tokenizer):
        module = SFTModule(llama, sgd(0.1))
        quiet_trainer(tmp_path, max_epochs=1).fit(module, OwnData(rows, **settings))
        weights[name] = full_weights(module)
    for group in (("columns", "rows"), ("strings", "ids", "tensors", "dict", "matrix")):
        for name in group[1:]:
            for own, other in zip(weights[name], weights[group[0]]):
                torch.testing.assert_close(own, other)
    assert not torch.equal(weights["columns"][0], weights["strings"][0])


def test_an_own_loader_is_the_data_module_at_equal_lengths(llama: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n}"} for n in range(8)]  # one mean over all
    module, other = SFTModule(llama, sgd(0.1)), SFTModule(llama, sgd(0.1))
    accumulated = {"max_epochs": 1, "accumulate_grad_batches": 2}
    quiet_trainer(tmp_path, **accumulated).fit(module, OwnData(rows))
    quiet_trainer(tmp_path, **accumulated).fit(other, DemonstrationDataModule(rows, micro_batch_size=4))
    for own, expected in zip(full_weights(module), full_weights(other)):
        torch.testing.assert_close(own, expected)


def test_own_rankings_train_the_reward_model(llama: str, tmp_path: Path) -> None:
    pairs = [{"prompt": f"w{n}", "chosen": "w3 w3", "rejected": f"w{n} w5"} for n in range(8)]
    module, other = RewardModule(llama, sgd(0.1)), RewardModule(llama, sgd(0.1))
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, OwnData(pairs))
    data = ComparisonDataModule(pairs, micro_batch_size=4)
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(other, data)
    for own, expected in zip(full_weights(module), full_weights(other)):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    ("name", "rows", "settings", "message"),
    [
        ("ppo", ["w1", "w2"], {}, r"give the prompts to a data module: trainer.fit\(module, PromptDataModule"),
        ("reward", [[4, 5], [6, 7]], {"collate_fn": list}, "trained on rankings, and token ids say nothing"),
        ("reward", ["w1", "w2"], {}, r"rows\[0\]: .*no known ranking format"),
        ("reward", [{"prompt": "w1", "completions": ["w2", "w3"], "ranks": [0, 1]}] * 4, {}, "collate_fn=list"),
        ("sft", [{"prompt": "w1", "completion": 3}], {}, r"rows\[0\]: .*completion"),
        ("sft", [{"prompt": "", "completion": "w1"}, demonstrations(1)[0]], {}, "1 empty prompt; leave such rows out"),
        ("sft", ["w1 " * 200], {}, "the longest row of a batch has 201 tokens, more than the model's 128 positions"),
        (
            "sft",
            [{"input_ids": [4, 5], "labels": [4, 6]}],
            {"collate_fn": list},
            r"rows\[0\]: labels must be input_ids",
        ),
    ],
)
def test_other_own_data_says_what_to_write(
    name: str, rows: list[Any], settings: dict[str, Any], message: str, llama: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quiet_trainer(tmp_path, max_epochs=1).fit(make(name, llama), OwnData(rows, **settings))


# --------------------------------------------------------------------------------------------------------- fitted twice


@pytest.mark.parametrize("name", KINDS)
def test_a_module_is_fitted_twice(name: str, llama: str, tmp_path: Path) -> None:
    module, data = make(name, llama), make_data(name)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, data)
    once = full_weights(module)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, data)
    twice = full_weights(module)
    assert not torch.equal(once[0], twice[0])
    fresh = make(name, llama)  # the second fit begins with the weights of the first, and the first epoch's data
    fresh.configure_model()
    with torch.no_grad():
        for parameter, weight in zip(fresh.parameters(), once):
            parameter.copy_(weight)
    quiet_trainer(tmp_path, max_epochs=1).fit(fresh, make_data(name))
    for own, expected in zip(full_weights(fresh), twice):
        assert torch.equal(own, expected)
