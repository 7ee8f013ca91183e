"""Every overlay on every stage, and every pair with a strategy, does what docs/hardware.md says."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.recipes import is_overlay, shipped_recipes
from lit_rlhf.commands.support.compatibility import RULES, Setup, setup_unsupported_reason
from lit_rlhf.commands.support.recipe_cli import RecipeCLI
from tests import gpu_check
from tests.helpers.overlay_world import write_world
from tests.helpers.pages import ROOT
from tests.helpers.ranks import on_ranks
from tests.helpers.services import refused_url
from tests.helpers.vllm_server import serve_vllm

PAGE = (ROOT / "docs" / "hardware.md").read_text()
STAGES = {"SFT": "sft", "reward model": "reward", "PPO": "ppo", "PPO-ptx": "ppo-ptx"}


def table(heading: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell of the table whose first column is headed so."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
    start = next(i for i, cells in enumerate(lines) if cells[0] == heading)
    names, found = [name.strip("`") for name in lines[start]], {}
    for cells in lines[start + 2 :]:
        if len(cells) != len(names) or not cells[0].startswith("`"):
            break
        found |= {(cells[0].strip("`"), name): cell for name, cell in zip(names[1:], cells[1:])}
    return found


ALONE, PAIRS = table("overlay"), table("with")
# columns of the second table: the overlay, and additional settings
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "strategy/ddp": ("strategy/ddp", {}),
    "strategy/fsdp": ("strategy/fsdp", {}),
    "tensor parallel": ("strategy/fsdp", {"strategy.tensor_parallel_size": 2}),
}
OVERLAYS = [name for name in shipped_recipes() if is_overlay(name) and not name.startswith("logger/")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny inputs for the quickstart recipes."""
    root = tmp_path_factory.mktemp("overlays")
    write_world(root)
    return root


def callback_names(stage: str) -> set[str]:
    """Return the classes of the callbacks that a stage has without an overlay."""
    files = (Path(f"small-{stage}.yaml"), shipped_recipes()[f"quickstart/{stage}"])
    callbacks = [yaml.safe_load(file.read_text()).get("trainer", {}).get("callbacks") for file in files]
    return {each["class_path"].rpartition(".")[-1] for each in callbacks[0] or callbacks[1]}


@pytest.fixture
def no_server() -> Iterator[str]:
    """An address where no server listens."""
    with refused_url() as url:
        yield url


