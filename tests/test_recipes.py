"""Every shipped recipe, alone and with every overlay, instantiates and runs; its header comment is correct."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.cli import main
from lit_rlhf.commands.evaluate import instantiate_evaluation
from lit_rlhf.commands.recipes import is_evaluation, is_overlay, shipped_recipes
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.recipe_cli import RecipeCLI
from lit_rlhf.modules.base import LitModule
from tests.helpers.small_runs import demonstrations, rankings, write_rows
from tests.helpers.tiny_models import HUB_NAMES, write_tiny_model

EVALUATIONS = {name: path for name, path in shipped_recipes().items() if is_evaluation(name)}
RECIPES = {name: p for name, p in shipped_recipes().items() if not is_overlay(name) and not is_evaluation(name)}
OVERLAYS = {name: path for name, path in shipped_recipes().items() if is_overlay(name)}
STAGES = ("quickstart/pretraining", "quickstart/sft", "quickstart/reward", "quickstart/ppo", "quickstart/ppo-ptx")
# refused on one CPU, or without a package or a server: tests/cli/test_overlays.py
REFUSED = (
    "generator/vllm",
    "generator/vllm-ipc",
    "generator/vllm-lora",
    "generator/vllm-nccl",
    "generator/vllm-overlap",
    "optimizer/adamw-8bit-sharded",
    "optimizer/paged-adamw-8bit",
    "precision/16-mixed",
    "strategy/deepspeed",
)
PPO_ONLY = ("compute/offload-frozen", "reward-model/classifier")  # refused on the other stages
HEADER = {"recipe": ("Hardware", "Command", "Override", "Expect"), "overlay": ("Hardware", "Command")}


@pytest.fixture
def instantiate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `fit` up to the instantiation, in an empty folder, on one CPU; reading a model fails."""
    instantiated: list[RecipeCLI] = []
    monkeypatch.chdir(tmp_path)
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
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["CSVLogger", "WandbLogger"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_instantiates(name, instantiate):
    assert_instantiated(instantiate(name))


@pytest.mark.parametrize("stage", STAGES)
def test_every_overlay_works_on_every_stage(stage, instantiate):
    """The other stages than pretraining are run with every overlay by tests/cli/test_overlays.py, which checks this."""
    plain = instantiate(stage)
    overlays = OVERLAYS.keys() - set(REFUSED if stage.endswith("/ppo") else (*REFUSED, *PPO_ONLY))
    if stage != "quickstart/pretraining":
        overlays = [name for name in overlays if name.startswith("logger/") or name in PPO_ONLY]
    for overlay in overlays:
        cli = instantiate(stage, overlay)
        if overlay not in ("logger/csv", "logger/off"):
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
    (logger,) = instantiate("quickstart/sft", "logger/csv").trainer.loggers
    assert type(logger).__name__ == "CSVLogger"
    for overlay, offline in (("logger/wandb", False), ("logger/wandb-offline", True)):
        first, second = instantiate("quickstart/sft", overlay).trainer.loggers
        assert type(first).__name__ == "CSVLogger"
        assert type(second).__name__ == "WandbLogger" and second._offline == offline


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


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_instantiates_and_its_override_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = EVALUATIONS[name].read_text().splitlines()
    settings = re.findall(r"--[\w.+]+=\S+", next(line for line in lines if line.startswith("# Override:")))
    args = ["-c", str(EVALUATIONS[name])]
    (plain, _), (changed, _) = (
        instantiate_evaluation([*args, *more], ConfigLocations([], [])) for more in ([], settings)
    )
    assert [type(logger).__name__ for logger in plain.loggers] == ["CSVLogger", "WandbLogger"]
    assert settings and plain.baseline in plain.models and plain.suites
    assert all(callable(suite.run) for suite in plain.suites.values())
    assert [vars(s) for s in plain.suites.values()] != [vars(s) for s in changed.suites.values()] or (
        plain.baseline != changed.baseline
    )


# ------------------------------------------------------------------------------------- two steps of every recipe


SMALL = {
    "max_new_tokens": 4,
    "rollout_batch_size": 8,
    "micro_batch_size": 4,
    "forward_batch_size": 4,
    "num_micro_batches": 1,
    "seq_len": 16,
    "validation_fraction": 0.2,
}
ON_CPU = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "max_steps": 2,
    "limit_val_batches": 1,
    "enable_progress_bar": False,
}
READ = re.compile(r"(runs/[\w./-]+?)/(model|checkpoints/last\.ckpt)")


