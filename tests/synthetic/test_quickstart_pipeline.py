"""The quickstart end to end with tiny sizes: every stage by its recipe, equal reports for a seed, lineage, W&B."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_rlhf.cli import main
from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.quickstart_pipeline import STAGES, Scale, run
from lit_rlhf.commands.support.quickstart_sweep import run as run_sweeps
from lit_rlhf.errors import UserError
from lit_rlhf.synthetic import rankings
from lit_rlhf.synthetic.build import SyntheticDataSizes
from tests.helpers.user_project import column, read_metrics
from tests.helpers.wandb_files import WandbFiles

SHORT_PPO = ("--trainer.max_epochs=2", "--model.ppo.rollout_batch_size=64", "--model.ppo.micro_batch_size=32")
SMALL = Scale(
    "small",
    SyntheticDataSizes(
        pretraining_documents=600,
        pretraining_validation_documents=60,
        demonstrations=128,
        demonstrations_validation=32,
        reward_prompts=40,
        ppo_prompts=300,
        evaluation_prompts=40,
    ),
    num_unseen_rankings=20,
    best_of_prompts=8,
    arguments={
        "pretraining": ("--trainer.max_steps=6", "--trainer.val_check_interval=6"),
        "sft": ("--trainer.max_epochs=1",),
        "ppo": SHORT_PPO,
        "ppo-ptx": SHORT_PPO,
    },
)
OVERLAY = str(find_recipe("logger/csv"))
LINES = {
    "data": "600 texts, 128 demonstrations, 300 prompts",
    "pretraining": r"validation/loss \d\.\d{3}",
    "sft": r"validation/loss \d\.\d{3}",
    "ranking": r"40 rankings of \d+ responses",
    "reward": r"validation/accuracy 0\.\d{3}",
    "ppo": r"score -?\d\.\d{3}, KL -?\d\.\d{3}",
    "ppo-ptx": r"score -?\d\.\d{3}, KL -?\d\.\d{3}",
    "evaluation": r"win rate over SFT: PPO 0\.\d{3}, PPO-ptx 0\.\d{3}",
}


def read_report(folder: Path) -> dict:
    """Read the report without times and memory."""
    report = json.loads((folder / "report.json").read_text())
    for key in ("stages", "seconds_total", "peak_memory_gib"):
        del report[key]
    return report


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Its folder and what it printed; it logs as a user's does, to W&B's files without a login."""
    parent, printed = tmp_path_factory.mktemp("quickstart"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name, value in {"HOME": str(parent), "WANDB_SILENT": "true"}.items():  # no login of the user's
            patch.setenv(name, value)
        patch.delenv("WANDB_MODE", raising=False)
        patch.chdir(parent)
        assert run(Path("one"), 3, [], SMALL) == 0
    yield parent / "one", printed.getvalue()


@pytest.fixture(scope="module")
def files(quickstart: tuple[Path, str]) -> dict[str, WandbFiles]:
    """What W&B wrote of each training stage."""
    return {stage: WandbFiles(quickstart[0] / stage) for stage in STAGES}


def test_every_stage_runs_and_the_same_seed_gives_the_same_report(quickstart, tmp_path):
    one, printed = quickstart
    head, *lines = (line for line in printed.split("\n\n")[0].splitlines() if not line.startswith("wandb: "))
    assert head == "InstructGPT's procedure in a synthetic world, seed 3, in one."
    for line, (stage, headline) in zip(lines, LINES.items(), strict=True):  # one per stage
        assert re.fullmatch(rf"{stage} +\d+\.\d s  {headline}", line), line
    report = json.loads((one / "report.json").read_text())
    for model in ("base", "few_shot", "sft", "ppo", "ppo_ptx"):
        for decoding in ("models", "greedy"):
            assert 0 <= report[decoding][model]["win_rate_low"] <= report[decoding][model]["win_rate_high"] <= 1
    assert report["models"]["sft"]["win_rate_low"] <= 0.5 <= report["models"]["sft"]["win_rate_high"]
    assert report["greedy"]["sft"]["win_rate"] == 0.5
    assert report["models"]["sft"]["kl_to_sft"] == pytest.approx(0, abs=1e-4)
    assert report["best_of_n"]["score"] == sorted(report["best_of_n"]["score"]) and len(report["best_of_n"]["kl"]) == 16
    for stage in ("pretraining", "sft", "reward", "ppo", "ppo-ptx"):
        assert report["curves"][stage.replace("-", "_")], stage
        assert (one / "recipes" / f"{stage}.yaml").is_file()
    assert "runs/quickstart" not in (one / "recipes" / "sft.yaml").read_text()
    page = (one / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "PPO-ptx" in page
    assert run(tmp_path / "two", 3, [OVERLAY], SMALL) == 0
    assert read_report(tmp_path / "two") == read_report(one), "with W&B and without"
    assert rankings.MIN_COMPLETIONS == 4 and rankings.MAX_COMPLETIONS == 9


# ------------------------------------------------------------------------------------------------------------- lineage

# of world/, which made the PPO model
DATA = ("pretraining", "demonstrations", "rankings", "ppo_prompts", "reward_prompts")
CHANGED = ("reward/model/model.safetensors", "world/demonstrations.jsonl", "world/rankings.jsonl")


@contextlib.contextmanager
def changed_byte(path: Path) -> Iterator[None]:
    """Within the block, the last byte of a file is another."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        yield
    finally:
        path.write_bytes(content)


def print_lineage(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["lineage", str(folder.relative_to(Path.cwd()))])
    return code, capsys.readouterr().out


def test_the_tree_of_the_ppo_model_leads_back_to_base_model_and_data(quickstart, monkeypatch, capsys):
    folder = quickstart[0]
    monkeypatch.chdir(folder.parent)
    code, out = print_lineage(folder / "ppo-ptx" / "model", capsys)
    assert code == 0 and "all files are as recorded" in out
    tree, compute, _ = out.split("\n\n")
    roots = ["ppo: one/ppo-ptx/model", "reward model 1: one/reward/model", "starting policy: one/sft/model"]
    for line in (*roots, "starting model: one/pretraining/model", "starting model: one/world/base_init"):
        assert any(each.strip("│├└─ ") == line for each in tree.splitlines()), line
    for name in DATA:
        assert f": one/world/{name}.jsonl" in tree, name
    stages = [line.split()[0] for line in compute.splitlines()]
    assert stages == ["stage", "pretraining", "sft", "samples", "samples", "reward", "ppo", "sum"]


@pytest.mark.parametrize("path", CHANGED)
def test_one_changed_byte_is_named(path, quickstart, monkeypatch, capsys):
    folder = quickstart[0]
    monkeypatch.chdir(folder.parent)
    with changed_byte(folder / path):
        code, out = print_lineage(folder / "ppo-ptx" / "model", capsys)
    problems = out.split("no longer as recorded:\n")[1].splitlines()
    assert code == 2 and problems and all(line.endswith(f": one/{path}") for line in problems), problems
    assert print_lineage(folder / "ppo-ptx" / "model", capsys)[0] == 0


# ---------------------------------------------------------------------------------------------------------- W&B's files


def test_the_stages_are_one_group_with_the_recipes_as_config(files, quickstart):
    job_types = {"pretraining": "sft", "ppo-ptx": "ppo"}
    for stage, each in files.items():
        run = each.run
        assert (run.project, run.run_group, run.job_type) == ("lit-rlhf", "one", job_types.get(stage, stage))
        assert run.display_name == f"one-{stage}" and run.notes and run.tags[0] == run.job_type
        assert each.config["seed_everything"] == 3 and each.config["run_dir"] == f"one/{stage}"
    config = files["ppo-ptx"].config
    assert config["model"]["kl"]["target"] == 2.0 and config["model"]["ppo"]["rollout_batch_size"] == 64
    assert config["trainer"]["callbacks"]["PretrainingMix"]["coefficient"] == 1.0


def test_rows_axes_and_summaries_are_those_of_the_csv_files(files, quickstart):
    best = {"sft": ("validation/loss", min, "min"), "reward": ("validation/accuracy", max, "max")}
    for stage, each in files.items():
        written = read_metrics(quickstart[0] / stage)
        names = {name for row in written for name, value in row.items() if value}
        assert names - {"step"} <= {name for row in each.rows for name in row}, stage
        if stage in best:
            name, choose, summary = best[stage]
            assert each.summary[name][summary] == pytest.approx(choose(column(written, name)))
    for stage in ("ppo", "ppo-ptx"):
        each, written = files[stage], read_metrics(quickstart[0] / stage)
        assert each.summary["reward/kl"] == pytest.approx(column(written, "reward/kl")[-1])
        assert [row["iteration"] for row in each.rows if "reward/score" in row] == [1, 2]
        assert each.metrics["reward/score"].step_metric == "iteration"
        assert each.metrics["lr/policy"].step_metric == "trainer/global_step"


def test_tables_histograms_and_models_are_there(files, quickstart):
    ppo = files["ppo-ptx"]
    (row, *_) = (row for row in ppo.rows if "samples" in row)
    samples = [json.loads(line) for line in (quickstart[0] / "ppo-ptx" / "samples.jsonl").read_text().splitlines()]
    names = ("iteration", "prompt", "response")
    assert [[each[name] for name in names] for each in ppo.table(row["samples"])] == [
        [each[name] for name in names] for each in samples[: len(ppo.table(row["samples"]))]
    ]
    assert sum("histogram/ratios" in row for row in ppo.rows) == 2
    roles = {"pretraining": "pretraining", "ppo-ptx": "ppo"}
    for stage, each in files.items():
        (model,) = (record.artifact for record in each.of_type("artifact") if record.artifact.type == "model")
        assert model.name == f"one-{roles.get(stage, stage)}" and "latest" in model.aliases
        assert {"model.safetensors", "lineage.json", "README.md"} <= {entry.path for entry in model.manifest.contents}


def test_the_comparison_is_a_run_of_the_group(quickstart):
    each = WandbFiles(quickstart[0] / "evaluation")
    assert (each.run.run_group, each.run.job_type) == ("one", "evaluation") and each.config["seed"] == 3
    (row,) = (row for row in each.rows if "quickstart/models" in row)
    report = json.loads((quickstart[0] / "report.json").read_text())
    rates = {line["model"]: line["win_rate"] for line in each.table(row["quickstart/models"])}
    assert rates == {name: values["win_rate"] for name, values in report["models"].items()}
    assert any("quickstart/report" in row for row in each.rows)


def test_an_overlay_with_a_typo_is_refused_before_an_earlier_run_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("model: {init_args: {optimizr: torch.optim.SGD}}")
    (tmp_path / "out" / "stages").mkdir(parents=True)
    for start in (
        lambda: run(tmp_path / "out", 0, ["typo.yaml"], SMALL),
        lambda: run_sweeps(tmp_path / "out", [0], 1, overlays=["typo.yaml"]),
    ):
        with pytest.raises(UserError, match="SFTModule has no setting 'optimizr'"):
            start()
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["stages"]
