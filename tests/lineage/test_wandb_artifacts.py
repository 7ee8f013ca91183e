"""The lineage in W&B: names, aliases and edges; offline; by reference; and a push afterwards."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
from tests.helpers.wandb_server import ORGANIZATION, WandbServer, serve_wandb

STAGES = ("sft", "reward", "ppo", "evaluation")


def make_stages(folder: Path, start: Callable[[str], Any]) -> dict[str, Path]:
    """Write what four stages would leave on the disk, mirrored as they are made; `start` starts the run of a role."""
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
        with start(role) as run:
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


def start_fake(registry: Registry, role: str) -> FakeRun:
    return FakeRun(registry, f"run-{role}")


def start_run(role: str, **settings: Any) -> Any:
    return wandb.init(project="project", group="demo", job_type=role, id=f"run-{role}", **settings)


def check_graph(server: WandbServer, folder: Path) -> None:
    """Edges, types, names, contents and links are those of the stages."""
    assert {(strip(source, folder), made) for source, made in server.edges()} == EDGES
    assert server.refused == [] and all(version.committed for version in server.versions.values())
    for role in STAGES:
        version, own = server.find(f"demo-{role}"), read_record(folder / role)
        assert own is not None and version.kind == ("evaluation" if role == "evaluation" else "model")
        assert version.aliases == {"latest", "step-3", make_alias(own.fingerprint)}
        assert version.metadata == {"reward/score": 1.5, "fingerprint": own.fingerprint, "flops": 2.0}
        files = {name: server.files[f"{version.id}/files/{name}"] for name in version.manifest["contents"]}
        assert files == {path.name: path.read_bytes() for path in (folder / role).iterdir()}
        run = server.runs[f"run-{role}"]
        assert (run["groupName"], run["jobType"], version.run) == ("demo", role, f"run-{role}")
    data = server.find(make_name(f"{folder.name}-sft.jsonl"))
    assert data.kind == "dataset" and data.run is None, "an input is not an output of the run as well"
    assert data.manifest["contents"]["content"]["ref"] == (folder / "sft.jsonl").as_uri()
    assert not any(text == b"sft" for path, text in server.files.items() if path.startswith(data.id))


def test_the_graph_leads_from_data_through_the_stages_to_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_wandb(monkeypatch) as server:
        make_stages(tmp_path, lambda role: start_run(role, dir=tmp_path))
        check_graph(server, tmp_path)
        linked = [(server.versions[version].collection, path) for version, path in server.links]
    assert linked == [(f"demo-{role}", f"{ORGANIZATION}/wandb-registry-model/x") for role in STAGES]


def test_offline_nothing_raises_and_after_a_sync_a_push_adds_the_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    monkeypatch.chdir(tmp_path)
    with serve_wandb(monkeypatch) as server:
        made = make_stages(tmp_path, lambda role: start_run(role, mode="offline"))
        assert server.runs == {}
        runs = sorted(tmp_path.glob("wandb/offline-run-*"))
        subprocess.run([sys.executable, "-m", "wandb", "sync", *runs], check=True, capture_output=True)
        assert server.edges() == set() and {f"run-{role}" for role in STAGES} == server.runs.keys()
        names = push_lineage(made["evaluation"])
        check_graph(server, tmp_path)
        record = read_record(made["sft"])
        assert record is not None and record.wandb is not None
        unknown = replace(record, wandb=replace(record.wandb, id="never-synced"))
        write_record(unknown, lineage_path(made["sft"]))
        with pytest.raises(wandb.Error):
            push_lineage(made["sft"])
        assert "never-synced" not in server.runs, "another run began"
    assert [name.split(":")[0] for name in names] == [f"demo-{role}" for role in STAGES], "parents first, each once"


@pytest.mark.parametrize("error", [wandb.errors.CommError, ValueError])
def test_a_parent_that_is_not_pushed_yet_is_said_and_stands_for_itself(
    error: type[Exception], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRun, "not_found", error)
    registry = Registry()
    made = make_stages(tmp_path, partial(start_fake, registry))
    record = read_record(made["reward"])
    assert record is not None
    other = Registry()
    mirror_output(FakeRun(other, "run"), record, made["reward"])
    assert "lit-rlhf lineage push" in capsys.readouterr().out
    assert [strip(name, tmp_path) for name in other.used["run"]] == ["sft", "reward.jsonl"]


def test_a_model_of_several_roles_is_used_once(tmp_path: Path) -> None:
    registry = Registry()
    made = make_stages(tmp_path, partial(start_fake, registry))
    record = read_record(made["reward"])
    assert record is not None
    reference = describe_model_input("reference", str(made["sft"]))
    mirror_output(FakeRun(registry, "run"), replace(record, models=(*record.models, reference)), made["reward"])
    assert [strip(name, tmp_path) for name in registry.used["run"]] == ["demo-sft", "reward.jsonl"]


def test_a_server_that_refuses_costs_no_run(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_stages(tmp_path, partial(start_fake, Registry()))
    record = read_record(made["ppo"])
    assert record is not None
    with serve_wandb(monkeypatch) as server:
        server.fails["CreateArtifact"] = "the storage is full"
        with start_run("ppo", dir=tmp_path) as run:
            mirror_output(run, record, made["ppo"])
    assert server.used == set() and not server.versions
    said = [line for line in capfd.readouterr().err.splitlines() if "lineage push" in line]
    assert said[-1].endswith(f"lit-rlhf lineage push {made['ppo']}") and "the storage is full" in said[-1]


def test_a_large_folder_is_logged_by_reference(tmp_path: Path) -> None:
    registry = Registry()
    made = make_stages(tmp_path, partial(start_fake, registry))
    record = read_record(made["ppo"])
    assert record is not None
    (made["ppo"] / "model.safetensors").write_bytes(bytes(100_000))
    log_output(FakeRun(registry, "run"), record, made["ppo"], max_upload_gb=0.5e-4)
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


def test_an_alias_is_the_beginning_of_the_hash() -> None:
    assert make_alias("sha256 0123456789abcdef0123") == "sha256-0123456789ab"


def test_a_run_that_is_disabled_is_no_run(tmp_path: Path) -> None:
    with wandb.init(mode="disabled", dir=tmp_path) as run:
        assert describe_run(run, "sft", "quickstart") is None


def test_the_group_of_the_run_or_of_the_folder_names_the_collection() -> None:
    registry = Registry()
    reference = describe_run(FakeRun(registry, "id", group=""), "ppo", "quickstart")
    assert reference is not None and reference.collection == "quickstart-ppo"
    reference = describe_run(FakeRun(registry, "id", offline=True), "ppo", "quickstart")
    assert reference == RunReference("project", "id", "entity", "", "demo", "demo-ppo")


def test_what_no_run_recorded_cannot_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no lineage\.json"):
        push_lineage(tmp_path)
    (tmp_path / "model.safetensors").write_text("x")
    record = LineageRecord("sft", Compute("", ""), hash_weight_files(tmp_path, hash_file))
    write_record(record, tmp_path / "lineage.json")
    with pytest.raises(UserError, match="was made without Weights & Biases"):
        push_lineage(tmp_path)


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_a_push_without_a_server_is_refused_before_a_run_begins(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_stages(tmp_path, partial(start_fake, Registry()))
    settings = SimpleNamespace(settings=wandb.Settings(mode=mode))
    monkeypatch.setattr(wandb, "setup", lambda: settings)
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("a run began"))
    with pytest.raises(UserError, match=f"lineage push needs a login and a network, and W&B is {mode}"):
        push_lineage(made["evaluation"])
    record = read_record(made["evaluation"])
    assert record is not None
    write_record(replace(record, wandb=None), lineage_path(made["evaluation"]))
    with pytest.raises(UserError, match="was made without Weights & Biases"):  # and no parent is pushed
        push_lineage(made["evaluation"])
