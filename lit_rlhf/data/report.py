"""What reading a dataset kept, skipped and changed: no row is left out without a count."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.errors import UserError


class DataReader:
    """Base of data modules and callbacks that read datasets: what of each was kept, for the lineage of the run.

    Attributes:
        data_role: what the data is used as.
        reports: of the datasets that were read, those used for validation alone marked so.
    """

    data_role: str = "data"
    reports: tuple[DatasetReport, ...] = ()


class DatasetReport:
    """Counts rows by what happened to them, in the order of the steps, each with the origin of the first such row.

    A *skipped* row is not in the data; a *flagged* one is, but changed or doubtful. If a row becomes several records (a
    tree of conversations), each of them counts as a row from there on.

    Args:
        source: The data's name, the first line of the printed table.
        validation: Whether it is used for validation alone.
    """

    def __init__(self, source: str, validation: bool = False) -> None:
        self.source = source
        self.validation = validation
        self.num_read = 0
        self.num_added = 0  # records beyond one per row
        self.skipped: dict[str, int] = {}  # reason -> rows
        self.flagged: dict[str, int] = {}  # reason -> rows
        self.extra_lines: list[str] = []
        self.details: set[str] = set()  # of these, what only the table has
        self._first: dict[str, str] = {}  # reason -> origin of the first row

    @property
    def num_kept(self) -> int:
        """Rows that are in the data."""
        return self.num_read + self.num_added - sum(self.skipped.values())

    def register_skip_reason(self, reason: str) -> None:
        """Add a reason's line to the table, even if no row is skipped for it."""
        self.skipped.setdefault(reason, 0)

    def skip(self, reason: str, origin: str) -> None:
        """Count a row that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self._first.setdefault(reason, origin)

    def flag(self, reason: str, origin: str) -> None:
        """Count a row that is kept, but changed or doubtful."""
        self.flagged[reason] = self.flagged.get(reason, 0) + 1
        self._first.setdefault(reason, origin)

    def add_line(self, line: str, is_detail: bool = False) -> None:
        """Add a line below the table; a detail is in no short form."""
        self.extra_lines.append(line)
        if is_detail:
            self.details.add(line)

    def add_validation_line(self, num_validation: int, num_training: int) -> None:
        """Add a line with the number of rows held out for validation, and of those left."""
        self.add_line(f"rows held out for validation: {num_validation:,}; left: {num_training:,}")

    def format_table(self) -> str:
        """Return the counts as aligned lines: rows read, skipped by reason, kept, and flagged by reason."""
        lines = [("rows read", self.num_read, "")]
        if self.num_added:
            lines += [("  made into records", self.num_read + self.num_added, "")]
        lines += [(f"  skipped: {reason}", n, self._hint(reason)) for reason, n in self.skipped.items()]
        lines += [("rows kept", self.num_kept, "")]
        lines += [(f"  of these: {reason}", n, self._hint(reason)) for reason, n in self.flagged.items()]
        label_width = max(len(label) for label, _, _ in lines)
        count_width = max(len(f"{n:,}") for _, n, _ in lines)
        body = [f"{label:<{label_width}}  {n:>{count_width},}  {hint}".rstrip() for label, n, hint in lines]
        return "\n".join([self.source, *body, *self.extra_lines])

    def _hint(self, reason: str) -> str:
        return f"first: {self._first[reason]}" if reason in self._first else ""

    def format_summary(self) -> str:
        """Return the counts in one line, for error messages."""
        counts = [f"{n:,} {reason}" for reason, n in self.skipped.items() if n]
        return " · ".join([f"rows read {self.num_read:,}", f"kept {self.num_kept:,}", *counts])

    def format_notes(self) -> list[str]:
        """Return the counts of skipped and of flagged rows, a line each."""
        skipped = [f"{n:,} rows skipped: {reason}" for reason, n in self.skipped.items() if n]
        return skipped + [f"{n:,} rows: {reason}" for reason, n in self.flagged.items() if n]

    def raise_if_empty(self, kind: str) -> None:
        """Refuse data of which no row is left.

        Raises:
            UserError: No row is kept.
        """
        if self.num_kept == 0:
            raise UserError(f"no {kind} is left of {self.source!r}: {self.format_summary()}")

    def state_dict(self) -> dict[str, Any]:
        """Return all counts, serializable as JSON."""
        counts = {"read": self.num_read, "added": self.num_added, "skipped": self.skipped, "noted": self.flagged}
        return counts | {"first": self._first, "remarks": self.extra_lines}

    @classmethod
    def from_state_dict(cls, source: str, state: dict[str, Any]) -> DatasetReport:
        """Restore a report; `source` may be another name of the same data."""
        report = cls(source)
        report.num_read, report.num_added, report.extra_lines = state["read"], state["added"], state["remarks"]
        report.skipped, report.flagged, report._first = state["skipped"], state["noted"], state["first"]
        return report

    def format_line(self) -> str:
        """Return the counts in one line: the rows that are kept, and what was skipped or changed, if anything."""
        head = f"{self.source}: {self.num_kept:,} rows"
        if self.num_kept < self.num_read + self.num_added:
            head = f"{self.source}: {self.num_kept:,} of {self.num_read + self.num_added:,} rows"
        notes = [f"skipped {n:,}: {self.annotate(reason)}" for reason, n in self.skipped.items() if n]
        notes += [f"of these {n:,}: {self.annotate(reason)}" for reason, n in self.flagged.items() if n]
        return "; ".join([head, *notes, *(line for line in self.extra_lines if line not in self.details)])

    def annotate(self, reason: str) -> str:
        """Return a reason with the origin of its first row."""
        return f"{reason} (first: {self._first[reason]})" if reason in self._first else reason

    def print_table(self) -> None:
        """Print the table once, on rank zero; the commands print the line instead."""
        rank_zero_info(self.format_table(), extra={"brief": self.format_line()})