def read_recipe(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(shipped_recipes()[name].read_text())
    return content


def iter_strings(settings: Any) -> list[str]:
    values = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else []
    return [settings] if isinstance(settings, str) else [text for value in values for text in iter_strings(value)]


def replace(settings: Any, texts: dict[str, str]) -> Any:
    """Return settings with other strings, and with the sizes of `SMALL`."""
    if isinstance(settings, dict):
        return {key: SMALL.get(key, replace(value, texts)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [replace(value, texts) for value in settings]
    return texts.get(settings, settings) if isinstance(settings, str) else settings


def writers() -> dict[str, str]:
    """Return the recipe that writes each run folder."""
    return {read_recipe(name)["run_dir"]: name for name in RECIPES}


@pytest.mark.parametrize("name", [*RECIPES, *EVALUATIONS])
def test_every_run_folder_that_a_recipe_reads_is_written_by_a_recipe(name):
    texts = iter_strings(read_recipe(name))
    read = {match[1] for text in texts if (match := READ.fullmatch(text))}
    assert read <= writers().keys() | {"runs/judge/reward"}  # that judge is the user's own, by docs/evaluation.md


class Workspace:
    """A folder in which recipes are run for two steps, and first those whose models they read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, set[str]()
        named = {f"w{n}": word for n, word in enumerate("abcdefghijklmnopqrstuvwxyzé.")}

        def spell(row: Any) -> Any:
            if isinstance(row, dict):
                return {key: spell(value) for key, value in row.items()}
            if isinstance(row, list):
                return [spell(value) for value in row]
            return " ".join(named.get(word, word) for word in row.split()) if isinstance(row, str) else row

        asked = [{**spell(row), "user": f"u{n}"} for n, row in enumerate(demonstrations(24))]
        ranked = [{**spell(row), "user": f"u{n}"} for n, row in enumerate(rankings(24))]
        text = [{"text": " ".join(named.values()) * 4}] * 8
        prompts = [{"prompt": row["prompt"], "user": row["user"]} for row in asked]
        for part in ("data", "runs/quickstart/world"):
            (folder / part).mkdir(parents=True)
            for name, rows in {
                "demonstrations": asked,
                "demonstrations_validation": asked[:4],
                "rankings": ranked,
                "rankings_validation": ranked[:4],
                "comparisons": ranked,
                "prompts": prompts,
                "ppo_prompts": prompts,
                "evaluation_prompts": prompts,
                "pretraining": text,
                "pretraining_validation": text,
            }.items():
                write_rows(folder / part / f"{name}.jsonl", rows)
        for hub_name, kind in HUB_NAMES.items():
            write_tiny_model(kind, folder / "hub" / hub_name)
        write_tiny_model("llama_padded", folder / "runs/quickstart/world/base_init")

    def run(self, name: str, adapter: bool = False) -> Path:
        """Run a recipe once, with LoRA if `adapter`; return its run folder."""
        recipe = read_recipe(name)
        run_dir = recipe["run_dir"] + ("-lora" if adapter else "")
        if run_dir in self.done:
            return self.folder / run_dir
        texts = {hub_name: str(self.folder / "hub" / hub_name) for hub_name in HUB_NAMES}
        for text in iter_strings(recipe):
            match = READ.fullmatch(text)
            if match and match[1] in writers():
                writer = writers()[match[1]]
                lora = match[2] != "model" and "adapter" not in read_recipe(writer)["model"]["init_args"]
                texts[text] = str(self.run(writer, lora) / match[2])
        small = replace(recipe, texts) | {"run_dir": run_dir}
        trainer = {key: value for key, value in small["trainer"].items() if key != "accumulate_grad_batches"}
        small["trainer"] = trainer | ON_CPU
        (self.folder / "small.yaml").write_text(yaml.safe_dump(small))
        overlays = ["-c", "adapter/lora"] if adapter else []
        assert main(["fit", "-c", str(self.folder / "small.yaml"), *overlays]) == 0
        self.done.add(run_dir)
        return self.folder / run_dir


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("recipes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_for_two_steps_on_a_tiny_model_of_its_architecture(name, workspace, monkeypatch):
    """From the models that the recipes before it exported."""
    monkeypatch.chdir(workspace.folder)
    run = workspace.run(name)
    recipe = read_recipe(name)
    names = [callback["class_path"].rsplit(".", 1)[-1] for callback in recipe["trainer"]["callbacks"]]
    if "ExportModel" in names:
        reward = recipe["model"]["class_path"].endswith("RewardModule")
        auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        model = auto.from_pretrained(run / "model")
        assert all(torch.isfinite(weight).all() for weight in model.parameters())
    last = run / "checkpoints" / "last.ckpt"
    if "data" in recipe and "Prompt" not in recipe["data"]["class_path"] and "ModelCheckpoint" in names:
        assert torch.load(last, weights_only=True, map_location="meta")["global_step"] == 2
