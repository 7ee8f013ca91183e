"""lineage.json: what is written is read back, its locations move with the tree, damage is one line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_file, hash_files
from lit_rlhf.lineage.records import (
    Compute,
    DataInput,
    Environment,
    LineageRecord,
    ModelInput,
    RunReference,
    combine_hashes,
    lineage_path,
    read_record,
    write_record,
)

RECORD = LineageRecord(
    "ppo",
    Compute("2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00", 60.0, 120.0, 10, 8.64e19, 2),
    files={"model.safetensors": "00"},
    models=(ModelInput("starting policy", "org/name", "commit abc"),),
    data=(DataInput("prompts", "org/data", "", 10, 9),),
    recipe={"run_dir": "runs/ä"},
    configs=("small/ppo", "logger/wandb"),
    command="lit-rlhf fit -c small/ppo",
    seed=3,
    environment=Environment("abc", True, {"torch": "2"}, "2 x GPU"),
    metrics={"reward/score": 1.5},
    wandb=RunReference("p", "id", "e", "u", "g", "g-ppo", ("latest",), "r"),
)


def test_a_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    digest = write_record(RECORD, tmp_path / "lineage.json")
    assert read_record(tmp_path) == RECORD
    assert digest == hash_file(tmp_path / "lineage.json")
    assert [path.name for path in tmp_path.iterdir()] == ["lineage.json"], "a temporary file is left"


def test_a_record_of_a_file_stands_beside_it(tmp_path: Path) -> None:
    sampled = tmp_path / "best.jsonl"
    sampled.write_text("{}")
    assert read_record(sampled) is None
    write_record(RECORD, lineage_path(sampled))
    assert (tmp_path / "best.jsonl.lineage.json").is_file() and read_record(sampled) == RECORD


def test_locations_are_relative_to_the_folder_that_the_record_will_be_in(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    record = replace(RECORD, data=(DataInput("prompts", "data.jsonl", "00", location=str(data)),))
    (tmp_path / "part").mkdir()
    write_record(record, tmp_path / "part" / "lineage.json", tmp_path / "runs" / "ppo" / "model")
    content = json.loads((tmp_path / "part" / "lineage.json").read_text())
    assert content["data"][0]["location"] == os.path.join("..", "..", "..", "data.jsonl")
    assert content["models"][0]["location"] == "", "a hub name has none"


def test_a_write_that_fails_leaves_the_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(RECORD, tmp_path / "lineage.json")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(replace(RECORD, seed=4), tmp_path / "lineage.json")
    assert read_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["lineage.json"]


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"format": 99}', '{"format": 1}', "\xff"])
def test_a_damaged_record_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"lineage\.json: not a lineage of this version"):
        read_record(tmp_path)


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    write_record(replace(RECORD, format=99), tmp_path / "lineage.json")
    with pytest.raises(UserError, match="format 99, expected"):
        read_record(tmp_path)


def test_the_fingerprint_is_that_of_the_models(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("config.json", "model.safetensors")]
    for path in files:
        path.write_text(path.name)
    assert combine_hashes({path.name: hash_file(path) for path in reversed(files)}) == f"sha256 {hash_files(files)}"


def test_a_petaflop_day_is_that_of_the_paper() -> None:
    """Section 5: 3,640 petaflop/s-days for GPT-3: 175B parameters, 300B tokens, 6 operations for each pair of them."""
    gpt3 = replace(RECORD.compute, flops=6 * 175e9 * 300e9)
    assert gpt3.petaflop_days == pytest.approx(3640, rel=0.01)
    assert replace(gpt3, flops=None).petaflop_days is None
