"""The stand-in for a vLLM server answers as a real one did, by a recording (`tests/helpers/vllm_recording.py`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.generation.vllm_server import read_settings, read_shape
from lit_rlhf.http import find_message
from tests.helpers.vllm_models import CONFIGS
from tests.helpers.vllm_recording import EXCHANGES, MAX_MODEL_LEN, MODEL, RECORDING, Answer, play, write_folders
from tests.helpers.vllm_server import serve_vllm

RECORDED = {name: Answer(**answer) for name, answer in json.loads(RECORDING.read_text()).items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[dict[str, Answer]]:
    folders = write_folders(Path(tmp_path_factory.mktemp("folders")), tokenizer)
    with serve_vllm(folders["start"], max_model_len=MAX_MODEL_LEN) as (service, _):
        yield play(service.url, folders)


def is_random(name: str) -> bool:
    """Whether tokens are sampled: both draw with noise of their own."""
    return name == "two samples"


def assert_alike(ours: Any, theirs: Any, path: str, values: bool) -> None:
    """Every key of ours is in theirs, with a value of the same kind; and the same one, where `values` says so."""
    if isinstance(ours, dict):
        assert isinstance(theirs, dict), path
        for key, value in ours.items():
            if key in ("id", "created", "rank", "text"):
                continue
            assert key in theirs, f"{path}.{key}"
            assert_alike(value, theirs[key], f"{path}.{key}", values)
    elif isinstance(ours, list):
        assert isinstance(theirs, list) and (not values or len(ours) == len(theirs)), path
        for index, (one, other) in enumerate(zip(ours, theirs)):
            assert_alike(one, other, f"{path}[{index}]", values)
    elif isinstance(ours, float):
        assert isinstance(theirs, float) and (not values or ours == pytest.approx(theirs, abs=1e-3)), path
    else:
        assert type(ours) is type(theirs) and (not values or ours == theirs), f"{path}: {ours!r}, {theirs!r}"


def test_everything_is_recorded() -> None:
    assert list(RECORDED) == [name for name, _, _ in EXCHANGES]


@pytest.mark.parametrize("name", [name for name, _, _ in EXCHANGES])
def test_an_answer_is_like_the_recorded_one(name, answers):
    ours, theirs = answers[name], RECORDED[name]
    assert ours.status == theirs.status, f"{ours}\n{theirs}"
    if ours.status != 200:
        assert bool(find_message(ours.body)) and bool(find_message(theirs.body))
    elif isinstance(ours.body, str):
        assert isinstance(theirs.body, str) and bool(ours.body) == bool(theirs.body)
    elif name in ("settings", "shape"):
        read = read_settings if name == "settings" else read_shape
        assert read(ours.body) == read(theirs.body)
    else:
        body = dict(ours.body)
        if "choices" in body:
            body["choices"] = sorted(body["choices"], key=lambda choice: choice["index"])
        assert_alike(body, theirs.body, name, values=not is_random(name))


def test_a_real_server_tells_the_sizes_of_its_model() -> None:
    config = CONFIGS[MODEL]
    sizes = {
        "vocab_size": config.vocab_size,
        "embedding_dim": config.hidden_size,
        "layers": config.num_hidden_layers,
    }
    assert read_shape(RECORDED["shape"].body) == sizes


@pytest.mark.parametrize(
    "other",
    ["(2-3): 2 x PPMissingLayer()", "(2): DifferentLayer()", "(2-3, 6): 3 x DifferentLayer()"],
)
def test_layers_of_several_groups_are_not_counted(other) -> None:
    """A worker of a pipeline lists the others' layers as missing; a model may have layers of two kinds."""
    text = RECORDED["shape"].body["results"][0]
    end = "\n    )\n    (norm)"  # of the list of layers
    assert text.count(end) == 1
    assert "layers" in read_shape({"results": [text]})
    found = read_shape({"results": [text.replace(end, f"\n      {other}{end}")]})
    assert found.keys() == {"vocab_size", "embedding_dim"}
    assert read_shape({"results": [text.replace("(0-1): 2 x ", "(0): ")]})["layers"] == 1
