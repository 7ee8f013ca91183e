"""Write the records of outputs: an exported folder, the folder of an evaluation, a sampled file."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_rlhf.hashing import hash_file
from lit_rlhf.lineage.card import write_card
from lit_rlhf.lineage.environment import now, read_environment
from lit_rlhf.lineage.fingerprints import hash_weight_files
from lit_rlhf.lineage.records import Compute, DataInput, LineageRecord, ModelInput, lineage_path, write_record
from lit_rlhf.models.fingerprint import LINEAGE_FILE


class Start(NamedTuple):
    """When a command started."""

    time: str  # UTC, ISO 8601
    clock: float  # time.monotonic()

    @classmethod
    def now(cls) -> "Start":
        """Start now."""
        return cls(now(), time.monotonic())


def make_record(
    role: str,
    start: Start,
    models: Iterable[ModelInput],
    data: Iterable[DataInput],
    *,
    recipe: dict[str, Any],
    command: str,
    configs: tuple[str, ...] = (),
    seed: int | None = None,
) -> LineageRecord:
    """Return the record of what a command on one device has made, without files.

    Args:
        role: "evaluation" or "samples".
        start: of the command.
        models: that it used, with absolute locations.
        data: that it read, likewise.
        recipe: its settings, without credentials.
        command: its command line, without credentials.
        configs: names of recipe and overlays.
        seed: of sampling.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = time.monotonic() - start.clock
    return LineageRecord(
        role,
        Compute(start.time, now(), seconds, seconds),
        models=tuple(models),
        data=tuple(data),
        recipe=recipe,
        configs=configs,
        command=command,
        seed=seed,
        environment=read_environment(device),
    )


def finish_export(
    record: LineageRecord, folder: Path, directory: Path, report: Path | None = None, name: str | None = None
) -> LineageRecord:
    """Add lineage.json and the model card to an exported folder, and return the record with its files.

    Args:
        record: with absolute locations.
        folder: the temporary folder that holds the model.
        directory: the folder that it becomes.
        report: of an evaluation, for the card.
        name: of the model, for the card.
    """
    record = replace(record, files=hash_weight_files(folder, hash_file))
    write_record(record, folder / LINEAGE_FILE, directory)
    write_card(record, folder, directory, report, name)
    return record


def write_output_record(record: LineageRecord, output: Path, files: list[Path]) -> LineageRecord:
    """Write the record of a folder or file, and return it with its files.

    Args:
        record: with absolute locations.
        output: the folder of an evaluation, or a sampled file.
        files: what it holds.
    """
    record = replace(record, files={path.name: hash_file(path) for path in files})
    write_record(record, lineage_path(output))
    return record
