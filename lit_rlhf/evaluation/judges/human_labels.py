"""Human verdicts from an annotation file, and writing the file to annotate."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lit_rlhf.data.formats.record_validation import is_blank
from lit_rlhf.data.sources import DataSource, Row, held_rows, read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import (
    MAX_RATING,
    METADATA_FIELDS,
    MIN_RATING,
    CompletionPair,
    Judge,
    RatedItem,
    Rating,
    Verdict,
)

Verdicts = dict[tuple[str, str, str], list[Verdict]]  # by prompt and the two completions
Ratings = dict[tuple[str, str], list[Rating]]  # by prompt and completion
PREFERENCES = {"first": 1.0, "second": 0.0, "tie": 0.5}


class HumanLabels(Judge):
    """Human verdicts and ratings, looked up by prompt and completion texts in either order.

    A comparison row has `prompt`, `first`, `second`, `preference` ("first", "second" or "tie"); a rating row has
    `prompt`, `answer`, `overall` (1 to 7) and any of `METADATA_FIELDS`, as true or false. Both may have `labeler`. A
    pair without a verdict counts as missing.

    Args:
        path: `.jsonl`, `.csv` or another data file. The preference suite writes the comparisons to annotate into its
            `annotation_dir`.
    """

    is_order_sensitive = False

    def __init__(self, path: DataSource) -> None:
        self.path = held_rows(path)
        self._loaded: tuple[Verdicts, Ratings] | None = None

    def compare(self, pairs: list[CompletionPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        verdicts, _ = self._load()
        missing = [Verdict("human", None, "nobody judged this pair")]
        tie = [Verdict("human", 0.5, "the same text")]
        return [
            verdicts.get((pair.prompt, pair.first.text, pair.second.text))
            or (tie if pair.first.text == pair.second.text else missing)
            for pair in pairs
        ]

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]]:
        """See `Judge.rate`."""
        _, ratings = self._load()
        return [ratings.get((item.prompt, item.completion.text), []) for item in items]

    def check(self) -> None:
        """See `Judge.check`; reads the file."""
        self._load()

    def _load(self) -> tuple[Verdicts, Ratings]:
        """Read the file once; one that cannot be read is an error each time."""
        if self._loaded is not None:
            return self._loaded
        verdicts: Verdicts = defaultdict(list)
        ratings: Ratings = defaultdict(list)
        for row in read_rows(self.path):
            name = row.fields.get("labeler")
            labeler = "human" if is_blank(name) else str(name)
            if "answer" in row.fields:
                key = (read_text_field(row, "prompt"), read_text_field(row, "answer"))
                ratings[key].append(read_rating(row, labeler))
                continue
            preference = row.fields.get("preference")
            if is_blank(preference):
                continue  # not annotated yet
            if preference not in list(PREFERENCES):  # a list, which is none, has no hash
                raise UserError(f"{row.origin}: preference is {preference!r}; it is first, second or tie")
            prompt, first, second = (read_text_field(row, name) for name in ("prompt", "first", "second"))
            value = PREFERENCES[preference]
            verdicts[prompt, first, second].append(Verdict(labeler, value))
            verdicts[prompt, second, first].append(Verdict(labeler, 1.0 - value))
        self._loaded = verdicts, ratings
        return self._loaded


def read_text_field(row: Row, name: str) -> str:
    """Return a text field of a row, which may be empty, as completions are."""
    value = row.fields.get(name)
    if not isinstance(value, str):
        raise UserError(f"{row.origin}: {name} must be text, got {value!r}")
    return value


def read_rating(row: Row, labeler: str) -> Rating:
    """Return the rating of a row; a table with missing cells stores 5 as 5.0."""
    text = row.fields.get("overall")
    try:
        overall = None if is_blank(text) else int(str(text).removesuffix(".0"))
    except ValueError:
        raise UserError(f"{row.origin}: overall must be a whole number from 1 to 7, got {text!r}") from None
    flags = {}
    for name in METADATA_FIELDS:
        value = row.fields.get(name)
        if is_blank(value):
            continue
        flag = str(value).lower().removesuffix(".0")
        if flag not in ("true", "false", "0", "1", "yes", "no"):
            raise UserError(f"{row.origin}: {name} must be true or false, got {value!r}")
        flags[name] = flag in ("true", "1", "yes")
    if overall is not None and not MIN_RATING <= overall <= MAX_RATING:
        allowed = f"{MIN_RATING} to {MAX_RATING}"
        raise UserError(f"{row.origin}: an overall quality of {overall} is not from {allowed}")
    return Rating(labeler, overall, flags)


def write_comparisons(path: Path, pairs: Sequence[CompletionPair]) -> None:
    """Write pairs as rows to annotate, with `preference` and `labeler` null."""
    rows = [
        {"prompt": p.prompt, "first": p.first.text, "second": p.second.text, "preference": None, "labeler": None}
        for p in pairs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
