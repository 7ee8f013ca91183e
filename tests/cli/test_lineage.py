"""Three stages and an evaluation of a tiny model: the whole tree, what changed in it, cards, a push, W&B offline."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lit_rlhf.cli import main
from lit_rlhf.lineage.records import LineageRecord, read_record
from lit_rlhf.lineage.text import WIDTH
from lit_rlhf.lineage.wandb_artifacts import make_alias, make_name
from tests.helpers.hub_server import TOKEN, serve_hub
from tests.helpers.small_runs import demonstrations
from tests.helpers.stages import write_stages
from tests.helpers.wandb_server import ENTITY, KEY, WandbServer, serve_wandb

REWARD = {
    "class_path": "lit_rlhf.rewards.RewardModelScorer",
    "init_args": {"model": "runs/reward/model", "require_centered": False},
}
MIX = {
    "class_path": "lit_rlhf.callbacks.PretrainingMix",
    "init_args": {"path": "text.jsonl", "micro_batch_size": 2, "seq_len": 8},
}
JUDGE = {
    "class_path": "lit_rlhf.evaluation.RewardModelJudge",
    "init_args": {"model": "runs/reward/model", "force": True},
}
EVALUATION = {
    "models": {"sft": {"path": "runs/sft/model"}, "ppo": {"path": "runs/ppo/model"}},
    "baseline": "sft",
    "suites": {
        "preference": {
            "class_path": "lit_rlhf.evaluation.PairwisePreference",
            "init_args": {"path": "demonstrations.jsonl", "judges": {"rm": JUDGE}, "max_new_tokens": 4, "limit": 6},
        }
    },
    "out": "runs/evaluation",
    "progress": False,
}


def run_procedure(folder: Path, llama: str) -> None:
    """Run SFT, reward model, PPO-ptx, an evaluation and best-of-n in the working directory."""
    write_stages(folder, llama)
    (folder / "text.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n' * 20)
    for stage in ("sft", "reward", "ppo"):
        recipe = yaml.safe_load((folder / f"{stage}.yaml").read_text())
        if stage != "sft":
            recipe["model"]["init_args"]["model"] = "runs/sft/model"
        if stage == "ppo":
            recipe["model"]["init_args"]["reward"] = REWARD
            recipe["trainer"]["callbacks"].append(MIX)
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
        overlays = ["-c", "logger/wandb", "-c", "precision/32-true"]
        assert main(["fit", "-c", f"{stage}.yaml", *overlays, "--seed_everything=5"]) == 0
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(EVALUATION))
    assert main(["evaluate", "-c", "evaluation.yaml", "-c", "logger/wandb"]) == 0
    sampled = ["--prompts", "demonstrations.jsonl", "--limit", "4", "--n", "2", "--max-new-tokens", "4"]
    models = ["--model", "runs/sft/model", "--reward", "runs/reward/model"]
    assert main(["best-of-n", *models, *sampled, "--out", "best.jsonl"]) == 0


class Finished(NamedTuple):
    """A procedure; not to be changed."""

    folder: Path
    server: WandbServer  # what W&B's server would hold


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: str) -> Iterator[Finished]:
    """A procedure that logged online, to a stand-in for W&B's server."""
    folder = tmp_path_factory.mktemp("procedure")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with serve_wandb(patch) as server:
            run_procedure(folder, llama)
    yield Finished(folder, server)


