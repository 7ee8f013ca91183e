"""PEFT folders, local and on the hub, in every command and role: what the merged models give."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from lit_rlhf.cli import main
from lit_rlhf.data import PromptDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.generation import SamplingParams
from lit_rlhf.models import LoRA, ModelLoadingConfig
from lit_rlhf.models.export import export_adapter, export_model
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.modules import LoRACritic, PPOConfig, PPOModule, RewardModule, SFTModule
from lit_rlhf.rewards import RewardModelScorer, SequenceClassifierReward
from tests.helpers.small_runs import assert_same_weights, full_weights, quiet_trainer, sgd, write_rows

LOADING, COMMIT = ModelLoadingConfig(), "0123456789abcdef0123456789abcdef01234567"
NAMES = ("base", "lm", "other", "rm", "lm-merged", "other-merged", "rm-merged")


class Models(NamedTuple):
    """Two language models and a reward model, as folders or hub names."""

    lm: str
    other: str
    rm: str


def train(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)


def write_adapters(base: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write PEFT folders on a base, and the models that they are merged."""
    lora = LoRA(rank=2, alpha=8)
    for number, name in enumerate(("lm", "other")):
        model = load_causal_lm(base, tokenizer, LOADING)
        add_lora(model, lora)
        train(model, number)
        weights = dict(model.named_parameters())
        export_adapter(model, weights, lora, (base, LOADING), tokenizer, folder / name)
        export_model(model, tokenizer, folder / f"{name}-merged")
    scorer = load_scalar_model(base, tokenizer, LOADING)
    add_lora(scorer.model, lora)
    train(scorer.model, 2)
    scorer.center(0.25, 2.0)
    weights = dict(scorer.model.named_parameters())
    export_adapter(scorer.model, weights, lora, (base, LOADING), tokenizer, folder / "rm")
    export_model(scorer, tokenizer, folder / "rm-merged")


@pytest.fixture(scope="module")
def written(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The snapshots of a hub's cache; of the same files the folders of a disk."""
    cache = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, cache)
        for name in NAMES:
            refs = cache / f"models--lab--{name}" / "refs"
            refs.mkdir(parents=True)
            (refs / "main").write_text(COMMIT)
        shutil.copytree(llama, snapshot(cache, "base"))
        tokenizer = load_tokenizer(llama, LOADING)
        write_adapters("lab/base", cache / "work", tokenizer)
        for name in NAMES[1:]:
            shutil.move(cache / "work" / name, snapshot(cache, name))
    write_adapters(llama, cache / "disk", tokenizer)
    return cache


def snapshot(cache: Path, name: str) -> Path:
    return cache / f"models--lab--{name}" / "snapshots" / COMMIT


def offline(patch: pytest.MonkeyPatch, cache: Path) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


@pytest.fixture(params=["folder", "hub name"])
def models(request: pytest.FixtureRequest, written: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Models, Models]:
    """Adapters, and the merged models."""
    offline(monkeypatch, written)
    prefix = f"{written / 'disk'}/" if request.param == "folder" else "lab/"
    return Models(*(prefix + name for name in Models._fields)), Models(*(f"{prefix}{n}-merged" for n in Models._fields))


PROMPTS = [{"prompt": f"w{n} w{n + 3}"} for n in range(6)]


def test_best_of_n_rank_and_generate(models, tmp_path, capsys) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    groups = write_rows(tmp_path / "groups.jsonl", [{"prompt": "w1 w2", "completions": ["w3", "w4 w5", "w6"]}])
    outputs = []
    for number, (lm, _, rm) in enumerate(models):
        out, sizes = tmp_path / f"{number}.jsonl", ["--n", "4", "--max-new-tokens", "5"]
        arguments = ["--model", lm, "--reward", rm, "--prompts", prompts, "--out", str(out), *sizes]
        assert main(["best-of-n", *arguments]) == 0
        capsys.readouterr()
        assert main(["generate", "--model", lm, "--prompt", "w1 w2", "--temperature", "0"]) == 0
        answer = capsys.readouterr().out
        assert main(["rank", groups, "--model", rm]) == 0
        scores = json.loads(capsys.readouterr().out)["scores"]
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        outputs.append((answer, scores, [row["scores"] for row in rows], [row["completion"] for row in rows]))
        lineage = json.loads((tmp_path / f"{number}.jsonl.lineage.json").read_text())
        assert {each["path"] for each in lineage["models"]} == {lm, rm}
    (answer, scores, sampled, best), (*others,) = outputs
    assert (answer, best) == (others[0], others[3])
    assert scores == pytest.approx(others[1], abs=1e-5) and len(set(scores)) == 3
    for row, other in zip(sampled, others[2]):
        assert row == pytest.approx(other, abs=1e-5) and len(set(row)) > 1


