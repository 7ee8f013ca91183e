"""Every shell command of README.md and docs/ is run or parsed, and the README's three stages and snippet run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from lit_rlhf.cli import main
from lit_rlhf.commands.support import sweep_runs
from lit_rlhf.commands.support.quickstart_pipeline import copy_recipes
from tests.helpers.hub_cache import in_hub_cache
from tests.helpers.pages import DOCS, README, ROOT, blocks, commands, named_blocks

PAGES = {page.relative_to(ROOT).as_posix(): page for page in (README, *DOCS) if page.name != "extending.md"}
# what the recipes of `lit-rlhf plan` on the pages start from
HUB_MODELS = {"small": "EleutherAI/pythia-14m", "llama-3b-qlora": "meta-llama/Llama-3.2-3B"}
# settings that shorten a stage to seconds on the tiny model
SHORT = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
SHORT_STAGE = {
    "small/sft": ["--data.micro_batch_size=4"],
    "small/reward": ["--data.micro_batch_size=4"],
    "small/ppo": ["--model.sampling.max_new_tokens=8"],
}


def run(line: str, *more: str) -> int:
    words = shlex.split(line)
    assert words[0] == "lit-rlhf", line
    return main([*words[1:], *more])


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_command_is_valid(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, in an empty folder: quick commands run, long ones are parsed."""
    monkeypatch.chdir(tmp_path)
    copy_recipes(Path("runs/quickstart"))  # written by the quickstart before its first stage
    for name, text in (named_blocks(page, "python") | named_blocks(page, "yaml")).items():
        Path(name).write_text(text)
    targets = set(re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        words = shlex.split(line)
        capsys.readouterr()
        if words[0] == "wandb":
            assert words[1] in ("login", "sweep", "agent"), line
        elif words[0] == "make":
            assert words[1] in targets, line
            assert len(words) == 2 or words[2].startswith("ARGS="), line
        elif words[1] in ("fit", "validate", "test") and "--help" not in words:
            assert run(line, "--print_config") == 0, f"{line}\n{capsys.readouterr().err}"
            assert "class_path: lit_rlhf.modules." in capsys.readouterr().out
        elif words[1] == "evaluate":
            assert run(line) == 2, line  # the recipe parses; there is no model here
            assert "there is no folder 'runs/quickstart/" in capsys.readouterr().err, line
        elif words[1] == "sweep":
            monkeypatch.setattr(sweep_runs, "start_process", lambda run, jobs: 0)  # every run's recipe is parsed
            assert run(line) == 0, f"{line}\n{capsys.readouterr().err}"
        elif words[1] == "plan":
            with in_hub_cache(HUB_MODELS[words[3].partition("/")[0]], GPTNeoXConfig(num_hidden_layers=2)):
                assert run(line) == 0, f"{line}\n{capsys.readouterr().err}"
        elif words[1] in ("quickstart", "real", "paper", "workspace"):  # tests/synthetic and tests/cli run them
            assert run(line, "--help") == 0, line
        elif words[1] in ("export", "generate", "labelers", "rank", "best-of-n", "lineage"):
            assert run(line) == 2, line  # the arguments parse; there is no such folder or file here
            assert re.search("no (such )?(checkpoint|folder|data file)", capsys.readouterr().err), line
        elif words[:2] == ["pip", "install"] or words[1] in ("label", "chat"):
            continue  # servers: tests/labeling runs them
        else:
            assert words[1] in ("recipes", "fit") or words[1].startswith("--"), f"{page.name}: {line}"
            assert run(line) == 0, f"{line}\n{capsys.readouterr().err}"


def write_rows(path: str, rows: list[dict[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data files that the README names."""
    monkeypatch.chdir(tmp_path)
    prompts = [f"w{i} w{i + 1}" for i in range(20)]
    write_rows("demonstrations.jsonl", [{"prompt": each, "completion": f" {each}"} for each in prompts])
    write_rows(
        "rankings.jsonl",
        [{"prompt": each, "completions": [" w1", " w2 w3", " w4"], "ranks": [0, 1, 1]} for each in prompts],
    )
    write_rows("prompts.jsonl", [{"prompt": each} for each in prompts])
    write_rows("pretraining.jsonl", [{"text": " ".join(prompts)} for _ in range(20)])
    return tmp_path


def test_the_stages_the_export_and_the_snippet_run(
    project: Path, llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands(README)
    own = next(line for line in lines if "my_rewards.short" in line)
    stages = [
        each for each in lines if each.startswith("lit-rlhf fit -c small/") and "--data.path" in each and each != own
    ]
    assert [line.split()[3] for line in stages] == list(SHORT_STAGE)
    for line in stages:
        recipe = line.split()[3]
        start = [f"--model.model={llama}"] if recipe == "small/sft" else []  # later stages take the earlier one's
        assert run(line, *SHORT, *SHORT_STAGE[recipe], *start) == 0, line

    export, generate = (next(line for line in lines if line.split()[1] == verb) for verb in ("export", "generate"))
    assert run(export) == 0
    exported, trained = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (export.split()[-1], "runs/small/sft/model")
    )
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    capsys.readouterr()
    assert run(generate, "--max-new-tokens=4") == 0
    assert run(next(line for line in lines if line.split()[1] == "rank")) == 0

    Path("my_rewards.py").write_text(named_blocks(README, "python")["my_rewards.py"])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project)])
    assert run(own, *SHORT, *SHORT_STAGE["small/ppo"], "--run_dir=runs/own") == 0

    (snippet,) = (text for text in blocks(README, "python") if "Trainer" in text)
    assert "max_epochs=60" in snippet
    exec(compile(snippet.replace("max_epochs=60", "max_epochs=1, accelerator='cpu'"), str(README), "exec"), {})
    policy = next(project.glob("**/exported/ppo"))
    tuned = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    assert any(not torch.equal(tuned[name], trained[name]) for name in trained)


def test_the_quickstart_table_stands_between_its_marks() -> None:
    table = re.search(r"<!-- quickstart-table -->\n(.*?)<!-- /quickstart-table -->", README.read_text(), re.DOTALL)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.group(1).splitlines()]
    assert [row[0] for row in rows[2:]] == ["base", "base, few-shot prompt", "SFT", "PPO", "PPO-ptx"]
    assert len({len(row) for row in rows}) == 1


def test_the_tests_of_the_readme_are_make_test() -> None:
    assert "make test" in {" ".join(line.split()[:2]) for line in commands(README)}
    assert "-m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)" in (ROOT / "Makefile").read_text()
    assert sys.version_info >= (3, 11)
