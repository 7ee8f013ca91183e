"""Sampled outputs become the tasks that a file of the same outputs would become."""

from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.labeling import model_samples
from lit_rlhf.labeling.database import Kind
from lit_rlhf.labeling.model_samples import SampleSettings, sample_tasks
from lit_rlhf.labeling.tasks import TaskFile, read_tasks
from tests.helpers.small_runs import write_rows

PROMPTS: list[dict[str, Any]] = [
    {"id": "p1", "prompt": "why?", "topic": "a", "sensitive": "violence"},
    {"id": "p2", "instruction": "do it", "input": "to this"},
    {"id": "p3", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "sensitive": True},
]


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sample tasks to rows of prompts; the responses of each model are given."""

    def to_tasks(rows: list[dict[str, Any]], kind: Kind | None, **responses: list[list[str]]) -> TaskFile:
        def written(name: str, records: Any, settings: SampleSettings) -> list[list[str]]:
            assert len(records) == len(responses[name])
            return responses[name]

        monkeypatch.setattr(model_samples, "_sample", written)
        samples = len(next(iter(responses.values()))[0])
        path = write_rows(tmp_path / "prompts.jsonl", rows)
        return sample_tasks(list(responses), path, kind, SampleSettings(samples))

    return to_tasks


@pytest.mark.parametrize("kind", ["rank", "rate", "compare"])
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_tasks_are_those_of_a_file_with_the_same_outputs(tmp_path: Path, sample: Any, kind: Kind, number: int):
    texts = ["one", "two", "three"][: 2 if kind == "compare" else 3]
    row = PROMPTS[number]
    sampled = sample([row], kind, m=[texts])
    write_rows(tmp_path / "file.jsonl", [{**row, "completions": texts, "models": ["m"] * len(texts)}])
    expected = read_tasks(str(tmp_path / "file.jsonl"), kind)
    assert [(each.key, each.content) for each in sampled.tasks] == [(each.key, each.content) for each in expected.tasks]
    assert sampled.kind == expected.kind == kind
    assert all(("sensitive" in each.content) == ("sensitive" in row) for each in sampled.tasks)


def test_equal_outputs_become_one_of_the_model_that_wrote_it_first(sample: Any):
    file = sample([{"prompt": "p"}], None, a=[["x", "y", ""]], b=[["y", "z", "x"]])
    (task,) = file.tasks
    assert (file.kind, task.content["completions"], task.content["models"]) == (
        "rank",
        ["x", "y", "z"],
        ["a", "a", "b"],
    )
    assert file.notes == ["3 of 6 responses were empty or equal to another of their prompt"]


def test_one_output_left_to_rate_has_the_key_of_its_row(sample: Any):
    file = sample([{"id": 7, "prompt": "p"}, {"id": 8, "prompt": "q"}], "rate", m=[["x", "x"], ["x", "y"]])
    assert [task.key for task in file.tasks] == ["7", "8#1", "8#2"]


def test_a_prompt_with_too_few_different_outputs_is_counted(sample: Any):
    file = sample([{"prompt": "p"}, {"prompt": "q"}], "compare", m=[["x", "x"], ["x", "y"]])
    assert [task.content["fields"] for task in file.tasks] == [{"prompt": "q"}]
    assert file.notes[-1] == "1 of 2 prompts left out: fewer than 2 different responses"
    with pytest.raises(UserError, match=r"no task is left of .*: raise --temperature or --samples"):
        sample([{"prompt": "p"}], "compare", m=[["x", "x"]])


def test_an_empty_prompt_is_left_out_and_counted(sample: Any):
    file = sample([{"prompt": "p"}, {"prompt": " "}], "compare", m=[["x", "y"]])
    assert len(file.tasks) == 1 and file.notes == ["1 of 2 rows left out: empty prompt (first: prompts.jsonl:2)"]


def test_repeated_prompts_with_other_outputs_are_tasks_of_their_own(sample: Any):
    file = sample([{"prompt": "p"}] * 3, "compare", m=[["x", "y"], ["x", "z"], ["x", "y"]])
    assert len(file.tasks) == 2 and file.notes == ["1 rows repeat an earlier one and are left out"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "b"}, r"prompts\.jsonl:2: no column 'prompt'"),
        ({"id": "a", "prompt": "q"}, r"prompts\.jsonl:2: the id 'a' is that of prompts\.jsonl:1"),
        ({"prompt": "q"}, r"prompts\.jsonl:2: the id is None"),
        ({"id": "b", "prompt": "q", "sensitive": 3}, r"prompts\.jsonl:2: column 'sensitive' must be"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: dict[str, Any], message: str
):
    monkeypatch.setattr(model_samples, "_sample", lambda *args: pytest.fail("sampled"))
    path = write_rows(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "p"}, bad])
    with pytest.raises(UserError, match=message):
        sample_tasks(["m"], path, None, SampleSettings(4))
