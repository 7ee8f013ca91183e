"""What is recorded of a module's settings, and what comes back."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.generation import SamplingParams
from lit_rlhf.hyperparameters import describe, restore_settings
from lit_rlhf.models import LoRA
from lit_rlhf.rewards import FunctionReward, ScaledReward
from lit_rlhf.rollout import GAE, AdaptiveKLController


def score(*_: Any) -> list[float]:
    return [0.0]


SETTINGS = {
    "a path": Path("runs/model"),
    "numbers": [1, 2.5, None, True],
    "a dataclass": SamplingParams(max_new_tokens=7, stop_strings=["."]),
    "nested": {"adapter": LoRA(rank=3)},
    "an object": AdaptiveKLController(0.1, 3.0, 500),
    "an estimator": GAE(),
}


def test_plain_settings_come_back() -> None:
    described = {name: describe(value) for name, value in SETTINGS.items()}
    assert json.loads(json.dumps(described)) == described
    restored = restore_settings(described, {}, "Module")
    assert restored["a path"] == "runs/model" and restored["numbers"] == [1, 2.5, None, True]
    for name in ("a dataclass", "nested"):
        assert restored[name] == SETTINGS[name]
    for name in ("an object", "an estimator"):
        assert type(restored[name]) is type(SETTINGS[name]) and vars(restored[name]) == vars(SETTINGS[name])


@pytest.mark.parametrize(
    "value",
    [
        score,
        lambda: 0,
        FunctionReward(score),
        ScaledReward(FunctionReward(score), 1.0, 2.0),
        torch.nn.Linear(2, 2),
        pandas.DataFrame({"a": [1]}),
        {"deep": [{"down": score}]},
        object(),
    ],
)
def test_objects_are_recorded_by_name_and_asked_for_again(value: Any) -> None:
    described = describe(value)
    assert json.loads(json.dumps(described)) == described
    with pytest.raises(UserError, match=r"Module.load_from_checkpoint: .* give them again: reward= \(it was "):
        restore_settings({"reward": described, "other": 1}, {}, "Module")
    assert restore_settings({"reward": described, "other": 1}, {"reward": value}, "Module") == {"other": 1}


def test_a_checkpoint_runs_no_other_code() -> None:
    for path in ("os.system", "lit_rlhf.cli.main", "tests.test_hyperparameters.score"):
        with pytest.raises(UserError):
            restore_settings({"kl": {"class_path": path, "init_args": {}}}, {}, "Module")
