"""`lit-rlhf workspace`: its metrics exist, the view that W&B gets has these panels, and what is missing is one line."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rlhf.commands.workspace import SECTIONS, Plot, TablePanel
from lit_rlhf.loggers import ITERATION
from tests.cli.test_errors import error_lines
from tests.helpers.pages import ROOT
from tests.helpers.wandb_server import ENTITY, serve_wandb

PLOTS = [panel for panels in SECTIONS.values() for panel in panels if isinstance(panel, Plot)]


def test_every_metric_is_one_of_the_documentation() -> None:
    documented = set(re.findall(r"`([\w/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for plot in PLOTS:
        assert {*plot.metrics, plot.x} <= documented | {"trainer/global_step"}
    tables = [panel.name for panels in SECTIONS.values() for panel in panels if isinstance(panel, TablePanel)]
    for name in tables:
        assert f"| `{name}` |" in (ROOT / "docs" / "wandb.md").read_text()


def test_the_page_lists_every_panel() -> None:
    page = (ROOT / "docs" / "wandb.md").read_text()
    section = page.split("## A workspace")[1].split("\n## ")[0]
    rows = {row.split("|")[1].strip(): row for row in section.splitlines() if row.startswith("| ")}
    for title, panels in SECTIONS.items():
        names = {name for panel in panels for name in (panel.metrics if isinstance(panel, Plot) else [panel.name])}
        assert names <= set(re.findall(r"`([\w/]+)`", rows[title])), title


def test_the_saved_view_has_the_panels(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra lit-rlhf[workspace] is not installed")
    with serve_wandb(monkeypatch) as server:
        code, out, err = command("workspace", "--project", "p")
        assert code == 0, err
        (view,) = server.views
        assert out.startswith(f"saved: {server.url}/{ENTITY}/p?nw=")
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "p", "RLHF")
    section = json.loads(view["spec"])["section"]
    assert [each["name"] for each in section["runSets"][0]["grouping"]] == ["group", "jobType"]
    sections = section["panelBankConfig"]["sections"]
    assert [each["name"] for each in sections] == list(SECTIONS) and all(each["isOpen"] for each in sections)
    configs = [panel["config"] for each in sections for panel in each["panels"]]
    drawn = [(tuple(config["metrics"]), config["xAxis"]) for config in configs if "metrics" in config]
    assert drawn == [(plot.metrics, plot.x) for plot in PLOTS]
    text = json.dumps([config for config in configs if "metrics" not in config])
    assert '"samples"' in text and '"validation_samples"' in text


def test_a_refusal_is_one_line(command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra lit-rlhf[workspace] is not installed")
    with serve_wandb(monkeypatch) as server:
        server.fails["UpsertView2"] = "permission denied"
        code, _, err = command("workspace", "--entity", "others")
        (line,) = error_lines(err)
        assert code == 2 and "permission denied" in line and "--entity" in line
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name)
    code, _, err = command("workspace")
    (line,) = error_lines(err)
    assert code == 2 and "wandb login" in line


def test_a_missing_package_is_named(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    code, _, err = command("workspace")
    (line,) = error_lines(err)
    assert code == 2 and line.endswith("pip install 'lit-rlhf[workspace]'")


def test_ppo_is_drawn_over_iterations() -> None:
    of_ppo = [plot for plot in PLOTS if plot.metrics[0].startswith(("policy/", "response/", "advantage/"))]
    assert of_ppo and all(plot.x == ITERATION for plot in of_ppo)
