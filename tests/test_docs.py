"""docs/: links resolve, code it names exists, metrics are those that are logged, and what it shows runs."""

import ast
import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_rlhf.cli import main
from lit_rlhf.commands.recipes import is_evaluation, is_overlay, shipped_recipes
from tests.helpers.pages import DOCS, README, ROOT, blocks, commands, defined_names, named_blocks, prose
from tests.helpers.ranks import on_ranks

EXTENDING = ROOT / "docs" / "extending.md"

# between a recipe and the user's overlay: the tiny model, a few rows, two epochs
SHRINK = """
model: {init_args: {model: MODEL}}
data: {init_args: {path: data.jsonl}}
trainer: {accelerator: cpu, max_epochs: 2, enable_progress_bar: false, log_every_n_steps: 1}
"""
SHRINK_SFT = """
data: {init_args: {micro_batch_size: 4, validation_fraction: 0.0}}
trainer: {callbacks: [{class_path: lit_rlhf.callbacks.ExportModel}]}
"""
SHRINK_PPO = """
model:
  init_args:
    reward: {class_path: lit_rlhf.rewards.FunctionReward, init_args: {function: words.count}}
    sampling: {max_new_tokens: 6}
    ppo: {rollout_batch_size: 8, micro_batch_size: 4}
trainer: {callbacks: [{class_path: lit_rlhf.callbacks.LogSamples, init_args: {every_n_epochs: 1, rows: 16}}]}
"""
DEMONSTRATIONS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i} w{i % 5}"} for i in range(16)]
TICKETS = [
    {"status": status, "subject": f"w{i}", "body": "w1 w2", "reply": f"w{i} w3"}
    for i, status in enumerate(["solved", "open", "solved", "solved"] * 4)
]

PARCEL = (
    "Please say what became of the order that I sent back to you in March, with the invoice in the same box and more."
)
LETTERS = [
    ("ada", "My parcel has not come."),
    ("ada", "Write to me at ada@example.com."),
    ("bob", "Is the shop open on Sunday?"),
    ("bob", f"{PARCEL} Was it refunded?"),
    ("cy", "How much is a stamp?"),
    ("cy", "Do you post abroad?"),
    ("di", "May I pay in cash?"),
    ("ed", "Where is the nearest shop?"),
    ("bob", f"{PARCEL} Was it lost?"),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: str) -> Path:
    """A user's folder with every file that docs/extending.md shows, beside a few rows of data."""
    files = named_blocks(EXTENDING, "python") | named_blocks(EXTENDING, "yaml")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "words.py").write_text(
        "def count(prompts, responses, rows):\n    return [len(r.split()) for r in responses]\n"
    )
    (tmp_path / "shrink.yaml").write_text(SHRINK.replace("MODEL", llama))
    (tmp_path / "shrink-sft.yaml").write_text(SHRINK_SFT)
    (tmp_path / "shrink-ppo.yaml").write_text(SHRINK_PPO)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TICKETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in [*files, "words.py"]:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    return tmp_path


def shrunk(overlay: str) -> list[str]:
    """Return the page's command for an overlay, with the tiny model and data put between recipe and overlay."""
    words = next(line for line in commands(EXTENDING) if f"-c {overlay}" in line).split()[1:]
    recipe = words[words.index("-c") + 1]
    assert words[:2] == ["fit", "-c"] and recipe.startswith("small/")
    return [*words[:3], "-c", "shrink.yaml", "-c", f"shrink-{recipe.removeprefix('small/')}.yaml", *words[3:]]


