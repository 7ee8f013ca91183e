"""Every shipped recipe, alone and with every overlay, instantiates; its header comment is complete and correct."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lit_rlhf.cli import main
from lit_rlhf.commands.evaluate import instantiate_evaluation
from lit_rlhf.commands.recipes import is_evaluation, is_overlay, shipped_recipes
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.recipe_cli import RecipeCLI
from lit_rlhf.modules.base import LitModule

EVALUATIONS = {name: path for name, path in shipped_recipes().items() if is_evaluation(name)}
RECIPES = {name: p for name, p in shipped_recipes().items() if not is_overlay(name) and not is_evaluation(name)}
OVERLAYS = {name: path for name, path in shipped_recipes().items() if is_overlay(name)}
STAGES = ("quickstart/pretraining", "quickstart/sft", "quickstart/reward", "quickstart/ppo", "quickstart/ppo-ptx")
# refused on one CPU, or without a package or a server: tests/cli/test_overlays.py
REFUSED = (
    "generator/vllm",
    "optimizer/adamw-8bit-sharded",
    "optimizer/paged-adamw-8bit",
    "precision/16-mixed",
    "strategy/deepspeed",
)
PPO_ONLY = ("compute/offload-frozen",)  # refused on the other stages
HEADER = {"recipe": ("Hardware", "Command", "Override", "Expect"), "overlay": ("Hardware", "Command")}


@pytest.fixture
def instantiate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `fit` up to the instantiation, in an empty folder, on one CPU; reading a model fails."""
    instantiated: list[RecipeCLI] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(RecipeCLI, "_run_subcommand", lambda cli, _: instantiated.append(cli))
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{auto}.from_pretrained", lambda *_, **__: pytest.fail("a model was read"))

    def run(*names: str) -> RecipeCLI:
        recipes = [word for name in names for word in ("-c", name)]
        assert main(["fit", *recipes, "--trainer.accelerator=cpu", "--trainer.devices=1"]) == 0
        return instantiated[-1]

    return run


def assert_instantiated(cli: RecipeCLI) -> None:
    assert isinstance(cli.model, LitModule)
    assert isinstance(cli.datamodule, L.LightningDataModule)
    assert isinstance(cli.trainer, L.Trainer)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_instantiates(name, instantiate):
    assert_instantiated(instantiate(name))


@pytest.mark.parametrize("stage", STAGES)
def test_every_overlay_works_on_every_stage(stage, instantiate):
    plain = instantiate(stage)
    for overlay in OVERLAYS.keys() - set(REFUSED if "ppo" in stage else (*REFUSED, *PPO_ONLY)):
        cli = instantiate(stage, overlay)
        assert_instantiated(cli)
        kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
        for callback in plain.trainer.callbacks:
            assert type(callback).__name__ in kinds, f"{overlay} loses {type(callback).__name__}"


def read_optimizer(cli: RecipeCLI) -> dict[str, Any]:
    settings = cli.config["fit"]["model"]["init_args"]["optimizer"]
    return {"class_path": settings["class_path"], **settings["init_args"]}


@pytest.mark.parametrize("overlay", [n for n in OVERLAYS if n.startswith("optimizer/") and n not in REFUSED])
def test_an_optimizer_overlay_keeps_rate_and_betas(overlay, instantiate):
    before, after = (
        read_optimizer(instantiate("quickstart/sft")),
        read_optimizer(instantiate("quickstart/sft", overlay)),
    )
    assert (after["lr"], list(after["betas"])) == (before["lr"], list(before["betas"]))
    assert overlay == "optimizer/adamw" or after["class_path"].startswith("bitsandbytes.optim.")


def test_overlays_change_their_settings(instantiate):
    for precision in ("32-true", "bf16-mixed"):
        assert (
            instantiate("quickstart/sft", f"precision/{precision}").config["fit"]["trainer"]["precision"] == precision
        )
    half = instantiate("quickstart/sft", "precision/bf16-true")
    assert half.model.loading.dtype == "bfloat16" and half.config["fit"]["trainer"]["precision"] == "32-true"
    assert type(instantiate("quickstart/sft", "strategy/ddp").trainer.strategy).__name__ == "DDPStrategy"
    assert type(instantiate("quickstart/sft", "strategy/fsdp").trainer.strategy).__name__ == "FSDP2Strategy"
    assert instantiate("quickstart/ppo", "adapter/lora").model.adapter.rank == 16
    assert instantiate("quickstart/sft", "logger/off").trainer.logger is None
    for overlay, offline in (("logger/wandb", False), ("logger/wandb-offline", True)):
        logger = instantiate("quickstart/sft", overlay).trainer.logger
        assert type(logger).__name__ == "WandbLogger" and logger._offline == offline


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_header_names_title_hardware_and_command(name):
    lines = shipped_recipes()[name].read_text().splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line)
    fields = HEADER["overlay" if is_overlay(name) else "recipe"]
    assert len(head[0]) > 20 and head[0].endswith("."), "a title that says what it is"
    for line, field in zip(head[1:], fields, strict=True):
        assert re.match(rf"# {field}: +\S", line), f"{name}: the line of {field} is {line!r}"
    base = "RECIPE -c " if is_overlay(name) else ""
    command = "evaluate" if is_evaluation(name) else "fit"
    assert f"lit-rlhf {command} -c {base}{name}" in head[2]


@pytest.mark.parametrize("name", RECIPES)
def test_the_override_of_the_header_is_valid(name, instantiate, capsys):
    lines = RECIPES[name].read_text().splitlines()
    settings = re.findall(r"--[\w.+]+=\S+", next(line for line in lines if line.startswith("# Override:")))
    assert settings
    assert main(["fit", "-c", name, *settings, "--print_config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_instantiates_and_its_override_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = EVALUATIONS[name].read_text().splitlines()
    settings = re.findall(r"--[\w.+]+=\S+", next(line for line in lines if line.startswith("# Override:")))
    args = ["-c", str(EVALUATIONS[name])]
    plain, changed = (instantiate_evaluation([*args, *more], ConfigLocations([], [])) for more in ([], settings))
    assert settings and plain.baseline in plain.models and plain.suites
    assert all(callable(suite.run) for suite in plain.suites.values())
    assert [vars(s) for s in plain.suites.values()] != [vars(s) for s in changed.suites.values()] or (
        plain.baseline != changed.baseline
    )
