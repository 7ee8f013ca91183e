"""The record that is written beside everything that is made: `lineage.json`, as frozen dataclasses."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.models.fingerprint import LINEAGE_FILE
from lit_rlhf.paths import written_whole

FORMAT = 1
LINEAGE_KEY = "lineage"  # of the record in a Lightning checkpoint
PETAFLOP_DAY = 1e15 * 86400  # operations in a petaflop/s-day, the unit of the paper's section 5


@dataclass(frozen=True)
class ModelInput:
    """A model that something was made from."""

    role: str  # what it was used as: "starting policy", "reward model 1"
    path: str  # folder, checkpoint file or hub name, as the settings name it
    fingerprint: str  # of `models.fingerprint.model_fingerprint`
    location: str = ""  # the folder's or file's path relative to the record's folder; "" of a hub name
    files: dict[str, str] = field(default_factory=dict)  # weight and config files: name -> SHA-256
    lineage: str = ""  # SHA-256 of its own lineage.json; "" if it has none


@dataclass(frozen=True)
class DataInput:
    """A dataset that something was made from."""

    role: str  # "demonstrations", "rankings, validation"
    path: str  # file or hub name, as the settings name it
    fingerprint: str = ""  # "sha256 …", of the file's bytes; "" of a hub name
    rows_read: int | None = None  # None where no count is known
    rows_kept: int | None = None
    location: str = ""  # as of a model
    lineage: str = ""  # SHA-256 of FILE.lineage.json; "" if it has none


@dataclass(frozen=True)
class Compute:
    """Time and operations, over all sessions of a resumed run."""

    started: str  # UTC, ISO 8601, of the first session
    ended: str
    wall_seconds: float | None = None
    device_seconds: float | None = None  # times the number of devices
    tokens: int | None = None  # of training batches; in PPO of the episodes, each counted once
    flops: float | None = None  # floating-point operations of training and rollouts; None if they were not counted
    sessions: int = 1

    @property
    def petaflop_days(self) -> float | None:
        """Petaflop/s-days."""
        return None if self.flops is None else self.flops / PETAFLOP_DAY


@dataclass(frozen=True)
class Environment:
    """Commit, versions of packages and devices of a run."""

    commit: str = ""  # of the git repository of the working directory; "" without one
    dirty: bool = False  # whether tracked files differed from the commit
    packages: dict[str, str] = field(default_factory=dict)  # name -> version
    devices: str = ""  # "2 x NVIDIA H200", "1 x CPU (x86_64)"


@dataclass(frozen=True)
class RunReference:
    """The run of Weights & Biases that recorded it."""

    project: str
    id: str
    entity: str = ""  # "" of an offline run without an entity
    url: str = ""
    group: str = ""
    collection: str = ""  # of the artifact that holds the output
    aliases: tuple[str, ...] = ()  # of its version
    registry: str = ""  # the collection of a registry that it is linked to


@dataclass(frozen=True)
class LineageRecord:
    """What something is and what it was made from.

    Attributes:
        role: "pretraining", "sft", "reward", "ppo", "evaluation" or "samples".
        files: the output itself: name -> SHA-256 of weights and configuration, of the report, or of the sampled file.
        recipe: the settings as resolved, without credentials.
        configs: the recipe and its overlays, by name.
        metrics: last values of logged metrics.
    """

    role: str
    compute: Compute
    files: dict[str, str] = field(default_factory=dict)
    models: tuple[ModelInput, ...] = ()
    data: tuple[DataInput, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    configs: tuple[str, ...] = ()
    command: str = ""
    seed: int | None = None
    environment: Environment = Environment()
    metrics: dict[str, float] = field(default_factory=dict)
    wandb: RunReference | None = None
    format: int = FORMAT

    @property
    def inputs(self) -> "tuple[ModelInput | DataInput, ...]":
        """Models and data."""
        return (*self.models, *self.data)

    @property
    def fingerprint(self) -> str:
        """Of the output's files, as `models.fingerprint.model_fingerprint` computes it."""
        return combine_hashes(self.files)


def combine_hashes(files: dict[str, str]) -> str:
    """Return the fingerprint of files by name -> SHA-256: that of `hashing.hash_files`, with "sha256 " before it."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def lineage_path(output: Path) -> Path:
    """Return where the record of a folder or of a file is: DIR/lineage.json, FILE.lineage.json."""
    return output / LINEAGE_FILE if output.is_dir() else output.with_name(f"{output.name}.{LINEAGE_FILE}")


def write_record(record: LineageRecord, file: Path, folder: Path | None = None) -> str:
    """Write a record atomically, and return the SHA-256 of the file.

    Args:
        record: its inputs have absolute locations.
        file: the file to write.
        folder: that locations become relative to, so that a tree of folders can be moved as one; by default the
            file's.
    """
    base = (folder or file.parent).resolve()
    models = tuple(replace(each, location=_relative(each.location, base)) for each in record.models)
    data = tuple(replace(each, location=_relative(each.location, base)) for each in record.data)
    text = json.dumps(asdict(replace(record, models=models, data=data)), indent=1, ensure_ascii=False) + "\n"
    with written_whole(file) as part:
        part.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _relative(location: str, base: Path) -> str:
    return os.path.relpath(location, base) if location else ""


def read_record(output: Path) -> LineageRecord | None:
    """Read the record of a folder or file; None if it has none.

    Raises:
        UserError: it is damaged, or of a later version.
    """
    file = lineage_path(output)
    try:
        return parse_record(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise UserError(
            f"{file}: not a lineage of this version of lit_rlhf ({problem}); export the model again"
        ) from None


def parse_record(values: dict[str, Any]) -> LineageRecord:
    """Return the record of what `dataclasses.asdict` made, also after a JSON round trip.

    Raises:
        ValueError, KeyError, TypeError: the values are not those of a record.
    """
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, expected {FORMAT}")
    run = values["wandb"]
    parts = {
        "compute": Compute(**values["compute"]),
        "environment": Environment(**values["environment"]),
        "models": tuple(ModelInput(**each) for each in values["models"]),
        "data": tuple(DataInput(**each) for each in values["data"]),
        "configs": tuple(values["configs"]),
        "wandb": None if run is None else RunReference(**{**run, "aliases": tuple(run["aliases"])}),
    }
    return LineageRecord(**{**values, **parts})