def test_evaluate(models, tmp_path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    toxic = write_rows(
        tmp_path / "toxic.jsonl", [{"prompt": {"text": row["prompt"], "toxicity": 0.1}} for row in PROMPTS]
    )
    reports = []
    for number, (lm, other, rm) in enumerate(models):
        judges = {
            "rm": {"class_path": "RewardModelJudge", "init_args": {"model": rm}},
            "lm": {"class_path": "HuggingFaceJudge", "init_args": {"model": other}},
        }
        scorer = {"class_path": "ToxicityClassifier", "init_args": {"model": rm, "label": "0"}}
        recipe = {
            "models": {
                "sft": {"path": lm},
                "ppo": {"path": other},
                "best": {"path": lm, "best_of": {"reward_model": rm, "n": 3}},
            },
            "baseline": "sft",
            "suites": {
                "preference": {
                    "class_path": "PairwisePreference",
                    "init_args": {"path": prompts, "judges": judges, "max_new_tokens": 4},
                },
                "toxicity": {"class_path": "RealToxicityPrompts", "init_args": {"path": toxic, "scorer": scorer}},
            },
            "out": str(tmp_path / f"out{number}"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["evaluate", "-c", str(tmp_path / "recipe.yaml")]) == 0
        report = json.loads((tmp_path / f"out{number}" / "report.json").read_text())
        assert report["models"]["sft"]["path"] == lm
        reports.append(report["suites"])
    for suite in ("preference", "toxicity"):
        one, other = (each[suite]["metrics"] for each in reports)
        assert one.keys() == other.keys()
        for name in one:
            for model in ("sft", "ppo", "best"):
                values = [each[name]["models"].get(model, {}).get("value") for each in (one, other)]
                assert values[0] == pytest.approx(values[1], abs=1e-5), (name, model)
        answers = [[row["answers"] for row in each[suite]["samples"]] for each in reports]
        assert [{m: a["text"] for m, a in row.items()} for row in answers[0]] == [
            {m: a["text"] for m, a in row.items()} for row in answers[1]
        ]


@pytest.mark.parametrize("reward", ["scorer", "classifier"])
def test_ppo_in_every_role(reward, models, tmp_path) -> None:
    trained = []
    for lm, other, rm in models:
        scored = RewardModelScorer(rm) if reward == "scorer" else SequenceClassifierReward(rm, template="concat")
        sizes = PPOConfig(rollout_batch_size=8, micro_batch_size=4)
        module = PPOModule(
            lm, scored, SamplingParams(max_new_tokens=4), sizes, critic=rm, reference=other, optimizer=sgd(0.01)
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1)
        trainer.fit(module, PromptDataModule(PROMPTS))
        assert float(trainer.callback_metrics["reward/kl"]) > 1e-3
        trained.append(full_weights(module))
    assert_same_weights(*trained, tolerance=1e-4)


def test_sft_and_a_reward_model_start_from_an_adapter(models, tmp_path) -> None:
    for kind in (SFTModule, RewardModule):
        logits = []
        for lm, _, _ in models:
            module = kind(lm, adapter=LoRA(rank=2))
            module.configure_model()
            ids = torch.tensor([[5, 6, 7]])
            model = module.exported_model.eval()
            with torch.no_grad():
                logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-5)


def test_a_peft_folder_is_no_checkpoint_of_a_critic(models) -> None:
    with pytest.raises(UserError, match=r"is no complete checkpoint|there is no checkpoint"):
        module = PPOModule(models[0].lm, lambda *_: [], critic=LoRACritic(models[0].rm), adapter=LoRA(rank=2))
        module.check_models()
