"""The lineage in W&B: names, aliases and edges; offline; by reference; and a push afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_file
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input, hash_weight_files
from lit_rlhf.lineage.records import Compute, LineageRecord, RunReference, lineage_path, read_record, write_record
from lit_rlhf.lineage.wandb_artifacts import (
    describe_run,
    log_output,
    make_alias,
    make_input_artifact,
    make_name,
    mirror_output,
    push_lineage,
)
from tests.helpers.fake_wandb_run import FakeRun, Registry

STAGES = ("sft", "reward", "ppo", "evaluation")


def make_stages(folder: Path, registry: Registry, offline: bool = False) -> dict[str, Path]:
    """Write what four stages would leave on the disk, mirrored as they are made."""
    (folder / "base").mkdir()
    (folder / "base" / "model.safetensors").write_text("base")
    made: dict[str, Path] = {"base": folder / "base"}
    inputs = {"sft": ["base"], "reward": ["sft"], "ppo": ["sft", "reward"], "evaluation": ["sft", "ppo"]}
    for role in STAGES:
        data, output = folder / f"{role}.jsonl", folder / role
        data.write_text(role)
        output.mkdir()
        file = output / ("report.json" if role == "evaluation" else "model.safetensors")
        file.write_text(role)
        run = FakeRun(registry, f"run-{role}", offline=offline)
        reference = describe_run(run, role, "unused")
        assert reference is not None
        record = LineageRecord(
            role,
            Compute("", "", flops=2.0),
            {file.name: hash_file(file)},
            tuple(describe_model_input(name, str(made[name])) for name in inputs[role]),
            (describe_data_input("rows", str(data)),),
            metrics={"reward/score": 1.5},
            wandb=replace(reference, aliases=("latest", "step-3"), registry="wandb-registry-model/x"),
        )
        write_record(record, lineage_path(output))
        mirror_output(run, record, output)
        made[role] = output
    return made


EDGES = {
    ("sft.jsonl", "demo-sft"),
    ("base", "demo-sft"),
    ("demo-sft", "demo-reward"),
    ("reward.jsonl", "demo-reward"),
    ("demo-sft", "demo-ppo"),
    ("demo-reward", "demo-ppo"),
    ("ppo.jsonl", "demo-ppo"),
    ("demo-sft", "demo-evaluation"),
    ("demo-ppo", "demo-evaluation"),
    ("evaluation.jsonl", "demo-evaluation"),
}


def strip(name: str, folder: Path) -> str:
    return name.removeprefix(f"{make_name(folder.name)}-")


def test_the_graph_leads_from_data_through_the_stages_to_the_evaluation(tmp_path: Path) -> None:
    registry = Registry()
    make_stages(tmp_path, registry)
    found = {(strip(source, tmp_path), made) for source, made in registry.edges()}
    assert found == EDGES
    types = {name.split("/")[-1].split(":")[0]: artifact.type for name, artifact in registry.versions.items()}
    assert types == {
        "demo-sft": "model",
        "demo-reward": "model",
        "demo-ppo": "model",
        "demo-evaluation": "evaluation",
    }
    aliases = {name.split(":")[1] for name in registry.versions if "demo-ppo" in name}
    own = read_record(tmp_path / "ppo")
    assert own is not None and aliases == {"latest", "step-3", make_alias(own.fingerprint)}
    version = registry.versions["entity/project/demo-ppo:latest"]
    assert version.metadata == {"reward/score": 1.5, "fingerprint": own.fingerprint, "flops": 2.0}
    assert set(version.manifest.entries) == {"model.safetensors", "lineage.json"}
    assert registry.links == [(f"demo-{role}", "wandb-registry-model/x") for role in STAGES]


def test_offline_nothing_raises_and_a_push_adds_the_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, online = Registry(), Registry()
    made = make_stages(tmp_path, offline, offline=True)
    assert not any(offline.used.values()) and offline.logged["run-ppo"] == ["demo-ppo"] and offline.links == []
    resumed: list[dict[str, Any]] = []

    def init(**settings: Any) -> FakeRun:
        resumed.append(settings)
        return FakeRun(online, settings["id"])

    monkeypatch.setattr(wandb, "init", init)
    names = push_lineage(made["evaluation"], set())
    assert [name.split(":")[0] for name in names] == [f"demo-{role}" for role in STAGES], "parents first, each once"
    assert {(strip(source, tmp_path), name) for source, name in online.edges()} == EDGES
    assert resumed[0] == {"entity": "entity", "project": "project", "id": "run-sft", "resume": "must"}


def test_a_parent_that_is_not_pushed_yet_is_said_and_stands_for_itself(tmp_path: Path, capsys: Any) -> None:
    registry = Registry()
    made = make_stages(tmp_path, registry)
    record = read_record(made["reward"])
    assert record is not None
    other = Registry()
    mirror_output(FakeRun(other, "run"), record, made["reward"])
    assert "lit-rlhf lineage push" in capsys.readouterr().out
    assert [strip(name, tmp_path) for name in other.used["run"]] == ["sft", "reward.jsonl"]


def test_a_server_that_refuses_costs_no_run(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    made = make_stages(tmp_path, registry)
    record = read_record(made["ppo"])
    assert record is not None

    def refuse(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(FakeRun, "log_artifact", refuse)
    mirror_output(FakeRun(registry, "again"), record, made["ppo"])
    assert f"lit-rlhf lineage push {made['ppo']}" in capsys.readouterr().err


def test_a_large_folder_is_logged_by_reference(tmp_path: Path) -> None:
    registry = Registry()
    made = make_stages(tmp_path, registry)
    record = read_record(made["ppo"])
    assert record is not None
    log_output(FakeRun(registry, "run"), record, made["ppo"], max_upload_gb=0.0)
    entries = registry.versions["entity/project/demo-ppo:latest"].manifest.entries
    assert {name: entry.ref is None for name, entry in entries.items()} == {
        "lineage.json": True,
        "model.safetensors": False,
    }


def test_data_is_not_uploaded_and_a_change_is_a_new_version(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    digests = []
    for text in ("one", "two", "two"):
        file.write_text(text)
        artifact = make_input_artifact(describe_data_input("rows", str(file)), file)
        digests.append(artifact.digest)
        assert artifact.type == "dataset" and artifact.manifest.entries["content"].ref == file.as_uri()
    assert digests[0] != digests[1] == digests[2]
    hub = make_input_artifact(describe_data_input("rows", "org/data"), None)
    assert hub.manifest.entries["content"].ref == "https://huggingface.co/datasets/org/data" and hub.name == "org-data"


@pytest.mark.parametrize(
    "text, name",
    [
        ("small ppo", "small-ppo"),
        ("a/b:c", "a-b-c"),
        ("ä", "unnamed"),
        ("x" * 200, "x" * 100),
        ("v1.2_3-a", "v1.2_3-a"),
    ],
)
def test_names_are_what_wandb_takes(text: str, name: str) -> None:
    assert make_name(text) == name
    wandb.Artifact(name, type="model")


def test_the_group_of_the_run_or_of_the_folder_names_the_collection() -> None:
    registry = Registry()
    reference = describe_run(FakeRun(registry, "id", group=""), "ppo", "quickstart")
    assert reference is not None and reference.collection == "quickstart-ppo"
    reference = describe_run(FakeRun(registry, "id", offline=True), "ppo", "quickstart")
    assert reference == RunReference("project", "id", "entity", "", "demo", "demo-ppo")


def test_what_no_run_recorded_cannot_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no lineage\.json"):
        push_lineage(tmp_path, set())
    (tmp_path / "model.safetensors").write_text("x")
    record = LineageRecord("sft", Compute("", ""), hash_weight_files(tmp_path, hash_file))
    write_record(record, tmp_path / "lineage.json")
    with pytest.raises(UserError, match="was made without Weights & Biases"):
        push_lineage(tmp_path, set())
