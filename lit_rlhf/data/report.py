"""What preparing a dataset kept, skipped and cut: nothing leaves the data without a count."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.errors import UserError


class DatasetReport:
    """Counts of rows by what happened to them, in the order of the steps, each with the origin of the first.

    A *skipped* row is out of the data; a *noted* one is in it, changed or doubtful. Where a row becomes several
    records (a tree of conversations), each of them counts as a row from there on.

    Args:
        source: The data's name, the head of the printed table.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.read = 0
        self.added = 0
        self.skipped: dict[str, int] = {}
        self.noted: dict[str, int] = {}
        self.remarks: list[str] = []
        self._first: dict[str, str] = {}

    @property
    def kept(self) -> int:
        """Rows that are in the data."""
        return self.read + self.added - sum(self.skipped.values())

    def step(self, reason: str) -> None:
        """Give a step its line, though it may skip nothing."""
        self.skipped.setdefault(reason, 0)

    def skip(self, reason: str, origin: str) -> None:
        """Count a row that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self._first.setdefault(reason, origin)

    def note(self, reason: str, origin: str) -> None:
        """Count a row that was kept, but changed or doubtful."""
        self.noted[reason] = self.noted.get(reason, 0) + 1
        self._first.setdefault(reason, origin)

    def remark(self, line: str) -> None:
        """Add a line to the table."""
        self.remarks.append(line)

    def held_out(self, validation: int, training: int) -> None:
        """Say how many rows of the data are for validation, and how many are left."""
        self.remark(f"rows held out for validation: {validation:,}; left: {training:,}")

    def table(self) -> str:
        """The counts as aligned lines: rows read, skipped by reason, kept, and what was noted among the kept."""
        lines = [("rows read", self.read, "")]
        if self.added:
            lines += [("  made into records", self.read + self.added, "")]
        lines += [(f"  skipped: {reason}", n, self._hint(reason)) for reason, n in self.skipped.items()]
        lines += [("rows kept", self.kept, "")]
        lines += [(f"  of these: {reason}", n, self._hint(reason)) for reason, n in self.noted.items()]
        label_width = max(len(label) for label, _, _ in lines)
        count_width = max(len(f"{n:,}") for _, n, _ in lines)
        body = [f"{label:<{label_width}}  {n:>{count_width},}  {hint}".rstrip() for label, n, hint in lines]
        return "\n".join([self.source, *body, *self.remarks])

    def _hint(self, reason: str) -> str:
        return f"first: {self._first[reason]}" if reason in self._first else ""

    def summary(self) -> str:
        """The counts in one line, for error messages."""
        counts = [f"{n:,} {reason}" for reason, n in self.skipped.items() if n]
        return " · ".join([f"rows read {self.read:,}", f"kept {self.kept:,}", *counts])

    def require_some(self, kind: str) -> None:
        """Refuse data of which nothing is left.

        Raises:
            UserError: No row is kept.
        """
        if self.kept == 0:
            raise UserError(f"no {kind} is left of {self.source!r}: {self.summary()}")

    def state(self) -> dict[str, Any]:
        """All counts, as JSON takes them."""
        counts = {"read": self.read, "added": self.added, "skipped": self.skipped, "noted": self.noted}
        return counts | {"first": self._first, "remarks": self.remarks}

    @classmethod
    def restored(cls, source: str, state: dict[str, Any]) -> DatasetReport:
        """The report that was, of data that is called `source` now."""
        report = cls(source)
        report.read, report.added, report.remarks = state["read"], state["added"], state["remarks"]
        report.skipped, report.noted, report._first = state["skipped"], state["noted"], state["first"]
        return report

    def show(self) -> None:
        """Print the table once, on rank zero."""
        rank_zero_info(self.table())
