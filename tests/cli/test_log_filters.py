"""Which library warnings reach the terminal."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_rlhf.commands import fit
from lit_rlhf.commands.support import log_filters, recipe_cli

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def warns(metric: str) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_filters.install_log_filters()
        warnings.warn(f"It is recommended to use `self.log({metric!r}, ..., sync_dist=True)` when …", stacklevel=1)
    return bool(caught)


def test_the_sync_dist_warning_is_shown_for_a_users_metrics_only():
    """Ours are reduced over ranks before they are logged; `train/` are logged per step, without a warning."""
    assert warns("mine/loss")
    for prefix in set(re.findall(r"^\| `(\w+)/", PAGE, re.MULTILINE)) - {"train"}:
        assert not warns(f"{prefix}/any"), prefix


@pytest.mark.parametrize("words, is_short", [([], True), (["-v"], False)])
def test_a_warning_of_a_run_has_no_place_in_a_library(
    words: list[str], is_short: bool, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    formats: list[Any] = []

    def run(*_: Any) -> SimpleNamespace:
        formats.append(warnings.formatwarning)
        return SimpleNamespace(exit_code=0)

    def with_place(*_: Any) -> str:
        return ""

    # what the import of Lightning does
    monkeypatch.setattr(fit, "import_named_classes", lambda _: setattr(warnings, "formatwarning", with_place))
    monkeypatch.setattr(recipe_cli, "RecipeCLI", run)
    assert command("fit", "-c", "small/sft", *words)[0] == 0
    assert formats == [log_filters.format_warning if is_short else with_place]
