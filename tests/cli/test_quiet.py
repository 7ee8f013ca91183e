"""What is kept off the terminal, and what is not."""

import re
import warnings
from pathlib import Path

from lit_rlhf.commands import quiet

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def advised(metric: str) -> bool:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.quiet()
        warnings.warn(f"It is recommended to use `self.log({metric!r}, ..., sync_dist=True)` when …", stacklevel=1)
    return bool(seen)


def test_lightning_advises_to_sync_a_users_metrics_and_not_ours():
    """Ours are of all ranks before they are logged; `train/` are logged by step, which brings no advice."""
    assert advised("mine/loss")
    for begun in set(re.findall(r"^\| `(\w+)/", PAGE, re.MULTILINE)) - {"train"}:
        assert not advised(f"{begun}/any"), begun
