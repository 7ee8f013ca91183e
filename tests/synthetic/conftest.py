import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.synthetic.build import SyntheticDataPaths, SyntheticDataSizes, write_synthetic_data
from lit_rlhf.synthetic.tasks import TaskPrompt

SMALL = SyntheticDataSizes(
    pretraining_documents=400,
    pretraining_validation_documents=40,
    demonstrations=200,
    demonstrations_validation=20,
    reward_prompts=300,
    ppo_prompts=400,
    evaluation_prompts=128,
)


@pytest.fixture(scope="session")
def write_small_world() -> Callable[[Path, int], SyntheticDataPaths]:
    def write(folder: Path, seed: int) -> SyntheticDataPaths:
        return write_synthetic_data(folder, seed, SMALL)

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
