"""Damaged checkpoints are refused; `last` is the highest step of the run that wrote last."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.checkpoint_files import DamagedCheckpoint
from lit_rlhf.checkpoints import AtomicCheckpointIO, check_intact, find_last_checkpoint, summarize_checkpoint


def content(step: int, run: str = "a", **more: Any) -> dict[str, Any]:
    state = {"state_dict": {"w": torch.arange(1000.0)}, "optimizer_states": [], "loops": {}, "global_step": step}
    return state | {"run": {"id": run}} | more


def write(path: Path, step: int, run: str = "a", age: float = 0.0) -> Path:
    AtomicCheckpointIO().save_checkpoint(content(step, run), path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write(tmp_path / "last.ckpt", 1)
    (tmp_path / ".last.ckpt.1234.part").write_text("of a run that was killed")
    (tmp_path / ".other").write_text("")

    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpointIO().save_checkpoint(content(2), path)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".other", "last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 1


def test_a_damaged_file_is_refused_by_name(tmp_path):
    for damage in ("cut", "flipped", "empty"):
        path = write(tmp_path / f"{damage}.ckpt", 1)
        data = bytearray(path.read_bytes())
        if damage == "flipped":  # within the tensor, where torch.load sees nothing
            data[data.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
            path.write_bytes(data)
            assert summarize_checkpoint(path).step == 1
        else:
            path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
        for read in (check_intact, AtomicCheckpointIO().load_checkpoint):
            with pytest.raises(DamagedCheckpoint, match=f"ckpt_path: .*{damage}.ckpt is damaged .*take another"):
                read(path)


def test_last_is_the_highest_step_of_the_run_that_wrote_last(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one / "step=900.ckpt", 900, "an earlier run", age=50)
    write(one / "step=20.ckpt", 20, age=9)
    wanted = write(two / "b.ckpt", 30, age=8)
    write(one / "best.ckpt", 10, age=1)  # a file may be touched later than a better one
    assert find_last_checkpoint([one, two, one])[0].path == wanted
    wanted.write_bytes(wanted.read_bytes()[:-10])
    found, skipped = find_last_checkpoint([one, two])
    assert found.path == one / "step=20.ckpt" and len(skipped) == 1 and "b.ckpt" in skipped[0]


def test_checkpoints_that_cannot_be_resumed_are_skipped(tmp_path):
    weights = content(5)
    del weights["optimizer_states"]
    torch.save(weights, tmp_path / "weights.ckpt")
    torch.save({"w": 1}, tmp_path / "other.ckpt")
    shards = tmp_path / "shards.ckpt"
    shards.mkdir()
    (shards / ".metadata").touch()
    assert find_last_checkpoint([tmp_path, tmp_path / "missing"])[0] is None
    assert len(find_last_checkpoint([tmp_path])[1]) == 3
    torch.save(content(7), shards / "meta.pt")
    assert find_last_checkpoint([tmp_path])[0][:2] == (shards, 7)
