"""Null below a dataclass reaches it, in place of Python's None as a text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


@pytest.mark.parametrize(
    "words",
    [
        ["sampling.top_p=null"],
        ["sampling.top_p=0.5", "sampling.top_p=null"],
        ["sampling.missing_eos.score=1.0", "sampling.missing_eos.score=null"],
        ["loading.pad_token=null"],
        ["loading.pad_token=<|pad|>", "loading.pad_token=null"],
        ["sampling.stop_strings=[null_and_void]", "sampling.missing_eos=null"],
    ],
)
def test_null_reaches_the_setting_of_a_dataclass(words: list[str], stages: Path, command: Callable) -> None:
    code, out, err = command("fit", "-c", "ppo.yaml", *(f"--model.{word}" for word in words), "--print_config")
    assert code == 0, err
    value = yaml.safe_load(out)["model"]["init_args"]
    for name in words[-1].partition("=")[0].split("."):
        value = value[name]
    assert value is None
