"""A file is hashed once until it changes; what is recorded of models and data."""

import os
from pathlib import Path

import pytest

from lit_rlhf.data.report import DatasetReport
from lit_rlhf.hashing import hash_file
from lit_rlhf.lineage import fingerprints
from lit_rlhf.lineage.fingerprints import (
    cached_hash_file,
    describe_data_input,
    describe_model_input,
    remember_hashes,
)
from lit_rlhf.lineage.records import DataInput
from lit_rlhf.lineage.settings import find_files
from lit_rlhf.lineage.tree import resolve_input
from lit_rlhf.models.fingerprint import loaded_model_fingerprint, model_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig


@pytest.fixture
def read_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and the files that are read to be hashed."""
    read: list[Path] = []
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "hash_file", lambda file: (read.append(file), hash_file(file))[1])
    return read


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, read_files: list[Path]) -> None:
    file = tmp_path / "w.bin"
    file.write_text("one")
    assert cached_hash_file(file) == cached_hash_file(file) == hash_file(file)
    assert len(read_files) == 1
    file.write_text("two")
    assert cached_hash_file(file) == hash_file(file)
    os.utime(file, ns=(1, 1))
    cached_hash_file(file)
    assert len(read_files) == 3
    file.write_text("longer")
    os.utime(file, ns=(1, 1))
    assert cached_hash_file(file) == hash_file(file), "a copy may keep the time"


def test_a_known_hash_spares_the_first_read(tmp_path: Path, read_files: list[Path]) -> None:
    (tmp_path / "w.bin").write_text("one")
    remember_hashes(tmp_path, {"w.bin": "known"})
    assert cached_hash_file(tmp_path / "w.bin") == "known" and not read_files


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    assert cached_hash_file(tmp_path / "file") == hash_file(tmp_path / "file")


def test_the_record_of_a_model(tmp_path: Path, llama: str) -> None:
    described = describe_model_input("starting model", llama)
    assert described.fingerprint == model_fingerprint(llama, ModelLoadingConfig())
    assert set(described.files) == {"config.json", "generation_config.json", "model.safetensors"} & set(described.files)
    assert "model.safetensors" in described.files and "tokenizer.json" not in described.files
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_text("x")
    described = describe_model_input("reward model 1", str(checkpoint))
    assert described.files == {"last.ckpt": hash_file(checkpoint)}
    assert described.fingerprint == f"sha256 {hash_file(checkpoint)}"


def test_the_record_of_data(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("{}\n" * 3)
    report = DatasetReport(str(file))
    report.num_read = 3
    report.skip("empty", "d.jsonl:1")
    described = describe_data_input("prompts", str(file), report)
    assert (described.rows_read, described.rows_kept, described.fingerprint) == (3, 2, f"sha256 {hash_file(file)}")
    assert described.location == str(file.resolve())
    unread = describe_data_input("prompts", str(file), DatasetReport(str(file)))
    assert (unread.rows_read, unread.rows_kept) == (None, None), "not counted"
    hub = describe_data_input("prompts", "org/data:config@train")
    assert (hub.fingerprint, hub.location, hub.rows_kept) == ("", "", None)


def test_a_lineage_does_not_change_what_a_model_computes(tmp_path: Path, llama: str) -> None:
    """Cached results of an evaluation stay valid when a model is exported again."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(llama).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = (
        loaded_model_fingerprint(str(copy), ModelLoadingConfig()),
        model_fingerprint(str(copy), ModelLoadingConfig()),
    )
    (copy / "lineage.json").write_text("{}")
    (copy / "README.md").write_text("#")
    assert before == (
        loaded_model_fingerprint(str(copy), ModelLoadingConfig()),
        model_fingerprint(str(copy), ModelLoadingConfig()),
    )


def test_a_name_like_the_home_of_nobody_is_a_name(tmp_path: Path) -> None:
    assert find_files({"path": "~no-such-user"}) == []
    assert describe_data_input("rows", "~no-such-user").location == ""
    assert resolve_input(DataInput("rows", "~no-such-user", "", location="gone"), tmp_path) is None