@pytest.fixture
def procedure(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    folder = tmp_path / "procedure"
    shutil.copytree(finished.folder, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def record_of(path: str) -> LineageRecord:
    record = read_record(Path(path))
    assert record is not None
    return record


def test_the_tree_leads_back_to_base_model_and_data(procedure: Path, command: Callable, llama: str) -> None:
    code, out, err = command("lineage", "runs/ppo/model")
    assert code == 0 and "all files are as recorded" in out, out + err
    tree, compute, _ = out.split("\n\n")
    lines = tree.splitlines()
    shown = [line.strip("│├└─ ") for line in lines if ": " in line and "!" not in line]
    assert shown[0] == "ppo: runs/ppo/model"
    for role in ("starting policy", "reference policy"):
        assert f"{role}: runs/sft/model" in shown
    for role in ("reward model 1", "starting critic"):
        assert f"{role}: runs/reward/model" in shown
    for data in ("demonstrations", "rankings", "prompts"):
        file = "rankings.jsonl" if data == "rankings" else "demonstrations.jsonl"
        assert {f"{data}: {file}", f"{data}, validation: {file}"} <= set(shown)
    assert "pretraining text: text.jsonl" in shown
    assert any(line.startswith("starting model: ") and Path(llama).name in line for line in shown)
    assert max(map(len, (*lines, *compute.splitlines()))) <= WIDTH
    assert [line.split()[0] for line in compute.splitlines()] == ["stage", "sft", "reward", "ppo", "sum"]


CHANGES = {
    "the weights of the reward model": ("runs/reward/model/model.safetensors", ["runs/ppo/model"]),
    "the rankings": ("rankings.jsonl", ["runs/reward/model"]),
    "the pretraining text": ("text.jsonl", ["runs/ppo/model"]),
    "the demonstrations": ("demonstrations.jsonl", ["runs/ppo/model", "runs/sft/model"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_one_changed_byte_is_named(kind: str, procedure: Path, command: Callable) -> None:
    path, users = CHANGES[kind]
    status, content = os.stat(path), bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the cache of hashes would not notice
    code, out, _ = command("lineage", "runs/ppo/model", "--html", "page.html")
    problems = out.split("no longer as recorded:\n")[1].splitlines()
    assert code == 2 and set(problems) == {f"changed since it was used for {user}: {path}" for user in users}
    assert path in Path("page.html").read_text()


def test_an_evaluation_and_a_sampled_file_have_a_lineage(procedure: Path, command: Callable) -> None:
    evaluation = record_of("runs/evaluation")
    assert {each.role: each.path for each in evaluation.models} == {
        "model sft": "runs/sft/model",
        "model ppo": "runs/ppo/model",
        "suites.preference.judges.rm.model": "runs/reward/model",
    }
    assert [(each.role, each.path, each.rows_kept) for each in evaluation.data] == [
        ("suites.preference.path", "demonstrations.jsonl", 6)
    ]
    assert set(evaluation.files) == {"report.json"} and evaluation.seed == 0
    best = record_of("best.jsonl")
    assert [each.path for each in best.models] == ["runs/sft/model", "runs/reward/model"]
    assert [each.path for each in best.data] == ["demonstrations.jsonl"]
    for output in ("runs/evaluation", "best.jsonl"):
        assert command("lineage", output)[0] == 0
    Path("best.jsonl").write_text("")
    assert command("lineage", "best.jsonl")[0] == 2


def test_the_record_says_how_it_was_made(procedure: Path) -> None:
    record = record_of("runs/ppo/model")
    assert record.role == "ppo" and record.seed == 5
    assert record.configs == ("ppo.yaml", "logger/wandb", "precision/32-true")
    assert record.command == "lit-rlhf fit -c ppo.yaml -c logger/wandb -c precision/32-true --seed_everything=5"
    assert record.recipe["model"]["init_args"]["model"] == "runs/sft/model"
    assert record.environment.packages["torch"] and record.environment.devices.startswith("1 x CPU")
    assert "reward/score" in record.metrics
    counts = {each.role: (each.rows_read, each.rows_kept) for each in record.data}
    prompts = len({row["prompt"] for row in demonstrations(12)})
    assert counts["prompts"][0] == 12 and counts["prompts"][1] == prompts
    compute = record.compute
    assert compute.wall_seconds and compute.device_seconds == compute.wall_seconds and compute.sessions == 1


def num_weights(folder: str) -> int:
    return sum(tensor.numel() for tensor in load_file(f"{folder}/model.safetensors").values())


def test_the_operations_of_sft_are_six_per_weight_and_token(procedure: Path) -> None:
    compute = record_of("runs/sft/model").compute
    tokens = sum(len(f"{row['prompt']} {row['completion']}".split()) + 1 for row in demonstrations(12))
    assert compute.tokens == tokens and compute.flops == 6 * num_weights("runs/sft/model") * tokens


def test_the_operations_of_ppo_are_those_of_its_passes(procedure: Path) -> None:
    """Generating, reference, reward model and critic: 2 per weight; 4 epochs of policy and critic: 6; the mix: 6."""
    compute = record_of("runs/ppo/model").compute
    policy, reward = num_weights("runs/sft/model"), num_weights("runs/reward/model")
    assert compute.tokens and compute.flops
    steps = 2 * record_of("runs/ppo/model").recipe["model"]["init_args"]["ppo"].get("ppo_epochs", 1)
    per_token = 2 * policy + 2 * policy + 2 * reward + 2 * reward + steps // 2 * 6 * (policy + reward)
    mix = 6 * policy * 2 * 8
    assert (compute.flops - per_token * compute.tokens) % mix == 0


def test_a_resumed_run_adds_up_its_sessions(stages: Path, command: Callable) -> None:
    assert command("fit", "-c", "sft.yaml")[0] == 0
    first = record_of("runs/sft/model").compute
    assert (
        command("fit", "-c", "sft.yaml", "--ckpt_path=runs/sft/checkpoints/last.ckpt", "--trainer.max_epochs=3")[0] == 0
    )
    both = record_of("runs/sft/model").compute
    assert (first.sessions, both.sessions) == (1, 2) and both.started == first.started
    assert first.tokens and first.flops and first.wall_seconds and both.wall_seconds
    assert (both.tokens, both.flops) == (3 * first.tokens, 3 * first.flops)
    assert both.wall_seconds > 0.5 * first.wall_seconds


def test_an_exported_checkpoint_has_the_lineage_of_its_run(procedure: Path, command: Callable) -> None:
    assert command("export", "runs/reward/checkpoints/last.ckpt", "elsewhere/reward")[0] == 0
    exported, own = record_of("elsewhere/reward"), record_of("runs/reward/model")
    assert exported.files == own.files and exported.role == "reward" and exported.recipe == own.recipe
    assert [each.fingerprint for each in exported.models] == [each.fingerprint for each in own.models]
    assert command("lineage", "elsewhere/reward")[0] == 0, "locations are relative to the new folder"


def test_the_card_has_the_metrics_of_a_report(procedure: Path, command: Callable) -> None:
    card = ModelCard.load("runs/ppo/model/README.md")
    assert card.data.eval_results is None and "### sft: sft.yaml + logger/wandb + precision/32-true" in card.text
    last = "runs/ppo/checkpoints/last.ckpt"
    assert command("export", last, "exported", "--report", "runs/evaluation/report.json")[0] == 0
    card = ModelCard.load("exported/README.md")
    report = json.loads(Path("runs/evaluation/report.json").read_text())
    metrics = report["suites"]["preference"]["metrics"]
    expected = {
        name: row["models"]["ppo"]["value"]
        for name, row in metrics.items()
        if row["models"].get("ppo", {}).get("value") is not None
    }
    assert expected and {each.metric_name: each.metric_value for each in card.data.eval_results} == expected
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"


def all_bytes(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def test_a_push_at_the_end_of_training_leaves_no_token_anywhere(
    stages: Path, command: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_hub(monkeypatch) as hub:
        push = ["--trainer.callbacks.ExportModel.push=lab/sft", "--trainer.callbacks.ExportModel.private=true"]
        code, out, err = command("fit", "-c", "sft.yaml", *push)
        assert code == 0, err
        folder = stages / "runs/sft/model"
        assert hub.files == {"lab/sft": {path.relative_to(folder).as_posix(): text for path, text in all_bytes(folder)}}
        assert hub.created[0]["visibility"] == "private"
        last = "runs/sft/checkpoints/last.ckpt"
        code, again, err = command("export", last, "exported", "--push", "lab/again")
        assert code == 0 and f"{hub.url}/lab/again" in again, err
        assert hub.files["lab/again"] == {path.name: text for path, text in all_bytes(stages / "exported")}
    assert TOKEN not in out + again + err + caplog.text
    assert [path for path, text in all_bytes(stages) if TOKEN.encode() in text] == []
    cache = Path(os.environ["HF_DATASETS_CACHE"])
    assert [path for path, text in all_bytes(cache) if TOKEN.encode() in text] == []


@pytest.mark.parametrize("repo, reason", [("sft", "must be OWNER/NAME"), ("other/sft", "who is not in other")])
def test_an_impossible_push_is_refused_before_anything_is_written(
    repo: str, reason: str, stages: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(monkeypatch):
        code, _, err = command("fit", "-c", "sft.yaml", f"--trainer.callbacks.ExportModel.push={repo}")
    assert code == 2 and reason in err and not (stages / "runs").exists()


def test_private_without_push_is_refused(command: Callable, tmp_path: Path) -> None:
    code, _, err = command("export", "last.ckpt", str(tmp_path / "model"), "--private")
    assert code == 2 and "--private is of --push" in err


def test_the_graph_on_the_server_leads_from_the_data_to_the_evaluation(finished: Finished, llama: str) -> None:
    folder, server = finished
    assert server.refused == []

    base, demonstrations = make_name("-".join(Path(llama).parts[-2:])), "demonstrations.jsonl"
    assert server.edges() == {
        *((source, "runs-sft") for source in (demonstrations, base)),
        *((source, "runs-reward") for source in ("rankings.jsonl", "runs-sft")),
        *((source, "runs-ppo") for source in (demonstrations, "text.jsonl", "runs-sft", "runs-reward")),
        *((source, "runs-evaluation") for source in (demonstrations, "runs-sft", "runs-ppo", "runs-reward")),
    }
    for role, path in {"sft": "sft/model", "reward": "reward/model", "ppo": "ppo/model"}.items():
        version, own = server.find(f"runs-{role}"), read_record(folder / "runs" / path)
        assert own is not None and own.wandb is not None and version.committed and version.kind == "model"
        assert own.wandb.entity == ENTITY and own.wandb.url.startswith(server.url)
        assert version.run == own.wandb.id and server.runs[own.wandb.id]["groupName"] == "runs"
        assert {"latest", make_alias(own.fingerprint)} < version.aliases
        files = {name: server.files[f"{version.id}/files/{name}"] for name in version.manifest["contents"]}
        assert files == {path.name: path.read_bytes() for path in (folder / "runs" / path).iterdir()}
    assert sorted(run["jobType"] for run in server.runs.values()) == ["evaluate", "ppo", "reward", "sft"]
    assert {version.kind for version in server.versions.values()} >= {"dataset", "model", "evaluation"}


def test_the_key_is_in_no_file_and_no_upload(finished: Finished) -> None:
    folder, server = finished
    assert [path for path, text in all_bytes(folder) if KEY.encode() in text] == []
    assert [path for path, text in server.files.items() if KEY.encode() in text] == []
    assert KEY not in str(server.runs)


def test_help_and_errors(command: Callable, tmp_path: Path) -> None:
    assert "lineage push DIR" in command("lineage", "--help")[1]
    assert command("lineage", "push", "--help")[0] == 0
    for arguments in (["nowhere"], ["push", str(tmp_path)], [str(tmp_path)], [str(tmp_path), "--hmtl=x"]):
        code, _, err = command("lineage", *arguments)
        assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
