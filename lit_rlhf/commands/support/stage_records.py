"""What the stages of a procedure leave behind: `stages/NAME.json`, by which a finished one is not repeated.

A record has the `fingerprint` of what the stage depends on and the `seconds` it took, and what its runner adds.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.paths import written_whole


class StageRecords:
    """The records of a procedure.

    Args:
        folder: of the procedure; its `stages/` is made by the runner.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "stages"

    def read(self, stage: str) -> dict[str, Any]:
        """Return the record of a stage; empty if there is none."""
        path = self.folder / f"{stage}.json"
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return record

    def write(self, stage: str, record: Mapping[str, Any]) -> None:
        """Write the record of a stage; a call that is killed here leaves the old one."""
        with written_whole(self.folder / f"{stage}.json") as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def remove(self, stage: str) -> None:
        """Remove the record of a stage, if there is one."""
        (self.folder / f"{stage}.json").unlink(missing_ok=True)


def compute_fingerprint(settings: Any) -> str:
    """Return a hash of JSON-serializable settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
