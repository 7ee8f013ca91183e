"""Which library warnings reach the terminal."""

import re
import warnings
from pathlib import Path

from lit_rlhf.commands.support import log_filters

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
