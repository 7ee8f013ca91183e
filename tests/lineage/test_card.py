"""The model card: the hub's own classes read it, and it says what the records and the report say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lit_rlhf.errors import UserError
from lit_rlhf.lineage.card import CARD, MARK, find_base_model, render_card, write_card
from lit_rlhf.lineage.records import (
    Compute,
    DataInput,
    Environment,
    LineageRecord,
    ModelInput,
    RunReference,
    write_record,
)
from lit_rlhf.models.fingerprint import loaded_model_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig

SFT = LineageRecord(
    "sft",
    Compute("", "", 60.0, 60.0, 1000, 8.64e19),
    models=(ModelInput("starting model", "org/base-1b", "commit abc"),),
    data=(DataInput("demonstrations", "org/data:default@train", "", 10, 9),),
    configs=("small/sft", "precision/bf16-mixed"),
    environment=Environment("0123", True, {"torch": "2.9"}, "1 x CPU"),
)
METRICS = {"win rate": (0.62, 0.55, 0.69), "perplexity": (3.5, None, None)}


def child(folder: Path, parent: Path, role: str) -> LineageRecord:
    """Return the record of a model made from that of another folder."""
    start = ModelInput("starting policy", "runs/sft/model", "sha256 00", str(parent), {}, "11")
    data = (DataInput("prompts", "prompts.jsonl", "ab" * 32, 10, 8, location=str(folder / "prompts.jsonl")),)
    run = RunReference("p", "id", "e", "https://wandb.ai/e/p/runs/id", "g", "g-ppo")
    return replace(SFT, role=role, models=(start,), data=data, recipe={"run_dir": "runs/ppo"}, wandb=run)


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    folder.mkdir()
    write_record(SFT, folder / "lineage.json")
    return folder


def results() -> list[dict[str, Any]]:
    keys = ("value", "low", "high")
    return [
        {"suite": "preference", "metric": name, "unit": "share", "count": 1200, **dict(zip(keys, values))}
        for name, values in METRICS.items()
    ]


@pytest.mark.parametrize("role", ["pretraining", "sft", "reward", "ppo", "model"])
def test_the_hubs_classes_read_the_card(role: str, sft: Path, tmp_path: Path) -> None:
    card = ModelCard(render_card(child(tmp_path, sft, role), tmp_path, "lab/model", results()))
    about = card.data.to_dict()
    assert about["base_model"] == "org/base-1b" and about["datasets"] == ["org/data"]
    assert about["library_name"] == "transformers"
    assert about["pipeline_tag"] == ("text-classification" if role == "reward" else "text-generation")
    assert {"lit-rlhf", "rlhf"} < set(about["tags"])
    assert card.data.model_name == "lab/model"
    read = {(each.dataset_name, each.metric_name): each.metric_value for each in card.data.eval_results}
    assert read == {("preference", name): values[0] for name, values in METRICS.items()}
    for text in ("## Intended use", "## Limits", "0.55 to 0.69", "1,200", "8 rows", "precision/bf16-mixed"):
        assert text in card.text, text
    assert "runs in Weights" not in card.text and "https://wandb.ai/e/p/runs/id" in card.text


def test_without_hub_names_and_report_nothing_is_claimed(tmp_path: Path) -> None:
    local = replace(SFT, models=(ModelInput("starting model", "base", "sha256 00", str(tmp_path)),), data=())
    about = ModelCard(render_card(local, tmp_path, "model", [])).data.to_dict()
    assert not {"base_model", "datasets", "model-index"} & set(about)


def test_the_base_model_is_found_through_the_stages(sft: Path, tmp_path: Path) -> None:
    assert find_base_model(child(tmp_path, sft, "ppo"), tmp_path) == "org/base-1b"
    (sft / "lineage.json").write_text("damaged")
    assert find_base_model(child(tmp_path, sft, "ppo"), tmp_path) is None


def test_a_readme_of_the_users_own_is_kept(tmp_path: Path) -> None:
    part, published = tmp_path / "part", tmp_path / "model"
    part.mkdir()
    published.mkdir()
    write_card(SFT, part, published)
    assert MARK in (part / CARD).read_text()
    (published / CARD).write_text((part / CARD).read_text() + "old")
    write_card(SFT, part, published)
    assert "old" not in (part / CARD).read_text(), "one of this library is replaced"
    (part / CARD).unlink()
    (published / CARD).write_text("# My own text")
    write_card(SFT, part, published)
    assert not (part / CARD).exists(), "the export carries the user's over"


def write_report(path: Path, models: dict[str, dict[str, str]]) -> Path:
    cells = {name: {"value": number / 4, "low": None, "high": None, "count": 8} for number, name in enumerate(models)}
    unknown = {name: {**cell, "value": None} for name, cell in cells.items()}  # no verdict on any row
    metrics = {"accuracy": {"unit": "share", "models": cells}, "verdicts": {"unit": "share", "models": unknown}}
    suites = {"truth": {"metrics": metrics}}
    path.write_text(json.dumps({"models": models, "suites": suites}))
    return path


def test_the_model_is_found_in_a_report_by_content_or_folder(llama: str, tmp_path: Path) -> None:
    folder, fingerprint = Path(llama), loaded_model_fingerprint(llama, ModelLoadingConfig())
    others = {"base": {"path": "base", "fingerprint": "0"}}
    same_content = {**others, "mine": {"path": "elsewhere", "fingerprint": fingerprint}}
    same_folder = {**others, "mine": {"path": str(tmp_path / "model"), "fingerprint": "1"}}
    part = tmp_path / "part"
    part.mkdir()
    for path in folder.iterdir():
        (part / path.name).write_bytes(path.read_bytes())
    for models in (same_content, same_folder):
        report = write_report(tmp_path / "report.json", models)
        write_card(SFT, part, tmp_path / "model", report, "lab/model")
        assert [each.metric_value for each in ModelCard.load(part / CARD).data.eval_results] == [0.25]
    with pytest.raises(UserError, match=r"is not of this model; it evaluates base \(base\)"):
        write_card(SFT, part, tmp_path / "model", write_report(tmp_path / "report.json", others))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"models": {}}', '{"models": [], "suites": {}}', '{"models": {"m": {}}, "suites": {}}']
)
def test_a_file_that_is_no_report_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"is not a report\.json of lit-rlhf evaluate"):
        write_card(SFT, tmp_path, tmp_path / "model", tmp_path / "report.json")
