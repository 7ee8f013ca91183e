import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.synthetic import build
from lit_rlhf.synthetic.build import SyntheticDataPaths, write_synthetic_data
from lit_rlhf.synthetic.tasks import TaskPrompt

SMALL = {
    "PRETRAINING_DOCUMENTS": 400,
    "PRETRAINING_VALIDATION_DOCUMENTS": 40,
    "DEMONSTRATIONS": 200,
    "DEMONSTRATIONS_VALIDATION": 20,
    "REWARD_PROMPTS": 300,
    "PPO_PROMPTS": 400,
    "EVALUATION_PROMPTS": 128,
}


@pytest.fixture(scope="session")
def write_small_world() -> Callable[[Path, int], SyntheticDataPaths]:
    def write(folder: Path, seed: int) -> SyntheticDataPaths:
        with pytest.MonkeyPatch.context() as patch:
            for name, size in SMALL.items():
                patch.setattr(build, name, size)
            return write_synthetic_data(folder, seed)

    return write


@pytest.fixture(scope="session")
def world(
    tmp_path_factory: pytest.TempPathFactory, write_small_world: Callable[[Path, int], SyntheticDataPaths]
) -> SyntheticDataPaths:
    return write_small_world(tmp_path_factory.mktemp("world"), 0)


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., TaskPrompt]:
    """Make a prompt from a task, the question and the facts."""

    def make(task: str, ask: str, **facts: Any) -> TaskPrompt:
        return TaskPrompt(f"ask : {ask} reply :", task, json.dumps(facts))

    return make
