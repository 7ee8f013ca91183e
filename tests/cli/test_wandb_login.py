"""W&B: its refusals are one line before anything is written; without a login or a network the run is offline."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rlhf.commands.support import wandb_login
from lit_rlhf.commands.support.wandb_login import prepare_wandb
from tests.cli.test_errors import error_lines
from tests.helpers.services import Reply, refused_url, serve, silent_url

KEY = "0123456789" * 4
LOGGER = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the settings and the service that an earlier test of this process started W&B with."""
    import wandb

    wandb.teardown()
    for name in ("WANDB_SERVICE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "setting, value, reason",
    [
        ("project", "team/rlhf", "Invalid project name 'team/rlhf'"),
        ("project", "a" * 129, "exceeded 128 characters"),
        ("version", "run/1?a", "Run ID cannot contain the characters"),
        ("id", " a", "Run ID cannot start or end with whitespace"),
    ],
)
def test_what_wandb_refuses_is_one_line_before_anything_is_written(
    project: Path, command, setting: str, value: str, reason: str
) -> None:
    before = sorted(project.iterdir())
    code, _, stderr = command(
        "fit", "-c", "recipe.yaml", LOGGER, f"--trainer.logger.{setting}={value}", "--run_dir=run"
    )
    (line,) = error_lines(stderr)
    assert code == 2 and line.startswith(f"error: trainer.logger.{setting}: ") and reason in line
    assert [path for path in sorted(project.iterdir()) if path.name not in ("__pycache__", "run")] == before
    assert not any((project / "run").glob("*"))


