"""docs/: links resolve, code it names exists, metrics are those that are logged, and what it shows runs."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.recipes import shipped_recipes
from lit_rlhf.data.formats.registry import FORMATS
from tests.helpers.pages import DOCS, README, ROOT, blocks, commands, defined_names, named_blocks, prose
from tests.helpers.user_project import EXTENDING, enter_user_project, read_metrics, shrunk_command, write_jsonl

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
    """A user's folder with the files of docs/extending.md and a few rows of data, as the working directory."""
    return enter_user_project(tmp_path, llama, monkeypatch)


def test_the_preprocessing_example_prints_the_table_of_the_data_page(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "data.md"
    monkeypatch.delitem(sys.modules, "desk", raising=False)
    for name, text in (named_blocks(page, "python") | named_blocks(page, "yaml")).items():
        (project / name).write_text(text)
    rows = [{"customer": c, "prompt": p, "completion": " w1 w2"} for c, p in LETTERS]
    write_jsonl(project / "demonstrations.jsonl", rows)
    command = next(line for line in commands(page) if "support_desk" in line).split()[1:]
    short = ["-c", "shrink.yaml", "-c", "shrink-sft.yaml", *command[3:], "--data.micro_batch_size=2"]
    long_enough = ["--data.max_prompt_length=64", "--trainer.log_every_n_steps=1", "--trainer.max_steps=1"]
    assert main([*command[:3], *short, *long_enough]) == 0
    table = next(text for text in blocks(page, "") if text.startswith("demonstrations.jsonl\n"))
    assert any(table in message + "\n" for message in caplog.messages)


PAGES = {page.relative_to(ROOT).as_posix(): page for page in (README, *DOCS)}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
METRIC = re.compile(
    r"(train|validation|pretraining|centering|reward_model|reward|prompt|response|advantage|rollout|update|policy|value"
    r"|time|throughput|lr|grad_norm|memory)"
    r"/[a-z_]+[0-9]?"
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
    named = re.findall(r"names: \[(.*)\]", "".join(blocks(ROOT / "docs" / "rewards.md", "yaml")))
    parts = {f"reward/{name}" for names in named for name in names.split(", ")}  # of the page's own WeightedSum
    assert mentioned <= logged | parts


def test_the_format_tables_list_every_format() -> None:
    page = (ROOT / "docs" / "real-data.md").read_text()
    for kind, title in (("demonstration", "Demonstrations, for"), ("ranking", "Comparisons, for")):
        table = page.partition(title)[2].partition("\n\n")[2].partition("\n\n")[0]
        listed = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
        assert sorted(listed) == sorted(each.name for each in FORMATS[kind])
    prompts = page.partition("Prompts, for")[2].partition(";")[0]
    named = set(re.findall(r"`([a-z]+)`", prompts))
    assert named == {each.columns[0] for each in FORMATS["prompt"] if len(each.columns) == 1}


def test_a_run_logs_the_documented_names_and_no_other(project: Path) -> None:
    mix = "{class_path: lit_rlhf.callbacks.PretrainingMix, init_args: {path: t.jsonl, micro_batch_size: 2, seq_len: 8}}"
    (project / "t.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n' * 20)
    (project / "mix.yaml").write_text(
        f"trainer: {{callbacks+: [{mix}, {{class_path: lit_rlhf.callbacks.Throughput}}]}}"
    )
    validated = ["--data.validation_path=data.jsonl", "-c", "mix.yaml"]
    assert main([*shrunk_command("my_kl.yaml"), *validated]) == 0
    page = (ROOT / "docs" / "metrics.md").read_text().split("## PPO: the rollout")[1]
    # not on a CPU, and not without an entropy bonus or importance weights
    documented = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) - {
        "throughput/mfu",
        "policy/entropy",
        "rollout/importance_weight",
        "rollout/importance_capped_fraction",
    }
    documented |= {"lr/policy", "lr/critic", "grad_norm/policy", "grad_norm/critic", "iteration", "episodes", "tokens"}
    assert set(read_metrics(project / "runs/small/ppo")[0]) - {"epoch", "step"} == documented


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
