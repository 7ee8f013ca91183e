import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.synthetic import build
from lit_rlhf.synthetic.build import WorldPaths, write_world
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
def write_small_world() -> Callable[[Path, int], WorldPaths]:
    def write(folder: Path, seed: int) -> WorldPaths:
        with pytest.MonkeyPatch.context() as patch:
            for name, size in SMALL.items():
                patch.setattr(build, name, size)
            return write_world(folder, seed)

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, write_small_world: Callable[[Path, int], WorldPaths]) -> WorldPaths:
    return write_small_world(tmp_path_factory.mktemp("world"), 0)


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., TaskPrompt]:
    """A prompt by hand: task, the question, and the facts."""

    def make(task: str, ask: str, **facts: Any) -> TaskPrompt:
        return TaskPrompt(f"ask : {ask} reply :", task, json.dumps(facts))

    return make
