"""No credential is in anything that a run leaves: recipes and arguments hold none, and defaults are masked."""

import os
from pathlib import Path

import pytest
import wandb
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.cli import print_error
from lit_rlhf.commands.support.sweep_recipes import compose_config
from lit_rlhf.secrets import drop_secrets, is_secret, mask_message, mask_text, without_secrets
from tests.cli.test_errors import error_lines

SECRET = "Zq7-hunter2"
FIX = "recipes and command lines are saved and logged: take it from an environment variable or a file"
NAMES = (
    *("api_key", "openai_key", "bearer", "acme_key", "token", "key", "auth", "apiKey", "OPENAI_API_KEY", "x-api-key"),
    *("api_keys", "Authorization", "password", "db_passwd", "hf_token", "authToken", "client_secret", "credentials"),
)
HARMLESS = {
    "pad_token": "<pad>",
    "eos_token": "<|im_end|>",
    "bos_token": "[BOS]",
    "text_key": "text",
    "key": "prompt_id",
    "keys": "a",
    "api_key_env": "OPENAI_API_KEY",
    "max_new_tokens": 5,
    "password": None,
    "password_file": "/run/secrets/p1",
    "tokenizer": "org/model-7B",
    "authors": "Ada L.",
}
ADDRESSES = {
    f"https://bob:{SECRET}@host/v1": "https://removed@host/v1",
    f"https://{SECRET}@host/v1": "https://removed@host/v1",
    f"postgresql://bob:{SECRET}@host/runs": "postgresql://removed@host/runs",
    f"https://host/v1?key={SECRET}&n=2": "https://host/v1?key=removed&n=2",
    f"https://host/v1?n=2&access_token={SECRET}": "https://host/v1?n=2&access_token=removed",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_credential_is_known_by_the_settings_name(name: str) -> None:
    assert is_secret([name], SECRET)
    assert without_secrets({"a": [{name: SECRET}], name: [SECRET]}) == {"a": [{name: "removed"}], name: ["removed"]}
    assert drop_secrets({"a": [{name: SECRET, "b": 1}], name: [[SECRET], "c"]}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("name", HARMLESS)
def test_other_settings_are_left_alone(name: str) -> None:
    config = {"a": [{name: HARMLESS[name]}], "b": "Basic arithmetic: http://host/a?keys=all user@host, 10:30@noon"}
    assert without_secrets(config) == drop_secrets(config) == config


def test_everything_below_credentials_is_masked_but_a_class_has_names_of_its_own() -> None:
    config = {
        "credentials": {"user": "bob", "pins": [1234]},
        "api_token": {"class_path": "m.T", "init_args": {"n": "x"}},
    }
    masked = {"credentials": {"user": "removed", "pins": ["removed"]}, "api_token": config["api_token"]}
    assert without_secrets(config) == masked


@pytest.mark.parametrize("address", ADDRESSES)
def test_credentials_in_addresses_are_masked(address: str) -> None:
    assert mask_text(f"see {address} there") == f"see {ADDRESSES[address]} there"
    assert mask_text(ADDRESSES[address]) == ADDRESSES[address]


@pytest.mark.parametrize("text", ["sk-" + "a1B2" * 8, "hf_" + "aB3" * 10, "Bearer " + SECRET, "AKIA" + "A1B2" * 4])
def test_known_forms_are_masked_under_any_name(text: str) -> None:
    assert without_secrets({"note": text}) == {"note": "removed"}


@given(st.text(), st.sampled_from(NAMES))
def test_masking_is_idempotent_and_messages_lose_the_value(text: str, name: str) -> None:
    assert mask_text(mask_text(text)) == mask_text(text)
    assert SECRET not in mask_message(f"Namespace(a=1, {name}='{SECRET}') {{'{name}': '{SECRET}'}}")


@pytest.mark.parametrize(
    "argument",
    [
        f"--model.api_key={SECRET}",
        f"--model.controller.init_args.bearer={SECRET}",
        f"--model={{class_path: toys.ToyModule, init_args: {{openai_key: {SECRET}}}}}",
        *(f"--data.path={address}" for address in ADDRESSES),
    ],
)
@pytest.mark.parametrize("args", [["fit"], ["plan"], ["evaluate"], ["sweep", "--over", "model.hidden=1"]])
def test_a_credential_in_an_argument_is_refused_and_not_shown(project: Path, command, args, argument: str) -> None:
    for words in ([argument], argument.split("=", 1)):
        code, stdout, stderr = command(*args, "-c", "recipe.yaml", *words)
        assert code == 2 and SECRET not in stdout + stderr
        name = argument.split("=")[0].lstrip("-")
        assert error_lines(stderr) == [f"error: {name} holds a credential, and {FIX} [command line]"]
    assert not (project / "config.yaml").exists()


def test_a_credential_that_varies_is_refused(project: Path, command) -> None:
    code, stdout, stderr = command("sweep", "-c", "recipe.yaml", "--over", f"model.api_key={SECRET},b")
    assert code == 2 and "model.api_key holds a credential" in stderr and SECRET not in stdout + stderr


@pytest.mark.parametrize(
    "text", [f"api_key: {SECRET}", f"headers: {{X-Auth: {SECRET}}}", *(f"path: {a}" for a in ADDRESSES)]
)
def test_a_credential_in_a_recipe_is_refused_with_its_line(project: Path, command, text: str) -> None:
    (project / "overlay.yaml").write_text(f"data:\n  init_args:\n    {text}\n")
    (project / "outer.yaml").write_text("data: inner.yaml\n")
    (project / "inner.yaml").write_text(f"class_path: toys.ToyData\ninit_args:\n  {text}\n")
    for name, line in (("overlay", "overlay.yaml:3"), ("outer", "inner.yaml:3")):
        code, stdout, stderr = command("fit", "-c", "recipe.yaml", "-c", f"{name}.yaml")
        assert code == 2 and SECRET not in stdout + stderr
        assert error_lines(stderr)[0].startswith(f"error: {line}: ") and "holds a credential" in stderr


SECRETIVE = """
import os

import toys
from lightning.pytorch import loggers

from lit_rlhf import evaluation

KEY = os.environ["THE_KEY"]


class Service:
    def __init__(self, bearer: str = KEY, url: str = f"http://bob:{KEY}@host/v1", api_keys: list[str] = [KEY]):
        assert bearer == KEY and KEY in url and api_keys == [KEY]


class Module(toys.ToyModule):
    def __init__(self, openai_key: str = KEY, service: Service | None = None, services: list[Service] | None = None):
        super().__init__()
        self.save_hyperparameters()
        assert openai_key == KEY and isinstance(service, Service)


class Suite(evaluation.Suite):
    def __init__(self, service: Service = Service(), password: str = KEY):
        pass

    def run(self, models, context):
        pass


class Logger(loggers.Logger):
    def __init__(self, password: str = f"{KEY} {KEY}", url: str = f"http://bob:{KEY}@host/v1"):
        pass


class Data(toys.ToyData):
    def __init__(self, hub_token: str = KEY):
        super().__init__()
        self.save_hyperparameters({"hub_token": hub_token, "rows": [{"api_key": hub_token}]})
"""
EVALUATION = """
models: {base: {path: model}}
baseline: base
suites: {own: {class_path: secretive.Suite}}
out: out
"""
LOGGERS = """
trainer:
  enable_checkpointing: true
  logger:
  - {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true, save_dir: .}}
  - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: .}}
model:
  class_path: secretive.Module
  init_args: {service: {class_path: secretive.Service}, services: [{class_path: secretive.Service}]}
data: {class_path: secretive.Data}
"""


def files_with(secret: str, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_no_file_of_a_run_holds_a_credential(project: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of every kind, from the environment: a class's defaults, and the variables of the services."""
    (project / "secretive.py").write_text(SECRETIVE)
    (project / "recipe.yaml").write_text((project / "recipe.yaml").read_text().split("model:")[0] + "\n")
    (project / "loggers.yaml").write_text(LOGGERS)
    for name in ("THE_KEY", "WANDB_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "LIT_RLHF_REWARD_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    recipes = ("-c", "recipe.yaml", "-c", "loggers.yaml")
    try:
        code, stdout, stderr = command("fit", *recipes, "--run_dir=run")
    finally:
        wandb.finish()
    assert code == 0, stderr
    assert SECRET not in stdout + stderr
    left = [path.suffix for path in (project / "run").rglob("*") if path.is_file()]
    assert {".ckpt", ".yaml", ".csv", ".wandb"} <= set(left)
    saved = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "secretive.Module" and "openai_key" not in saved["model"]["init_args"]
    assert files_with(SECRET, project) == []
    config = compose_config([*recipes, "--run_dir=other"])  # what a sweep writes to the recipe of every run
    assert config["model"]["class_path"] == "secretive.Module" and SECRET not in str(config)
    for words in (("-c", "run/config.yaml", "--run_dir=again"), (*recipes, "--run_dir=third")):
        code, printed, stderr = command("fit", *words, "--print_config")
        assert code == 0 and SECRET not in printed + stderr
        assert yaml.safe_load(printed)["model"] == saved["model"]


def test_no_command_prints_a_credential(project: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "secretive.py").write_text(SECRETIVE)
    (project / "loggers.yaml").write_text(LOGGERS)
    monkeypatch.setenv("THE_KEY", SECRET)
    words = ["-c", "recipe.yaml", "-c", "loggers.yaml", "--trainer.logger=false", "--print_config"]
    for name in ("fit", "validate", "test"):
        code, stdout, stderr = command(name, *words)
        assert code == 0 and SECRET not in stdout + stderr and "class_path: secretive.Service" in stdout
        code, stdout, stderr = command(name, "--model.help=secretive.Module")
        assert code == 0 and SECRET not in stdout + stderr and "default: removed" in stdout
    (project / "evaluate.yaml").write_text(EVALUATION)
    code, stdout, stderr = command("evaluate", "--logger.help=secretive.Logger")
    assert code == 0 and SECRET not in stdout + stderr and "default: removed" in stdout
    code, stdout, stderr = command("evaluate", "-c", "evaluate.yaml", "--print_config")
    assert code == 0 and SECRET not in stdout + stderr and "class_path: secretive.Suite" in stdout


def test_an_error_message_holds_no_credential(project: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "secretive.py").write_text(SECRETIVE)
    (project / "loggers.yaml").write_text(LOGGERS)
    monkeypatch.setenv("THE_KEY", SECRET)
    for wrong in ("--model.service=3", "--model.services=x", "--data.no=1"):
        code, stdout, stderr = command("fit", "-c", "recipe.yaml", "-c", "loggers.yaml", wrong)
        assert code == 2 and SECRET not in stdout + stderr
    assert os.environ["THE_KEY"] == SECRET


def test_the_line_of_an_error_is_masked_whoever_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"no answer from https://bob:{SECRET}@host/v1 to Namespace(api_key='{SECRET}')")
    assert capsys.readouterr().err == "error: no answer from https://removed@host/v1 to Namespace(api_key='removed')\n"
