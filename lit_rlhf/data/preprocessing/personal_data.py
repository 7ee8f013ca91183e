"""Step 4: nothing with personal data in the training part (§3.2)."""

from __future__ import annotations

from lit_rlhf.data.preprocessing.keys import Rec
from lit_rlhf.data.preprocessing.pii import PIIDetector
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking, plain_text
from lit_rlhf.data.report import DatasetReport


def drop_personal_data(records: list[Rec], detector: PIIDetector, report: DatasetReport) -> list[Rec]:
    """The records in which the detector finds nothing: neither in the prompt nor in what is said to it.

    Args:
        records: The training records; the paper leaves validation and test as they are.
        detector: What finds personal data.
        report: Where the others are counted, by the kind that was found first.
    """
    kept = []
    for record in records:
        kinds = [kind for text in _texts(record) for kind in detector.find(text)]
        if kinds:
            report.skip(f"personal data: {kinds[0]}", record.origin)
        else:
            kept.append(record)
    if len(kept) == len(records):
        report.step("personal data")
    return kept


def _texts(record: Demonstration | Ranking | PromptRow) -> list[str]:
    said: list[str] = []
    if isinstance(record, Demonstration):
        said = [record.completion]
    elif isinstance(record, Ranking):
        said = record.completions
    return [plain_text(record.prompt), *said]
