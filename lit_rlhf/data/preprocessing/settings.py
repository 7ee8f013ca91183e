"""The paper's data steps (§3.2, App. A) as settings, in the order in which they are applied.

1. duplicates by a long common prefix · 2. at most so many prompts a user · 3. the split · 4. personal data, in the
training part alone · 5. few-shot examples · 6. the length limits, which count tokens and so come last
(`lit_rlhf.data.truncation`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from lit_rlhf.data.formats.registry import import_function
from lit_rlhf.data.preprocessing.duplicates import drop_duplicates
from lit_rlhf.data.preprocessing.few_shot import expand_few_shot
from lit_rlhf.data.preprocessing.keys import Rec, prompt_key
from lit_rlhf.data.preprocessing.personal_data import drop_personal_data
from lit_rlhf.data.preprocessing.pii import PIIDetector, PythonDetector
from lit_rlhf.data.preprocessing.splits import split, split_by_column
from lit_rlhf.data.preprocessing.users import cap_users
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError


@dataclass
class Preprocessing:
    """What is done with records before they become tokens; nothing, as it stands.

    Args:
        dedup_prefix_chars: Of records whose prompts share this many first characters, keep one. The paper drops prompts
            that "share a long common prefix" and does not say how long.
        user_column: The column that says whose prompt a row is.
        max_prompts_per_user: Keep at most this many prompts of a user (paper: 200).
        split_by: The column whose values stay on one side of the validation split (paper: the user); None: the prompt.
        pii: What finds personal data, whose records leave the training part: a `PIIDetector`, or the dotted path of a
            function from a text to the kinds in it.
    """

    dedup_prefix_chars: int | None = None
    user_column: str | None = None
    max_prompts_per_user: int | None = None
    split_by: str | None = None
    pii: PIIDetector | str | None = None

    def checked(self, validation_fraction: float) -> Self:
        """These settings, with a function named by `pii` imported.

        Raises:
            UserError: One is out of range, or has no effect without another.
        """
        for name in ("dedup_prefix_chars", "max_prompts_per_user"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"preparation.{name}: {value} must be at least 1")
        if (self.max_prompts_per_user is None) != (self.user_column is None):
            raise UserError(
                "preprocessing.max_prompts_per_user and preprocessing.user_column need each other: set both"
            )
        if self.split_by is not None and not validation_fraction:
            raise UserError("preprocessing.split_by says how to hold out data: set validation_fraction as well")
        if isinstance(self.pii, str):
            return replace(self, pii=PythonDetector(import_function(self.pii, "preprocessing.pii"), self.pii))
        return self

    def training(
        self, records: list[Rec], validation_fraction: float, seed: int, report: DatasetReport
    ) -> tuple[list[Rec], list[Rec]]:
        """What is trained on, and what of the same data is held out."""
        records = self._thinned(records, seed, report)
        held_out: list[Rec] = []
        if validation_fraction and self.split_by is not None:
            records, held_out = split_by_column(records, self.split_by, validation_fraction, seed, report)
        elif validation_fraction:
            records, held_out = split(records, prompt_key, validation_fraction, seed, report)
        if self.pii is not None:
            assert not isinstance(self.pii, str), "checked() imports the function"
            records = drop_personal_data(records, self.pii, report)
        return self.expanded(records, seed, report), self.expanded(held_out, seed, report)

    def validation(self, records: list[Rec], trained: set[str], seed: int, report: DatasetReport) -> list[Rec]:
        """Validation data of its own, with a count of the prompts that are `trained` on as well."""
        records = self._thinned(records, seed, report)
        for record in records:
            if prompt_key(record) in trained:
                report.note("prompt is also in the training data", record.origin)
        return self.expanded(records, seed, report)

    def _thinned(self, records: list[Rec], seed: int, report: DatasetReport) -> list[Rec]:
        if self.dedup_prefix_chars is not None:
            records = drop_duplicates(records, self.dedup_prefix_chars, seed, report)
        if self.user_column is not None and self.max_prompts_per_user is not None:
            records = cap_users(records, self.user_column, self.max_prompts_per_user, seed, report)
        return records

    def expanded(self, records: list[Rec], seed: int, report: DatasetReport) -> list[Rec]:
        """Step 5, where there is one."""
        return records


@dataclass
class DemonstrationPreprocessing(Preprocessing):
    """The same for demonstrations, which can stand in each other's prompts.

    Args:
        few_shot_by: The column that says which task a demonstration is of: each gets the task's others before it.
        few_shot_pairs: Pairs of one such example, K; larger tasks are dealt to several groups. None: no limit.
        train_on_replies: Which replies of a conversation are learnt: "every" one, where the row's format is a whole
            conversation, or the "last".
    """

    few_shot_by: str | None = None
    few_shot_pairs: int | None = None
    train_on_replies: Literal["every", "last"] = "every"

    def checked(self, validation_fraction: float) -> Self:
        """These settings. Raises as the general ones do."""
        if self.few_shot_pairs is not None:
            if self.few_shot_by is None:
                raise UserError(
                    "preprocessing.few_shot_pairs has no effect without preprocessing.few_shot_by: set both"
                )
            if self.few_shot_pairs < 2:
                raise UserError(f"preprocessing.few_shot_pairs: {self.few_shot_pairs} must be at least 2")
        return super().checked(validation_fraction)

    def expanded(self, records: list[Any], seed: int, report: DatasetReport) -> list[Any]:
        """Few-shot examples, and replies that are learnt or not."""
        if self.few_shot_by is not None and records:
            records = expand_few_shot(records, self.few_shot_by, self.few_shot_pairs, seed, report)
        if self.train_on_replies == "last":
            records = [record._replace(all_replies=False) for record in records]
        return records