@pytest.fixture
def fit(
    folder: Path, no_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a stage with overlays: "runs" after three steps, or the error line."""
    monkeypatch.chdir(folder)
    settings = {"model": {"init_args": {"generator": {"init_args": {"url": no_server}}}}}
    (folder / "no-server.yaml").write_text(json.dumps(settings))
    local = {"model": {"init_args": {"reward": {"init_args": {"model": "runs/quickstart/reward/model"}}}}}
    (folder / "reward-model.yaml").write_text(json.dumps(local))
    instantiated: list[RecipeCLI] = []
    instantiate = RecipeCLI.instantiate_classes
    monkeypatch.setattr(RecipeCLI, "instantiate_classes", lambda cli: (instantiated.append(cli), instantiate(cli)))

    def run(stage: str, *overlays: str, **settings: Any) -> str:
        files = [f"quickstart/{stage}", "small.yaml", f"small-{stage}.yaml", *overlays]
        if overlays[-1].startswith("generator/vllm") and stage.startswith("ppo"):
            files.append("no-server.yaml")  # the address of the overlay itself may be in use
        if overlays[-1] == "reward-model/classifier" and stage.startswith("ppo"):
            files.append("reward-model.yaml")  # the overlay's own is on the hub
        words = [word for name in files for word in ("-c", name)]
        instantiated.clear()
        capfd.readouterr()
        arguments = ["fit", *words, *(f"--trainer.{name}={value}" for name, value in settings.items())]
        # the shipped folder holds the model that the stages start from
        code = main([*arguments, "--run_dir=runs/overlay", "--overwrite"])
        if code == 2:
            line = capfd.readouterr().err.strip().splitlines()[-1]
            assert not instantiated, f"{overlays}: refused, but not before anything is instantiated: {line}"
            return line
        trainer = instantiated[-1].trainer
        assert code == 0 and trainer.global_step == 3
        assert [type(logger).__name__ for logger in trainer.loggers] == ["CSVLogger", "WandbLogger"]
        lost = callback_names(stage) - {type(callback).__name__ for callback in trainer.callbacks}
        assert not lost, f"{overlays} lose {lost}"
        return "runs"

    return run


def assert_as_documented(outcome: str, cell: str, overlays: tuple[str, ...]) -> None:
    if cell == "refused":
        # an overlay of one stage alone has a setting that the others lack
        assert re.fullmatch(r"error: .+(use |set |pip install |has no setting ).+", outcome), (overlays, outcome)
    else:
        assert outcome == cell, (overlays, outcome)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile nothing, which would take a minute: tests/models/test_loading.py does."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def expected(cell: str, overlays: tuple[str, ...]) -> str:
    """The page assumes that torchao is not installed; if it is, its optimizer runs."""
    missing = any("sharded" in name for name in overlays) and find_spec("torchao")
    return "runs" if cell == "refused" and missing else cell


def test_the_tables_hold_every_overlay_and_stage():
    assert ALONE.keys() == {(overlay, stage) for overlay in OVERLAYS for stage in STAGES}
    defaults = ("optimizer/adamw", "precision/32-true")
    others = [name for name in OVERLAYS if not name.startswith("strategy/") and name not in defaults]
    assert PAIRS.keys() == {(other, strategy) for other in others for strategy in STRATEGIES}


@pytest.mark.parametrize("stage", STAGES)
def test_an_overlay_alone(stage, fit, folder, tmp_path):
    def run_all(names: list[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            yield name, fit(STAGES[stage], name)

    strategies = [name for name in OVERLAYS if name.startswith("strategy/")]
    plain = [name for name in OVERLAYS if name not in strategies]
    # a strategy leaves a process group behind, so it gets a process of its own
    outcomes = dict(run_all(plain)) | on_ranks(lambda: dict(run_all(strategies)), tmp_path, world_size=1)[0]
    for name, outcome in outcomes.items():
        assert_as_documented(outcome, expected(ALONE[name, stage], (name,)), (name, stage))


@pytest.mark.parametrize("column", STRATEGIES)
def test_an_overlay_with_a_strategy_on_two_ranks(column, fit, tmp_path):
    strategy, settings = STRATEGIES[column]
    cells = {name: cell for (name, each), cell in PAIRS.items() if each == column}
    if not settings:
        cells = {name: expected(cell, (name,)) for name, cell in cells.items()}
    for name in cells:
        if cells[name] == "refused":
            assert_as_documented(fit("ppo-ptx", strategy, name, **settings), "refused", (column, name))
    names = [name for name, cell in cells.items() if cell == "runs"]
    ranks = on_ranks(lambda: {name: fit("ppo-ptx", strategy, name, devices=2, **settings) for name in names}, tmp_path)
    assert ranks == [dict.fromkeys(names, "runs")] * 2


def test_the_vllm_overlay_runs_where_a_server_answers(fit, folder):
    with serve_vllm(str(folder / "runs/quickstart/sft/model")) as (service, server):
        setting = f"model: {{init_args: {{generator: {{init_args: {{url: '{service.url}', folder: shared}}}}}}}}\n"
        (folder / "server.yaml").write_text(setting)
        assert fit("ppo-ptx", "generator/vllm", "server.yaml") == "runs"
        assert fit("ppo", "generator/vllm-overlap", "server.yaml") == "runs"
        assert "NCCLTransfer needs vLLM beside lit-rlhf" in fit("ppo", "generator/vllm-nccl")
        assert server.weights_paths and all(Path(path).parent == folder / "shared" for path in server.weights_paths)
    assert "Connection refused" in fit("ppo", "generator/vllm")


def test_tensor_parallelism_on_two_ranks_for_every_stage(fit, tmp_path):
    strategy, settings = STRATEGIES["tensor parallel"]
    stages = ("sft", "reward", "ppo")
    ranks = on_ranks(lambda: [fit(stage, strategy, devices=2, **settings) for stage in stages], tmp_path)
    assert ranks == [["runs"] * 3] * 2


def test_the_page_gives_every_reason():
    for _, reason in RULES:
        assert f"- {reason}" in PAGE, reason


def test_what_needs_a_gpu_is_refused_or_let_through():
    gpu = Setup(module="SFTModule", device="cuda", strategy="fsdp1")
    assert setup_unsupported_reason(gpu) is None and "-c strategy/fsdp" in setup_unsupported_reason(
        gpu._replace(norm_clipping=True)
    )
    assert "-c strategy/fsdp" in setup_unsupported_reason(gpu._replace(module="PPOModule"))
    assert setup_unsupported_reason(Setup(device="cuda", optimizer="bitsandbytes.optim.PagedAdamW8bit")) is None
    assert setup_unsupported_reason(Setup(device="cuda", precision="16-mixed")) is None
    assert "FSDP2" in setup_unsupported_reason(Setup(device="cuda", precision="16-mixed", strategy="fsdp2"))
    assert "PPO's rollouts" in setup_unsupported_reason(Setup(device="cuda", strategy="deepspeed", module="PPOModule"))
    assert "pip install 'lit-rlhf[deepspeed]'" in setup_unsupported_reason(Setup(device="cuda", strategy="deepspeed"))
    assert "a C++ compiler" not in (setup_unsupported_reason(Setup(device="cuda", compiled=True)) or "")


def test_the_gpu_check_covers_every_overlay_and_its_commands_name_recipes():
    listed = [args for _, _, args in gpu_check.checks(gpus=2)]
    overlays = {word for args in listed for word in args if word in OVERLAYS}
    # the recipes' own; needs a server; needs a model of the hub
    assert overlays == set(OVERLAYS) - {
        "optimizer/adamw",
        "generator/vllm",
        "generator/vllm-ipc",
        "generator/vllm-lora",
        "generator/vllm-nccl",
        "generator/vllm-overlap",
        "reward-model/classifier",
    }
    assert {args[2] for args in listed} == {f"quickstart/{stage}" for stage in STAGES.values()}