def test_a_key_that_wandb_refuses_is_one_line(project: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setenv("WANDB_MODE", "online")
    code, _, stderr = command("fit", "-c", "recipe.yaml", LOGGER, "--trainer.logger.save_dir=.")
    line = next(line for line in stderr.splitlines() if line.startswith("error: "))
    assert code == 2 and "trainer.logger: Weights & Biases refuses" in line and "WANDB_API_KEY" in line


def test_wandbs_own_settings_are_checked(tmp_path: Path) -> None:
    from lit_rlhf.errors import UserError

    for wrong in ({"WANDB_MODE": "sometimes"}, {"WANDB_BASE_URL": "no address"}):
        with pytest.raises(UserError, match="Weights & Biases refuses its own settings"):
            prepare_wandb({"HOME": str(tmp_path), **wrong}, "trainer.logger", {})


@pytest.mark.parametrize("serve_nothing", [refused_url, silent_url])
def test_without_a_network_the_run_is_offline_within_seconds(
    serve_nothing: Callable, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_login, "TIMEOUT", 0.5)
    with serve_nothing() as url:
        environ = {"HOME": str(tmp_path), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
        prepare_wandb(environ, "trainer.logger", {})
        assert environ["WANDB_MODE"] == "offline"
        assert capsys.readouterr().out == (
            f"wandb: no answer from {url} within 0.5 s, so this run is recorded offline; wandb sync uploads it after "
            "wandb login\n"
        )


def test_a_run_without_a_network_ends_offline(project: Path) -> None:
    """In a process of its own: W&B reads its settings once per process."""
    start = time.monotonic()
    with silent_url() as url:
        environ = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_MODE": "", "WANDB_BASE_URL": url}
        command = [sys.executable, "-m", "lit_rlhf", "fit", "-c", "recipe.yaml", LOGGER, "--run_dir=run"]
        done = subprocess.run(command, env=environ, cwd=project, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()  # the summary repeats the command for later
    lines = [line for line in said if "wandb" in line.lower() and "wandb sync run/" not in line]
    assert len(lines) == 1, lines
    (line,) = lines
    assert done.returncode == 0 and "so this run is recorded offline" in line, done.stderr
    assert time.monotonic() - start < 80, "W&B itself waits for 90 s"
    assert list((project / "run").rglob("offline-run-*/*.wandb"))


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_login, "TIMEOUT", 0.2)
    monkeypatch.setattr(wandb_login, "build_opener", lambda *_: time.sleep(30))
    start = time.monotonic()
    assert not wandb_login.is_reachable("https://api.wandb.ai", {})
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_any_answer_is_a_network(status: int, tmp_path: Path, capsys) -> None:
    with serve(lambda *_: Reply({}, status=status)) as service:
        environ = {"HOME": str(tmp_path), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": service.url}
        prepare_wandb(environ, "trainer.logger", {})
    assert "WANDB_MODE" not in environ and capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [None, 40])
def test_without_a_login_the_run_is_offline(
    width: int | None, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_login, "terminal_width", lambda _: width)
    environ = {"HOME": str(tmp_path)}
    prepare_wandb(environ, "trainer.logger", {})
    assert environ["WANDB_MODE"] == "offline"
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(line.strip() for line in lines).startswith("wandb: no login found, so this run is recorded offline")
    assert max(map(len, lines)) <= 40 if width else len(lines) == 1


@pytest.mark.parametrize("where", [".netrc", ".config/wandb/settings", "identity"])
def test_a_login_is_found_wherever_wandb_finds_it(where: str, tmp_path: Path, capsys) -> None:
    with serve(lambda *_: Reply({})) as service:
        host = service.url.removeprefix("http://")
        texts = {".netrc": f"machine {host} login user password {KEY}\n", "identity": ""}
        file = tmp_path / where
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(texts.get(where, f"[default]\nbase_url = {service.url}\napi_key = {KEY}\n"))
        file.chmod(0o600)
        environ = {"HOME": str(tmp_path), "WANDB_BASE_URL": service.url}
        environ |= {"WANDB_IDENTITY_TOKEN_FILE": str(file)} if where == "identity" else {}
        before = dict(environ)
        prepare_wandb(environ, "trainer.logger", {})
    assert environ == before and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "environ, logger",
    [
        ({"WANDB_MODE": "online"}, {}),
        ({"WANDB_MODE": "disabled"}, {}),
        ({}, {"offline": True}),
        ({}, {"mode": "online"}),
    ],
)
def test_a_chosen_mode_wins(environ: dict[str, str], logger: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(wandb_login, "is_reachable", lambda *_: pytest.fail("asked for the network"))
    environ = {"HOME": str(tmp_path), **environ}
    before = dict(environ)
    prepare_wandb(environ, "trainer.logger", logger)
    assert environ == before and capsys.readouterr().out == ""


def test_a_mode_in_wandbs_settings_file_wins(tmp_path: Path, capsys) -> None:
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
    environ = {"HOME": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    prepare_wandb(environ, "trainer.logger", {})
    assert "WANDB_MODE" not in environ and os.environ.get("WANDB_MODE") != "offline"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "logger, environ, mode, started",
    [
        ({"class_path": "a.WandbLogger"}, {}, None, True),
        ([{"class_path": "a.CSVLogger"}, {"class_path": "a.WandbLogger"}], {}, None, True),
        ({"class_path": "a.WandbLogger", "init_args": {"offline": True}}, {}, "dryrun", True),
        ({"class_path": "a.WandbLogger"}, {"LOCAL_RANK": "1"}, None, False),
        ({"class_path": "a.WandbLogger"}, {"WANDB_MODE": "disabled"}, "disabled", False),
        ([{"class_path": "a.CSVLogger"}], {}, None, False),
        (False, {}, None, False),
    ],
)
def test_the_service_starts_in_the_background_on_rank_zero(
    logger: object, environ: dict[str, str], mode: str | None, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    calls = list[threading.Thread]()
    called = threading.Event()

    def setup() -> None:
        calls.append(threading.current_thread())
        called.set()
        raise OSError("no process can be started: the run says so")

    monkeypatch.setattr(wandb, "setup", setup)
    wandb_login.start_service(logger, environ)
    assert called.wait(10 if started else 0) is started and environ.get("WANDB_MODE") == mode
    assert all(thread is not threading.current_thread() for thread in calls)