def logged(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[Any]]:
    """Record what a function of a stranger's class returns, without changing its signature."""

    def watch(owner: Any, name: str) -> list[Any]:
        calls: list[Any] = []
        original = getattr(owner, name)

        @wraps(original)
        def record(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            calls.append(result)
            return result

        monkeypatch.setattr(owner, name, record)
        return calls

    return watch


def test_a_strangers_optimizer_and_scheduler(project: Path, llama: str) -> None:
    assert main([*shrunk("my_optimizer.yaml"), "--model.scheduler.init_args.steps=1", "--trainer.max_steps=2"]) == 0
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(project / "runs/small/sft/model").state_dict()
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    # two sign steps, of 1e-4 and of half of it: they add up, cancel in part, or found no gradient
    allowed = torch.tensor([0.0, 0.5e-4, 1e-4, 1.5e-4])
    assert ((moved[:, None] - allowed).abs().amin(1) < 1e-6).all()
    assert moved.max() > 1.49e-4


def test_a_strangers_kl_controller(project: Path) -> None:
    assert main(shrunk("my_kl.yaml")) == 0
    coefficients = column(logged(project / "runs/small/ppo"), "reward/kl_coefficient")
    assert coefficients == pytest.approx([0.05, 0.05 / 1.1], rel=1e-6)  # the KL of a fresh policy is 0: below the band


def test_a_strangers_generator(project: Path, watched) -> None:
    import my_generator

    assert main(shrunk("my_kl.yaml")) == 0
    built_in = column(logged(project / "runs/small/ppo"), "reward/score")
    shutil.rmtree(project / "runs")
    rollouts = watched(my_generator.PlainGenerator, "generate")
    assert main(shrunk("my_generator.yaml")) == 0
    assert len(rollouts) == 2
    assert column(logged(project / "runs/small/ppo"), "reward/score") == built_in  # same noise, same responses


def test_a_strangers_reward_function_and_source(project: Path) -> None:
    assert main(shrunk("my_rewards.yaml")) == 0
    samples = [json.loads(line) for line in (project / "runs/small/ppo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    for sample in samples:
        words = sample["response"].split()
        variety = len(set(words)) / len(words) if len(words) >= 3 else 0.0
        assert sample["score"] == pytest.approx(-abs(len(words) - 5) / 5 + 0.5 * variety, abs=1e-6)


def test_a_strangers_data_format(project: Path, watched, capsys: pytest.CaptureFixture[str]) -> None:
    import my_format

    command = shrunk("my_format.yaml")
    assert main([*command, "--data.format=auto"]) == 2  # no format has these columns
    rows = watched(my_format, "from_tickets")
    assert main(command) == 0
    assert [row is None for row in rows] == [False, True, False, False] * 4


def test_a_strangers_detector_and_the_table_that_the_data_page_shows(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "data.md"
    monkeypatch.delitem(sys.modules, "desk", raising=False)
    for name, text in (named_blocks(page, "python") | named_blocks(page, "yaml")).items():
        (project / name).write_text(text)
    lines = [json.dumps({"customer": c, "prompt": p, "completion": " w1 w2"}) + "\n" for c, p in LETTERS]
    (project / "demonstrations.jsonl").write_text("".join(lines))
    command = next(line for line in commands(page) if "support_desk" in line).split()[1:]
    short = ["-c", "shrink.yaml", "-c", "shrink-sft.yaml", *command[3:], "--data.micro_batch_size=2"]
    long_enough = ["--data.max_prompt_length=64", "--trainer.log_every_n_steps=1", "--trainer.max_steps=1"]
    assert main([*command[:3], *short, *long_enough]) == 0
    table = next(text for text in blocks(page, "") if text.startswith("demonstrations.jsonl\n"))
    assert any(table in message + "\n" for message in caplog.messages)


def test_a_strangers_callback(project: Path) -> None:
    assert main([*shrunk("my_callback.yaml"), "--trainer.callbacks.limit=-1"]) == 0
    assert len(column(logged(project / "runs/small/ppo"), "reward/kl")) == 1  # stopped behind the first of two
    assert (project / "runs/small/ppo/samples.jsonl").is_file()  # and the recipe's callbacks are still there


def test_a_strangers_logger(project: Path) -> None:
    assert main(shrunk("my_logger.yaml")) == 0
    rows = [json.loads(line) for line in (project / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/score"] for row in rows if "reward/score" in row] == pytest.approx(
        column(logged(project / "runs/mine"), "reward/score")
    )


def test_a_strangers_strategy_on_two_ranks(project: Path) -> None:
    def rank() -> tuple[int, timedelta]:
        import my_strategy

        made = []
        setup = my_strategy.PatientDDP.setup_environment

        def setup_environment(self: Any) -> None:
            made.append(self._timeout)
            setup(self)

        my_strategy.PatientDDP.setup_environment = setup_environment
        return main([*shrunk("my_strategy.yaml"), "--trainer.max_steps=2"]), made[0]

    assert on_ranks(rank, project) == [(0, timedelta(minutes=90))] * 2


def test_a_strangers_judge_and_toxicity_scorer(project: Path, llama: str) -> None:
    (project / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    (project / "toxicity.jsonl").write_text('{"prompt": {"text": "w1 w2", "toxicity": 0.1}}\n')
    models = f"models: {{one: {{path: {llama}}}, other: {{path: {llama}, prefix: 'w7 '}}}}\nbaseline: one\n"
    (project / "models.yaml").write_text(models)
    found = {}
    for name in ("judge", "scorer"):
        assert (
            main(["evaluate", "-c", "models.yaml", "-c", f"my_{name}.yaml", f"--out={name}", "--progress=false"]) == 0
        )
        found |= json.loads((project / name / "report.json").read_text())["suites"]
    won = found["preference"]["figures"]["T = 1: win rate"]["models"]
    assert won["one"]["value"] == 0.5 and won["other"]["count"] + won["other"]["missing"] == 2
    toxicity = found["toxicity"]["figures"]["basic"]["models"]["one"]
    assert toxicity["value"] == 0.0 or toxicity["missing"] == 1  # the words are w1, w2, …: no capital letter


def test_all_of_a_strangers_parts_at_once_from_one_file(project: Path, watched) -> None:
    python = named_blocks(EXTENDING, "python")
    parts = ("my_kl", "my_generator", "my_rewards", "my_callback", "my_logger")
    (project / "all_mine.py").write_text("\n".join(python[f"{name}.py"] for name in (*parts, "my_optimizer")))
    words = []
    for name in (*parts, "my_optimizer"):
        overlay = project / f"{name}.yaml"
        overlay.write_text(overlay.read_text().replace(f"{name}.", "all_mine."))
        words += ["-c", overlay.name]
    import all_mine

    rollouts = watched(all_mine.PlainGenerator, "generate")
    assert main([*shrunk("my_kl.yaml"), *words]) == 0
    assert len(rollouts) == 2
    rows = logged(project / "runs/mine")
    assert column(rows, "reward/kl_coefficient") == pytest.approx([0.05, 0.05 / 1.1], rel=1e-6)
    assert max(column(rows, "reward/score")) <= 0.5
    assert (project / "metrics.jsonl").is_file()


def test_a_class_that_misses_the_protocol_is_told_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "wrong.py").write_text("class Kl:\n    def __init__(self):\n        pass\n")
    assert main([*shrunk("my_kl.yaml")[:-2], "--model.kl=wrong.Kl"]) == 2
    assert capsys.readouterr().err == (
        "error: model.kl: 'Kl' is no KLController: it needs its methods, with the same parameters and type hints "
        "[command line]\n"
    )


PAGES = {page.relative_to(ROOT).as_posix(): page for page in (README, *DOCS)}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
METRIC = re.compile(
    r"(train|validation|pretraining|reward|response|rollout|update|policy|value|time|centring|quality)/[a-z_]+[0-9]?"
)


@every_page
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else (page.parent / path).resolve()
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


@every_page
def test_named_files_and_functions_exist(page: Path) -> None:
    text = prose(page)
    for name in re.findall(r"`((?:lit_rlhf|callbacks|recipes|tests)/[\w./-]*)", text):
        assert (ROOT / name.rstrip("/")).exists(), f"{page.name} names {name}"
    for name, defined in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text):
        assert defined in defined_names(ROOT / name), f"{page.name} names {name}: {defined}"


@every_page
def test_named_recipes_exist(page: Path) -> None:
    recipes = shipped_recipes()
    folders = {name.split("/")[0] for name in recipes}
    for name in re.findall(r"`([a-z0-9-]+/[\w.-]+)`", prose(page)):
        if name.split("/")[0] in folders:
            assert name in recipes, f"{page.name} names the recipe {name}"


@every_page
def test_settings_named_with_their_owner_exist(page: Path) -> None:
    """Such as `ppo.gae_lambda` or `data.batching`: somewhere in the package a parameter has that name."""
    sources = "\n".join(path.read_text() for path in (*ROOT.glob("lit_rlhf/**/*.py"), *ROOT.glob("callbacks/*.py")))
    for owner, name in re.findall(r"`((?:model|data|ppo|sampling|PretrainingMix)\.)(?:\w+\.)*(\w+)`", prose(page)):
        assert re.search(rf"\b{name}: ", sources), f"{page.name} names the setting {owner}{name}"


def test_the_ladder_lists_every_recipe_and_overlay() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in shipped_recipes() if f"`{name}`" not in page] == []
    readme = README.read_text()
    assert [name for name in shipped_recipes() if f"`{name.split('/')[0]}/`" not in readme] == []


def test_the_metrics_are_those_that_are_logged() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    packages = ("lit_rlhf/modules", "lit_rlhf/rollout", "lit_rlhf/rewards", "callbacks")
    sources = [path for package in packages for path in ROOT.glob(f"{package}/*.py")]
    constants = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    logged = {text for text in constants if METRIC.fullmatch(text)}
    assert documented == logged
    mentioned = {
        name.group(0) for each in DOCS for name in re.finditer(rf"(?<=`){METRIC.pattern}(?=`)", each.read_text())
    }
    assert mentioned <= logged


def test_a_run_logs_the_documented_names_and_no_other(project: Path) -> None:
    mix = "{class_path: lit_rlhf.callbacks.PretrainingMix, init_args: {path: t.jsonl, micro_batch_size: 2, seq_len: 8}}"
    (project / "t.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n' * 20)
    (project / "mix.yaml").write_text(
        f"trainer: {{callbacks+: [{mix}, {{class_path: lit_rlhf.callbacks.Throughput}}]}}"
    )
    validated = ["--data.validation_path=data.jsonl", "-c", "mix.yaml"]
    assert main([*shrunk("my_kl.yaml"), *validated]) == 0
    page = (ROOT / "docs" / "metrics.md").read_text().split("## PPO: the rollout")[1]
    # not on a CPU, and not without an entropy bonus
    documented = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) - {
        "throughput/mfu",
        "policy/entropy",
    }
    assert set(logged(project / "runs/small/ppo")[0]) - {"epoch", "step"} == documented


@pytest.mark.parametrize("page", [page for page in PAGES.values() if page != EXTENDING], ids=lambda page: page.stem)
def test_python_blocks_compile(page: Path) -> None:
    for text in blocks(page, "python"):
        if page.name == "architecture.md":
            continue  # types without their bodies
        compile(text, str(page), "exec")


@every_page
def test_yaml_blocks_parse(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["fit", *args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_overlays_merge_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arguments.yaml").write_text("model: {init_args: {kl: {init_args: {target: 3}}}}")
    (tmp_path / "replace.yaml").write_text("trainer: {callbacks: [{class_path: lit_rlhf.callbacks.LogSamples}]}")
    (tmp_path / "extend.yaml").write_text(
        "trainer: {callbacks+: [{class_path: lit_rlhf.callbacks.CenterScores, init_args: {path: d}}]}"
    )
    (tmp_path / "class.yaml").write_text(
        "model: {init_args: {kl: {class_path: lit_rlhf.rollout.kl_controller.FixedKLController}}}"
    )
    recipe = printed(capsys, "-c", "small/ppo")
    optimizer, kl = recipe["model"]["init_args"]["optimizer"], recipe["model"]["init_args"]["kl"]

    merged = printed(capsys, "-c", "small/ppo", "-c", "precision/bf16-mixed")
    assert merged["trainer"].pop("precision") == "bf16-mixed" != recipe["trainer"].pop("precision")
    assert merged == recipe

    merged = printed(capsys, "-c", "small/ppo", "-c", "arguments.yaml")["model"]["init_args"]["kl"]
    assert merged == {**kl, "init_args": {**kl["init_args"], "target": 3.0}}

    merged = printed(capsys, "-c", "small/ppo", "-c", "optimizer/adamw-8bit")["model"]["init_args"]["optimizer"]
    assert merged["class_path"] == "bitsandbytes.optim.AdamW8bit"
    kept = ("lr", "betas", "weight_decay")
    assert [merged["init_args"][name] for name in kept] == [optimizer["init_args"][name] for name in kept]

    merged = printed(capsys, "-c", "small/ppo", "-c", "class.yaml")["model"]["init_args"]["kl"]
    assert merged["init_args"] == {"coefficient": kl["init_args"]["coefficient"]}  # target and horizon are dropped

    names = [each["class_path"].split(".")[-1] for each in recipe["trainer"]["callbacks"]]
    for overlay, expected in (("replace.yaml", ["LogSamples"]), ("extend.yaml", [*names, "CenterScores"])):
        merged = printed(capsys, "-c", "small/ppo", "-c", overlay)["trainer"]["callbacks"]
        assert [each["class_path"].split(".")[-1] for each in merged] == expected

    merged = printed(capsys, "-c", "small/ppo", "--model.optimizer.lr=5e-4")["model"]["init_args"]["optimizer"]
    assert merged == {**optimizer, "init_args": {**optimizer["init_args"], "lr": 5e-4}}  # without init_args in the path


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if not is_overlay(n) and not is_evaluation(n)])
def test_the_override_in_a_recipes_head_parses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    head = [line for line in shipped_recipes()[name].read_text().splitlines() if line.startswith("# Override:")]
    words = [word for word in head[0].split() if word.startswith("--")]
    assert len(head) == 1 and words
    assert printed(capsys, "-c", name, *words) != printed(capsys, "-c", name)
