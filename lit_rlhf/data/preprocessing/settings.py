"""The paper's data steps (§3.2, App. A) as settings, in the order in which they are applied.

1. duplicates by a long common prefix · 2. a limit of prompts per user · 3. the validation split · 4. personal data, in
the training split alone · 5. few-shot examples · 6. the length limits, which count tokens and so come last
(`lit_rlhf.data.truncation`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from lit_rlhf.data.preprocessing.duplicates import drop_duplicates
from lit_rlhf.data.preprocessing.few_shot import expand_few_shot
from lit_rlhf.data.preprocessing.keys import RecordT, prompt_key
from lit_rlhf.data.preprocessing.pii import FunctionDetector, PIIDetector, drop_pii
from lit_rlhf.data.preprocessing.splits import split_by_column, split_by_key
from lit_rlhf.data.preprocessing.users import cap_prompts_per_user
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError
from lit_rlhf.importing import Function, function_name, import_function


@dataclass
class Preprocessing:
    """The data steps before tokenizing; by default, none.

    Args:
        dedup_prefix_chars: Of records whose prompts share this many first characters, keep one. The paper drops prompts
            that "share a long common prefix" and does not state its length.
        user_column: The column with the user of a prompt.
        max_prompts_per_user: Keep at most this many prompts per user (paper: 200).
        split_by: The column whose values are not split between training and validation (paper: the user); None: the
            prompt.
        pii: Finds personal data, to drop records with any from the training split: a `PIIDetector`, or a function from
            a text to the kinds in it, or its dotted path.
    """

    dedup_prefix_chars: int | None = None
    user_column: str | None = None
    max_prompts_per_user: int | None = None
    split_by: str | None = None
    pii: PIIDetector | Function | str | None = None

    def validated(self, validation_fraction: float) -> Self:
        """Return these settings, with a function named by `pii` imported.

        Raises:
            UserError: A setting is out of range, or has no effect without another.
        """
        for name in ("dedup_prefix_chars", "max_prompts_per_user"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"preprocessing.{name}: {value} must be at least 1")
        if (self.max_prompts_per_user is None) != (self.user_column is None):
            raise UserError(
                "preprocessing.max_prompts_per_user and preprocessing.user_column need each other: set both"
            )
        if self.split_by is not None and not validation_fraction:
            raise UserError("preprocessing.split_by says how to hold out data: set validation_fraction as well")
        if self.pii is not None and not isinstance(self.pii, PIIDetector):
            function = import_function(self.pii, "preprocessing.pii")
            return replace(self, pii=FunctionDetector(function, function_name(self.pii)))
        return self

    def apply_to_training(
        self, records: list[RecordT], validation_fraction: float, seed: int, report: DatasetReport
    ) -> tuple[list[RecordT], list[RecordT]]:
        """Apply all steps to the training data; return the records to train on, and those held out."""
        records = self._filter(records, seed, report)
        held_out: list[RecordT] = []
        if validation_fraction and self.split_by is not None:
            records, held_out = split_by_column(records, self.split_by, validation_fraction, seed, report)
        elif validation_fraction:
            records, held_out = split_by_key(records, prompt_key, validation_fraction, seed, report)
        if self.pii is not None:
            assert isinstance(self.pii, PIIDetector), "validated() imports the function"
            records = drop_pii(records, self.pii, report)
        return self.expand(records, seed, report), self.expand(held_out, seed, report)

    def apply_to_validation(
        self, records: list[RecordT], training_prompts: set[str], seed: int, report: DatasetReport
    ) -> list[RecordT]:
        """Apply steps 1, 2 and 5 to separate validation data; count the prompts that are also in the training data."""
        records = self._filter(records, seed, report)
        for record in records:
            if prompt_key(record) in training_prompts:
                report.flag("prompt is also in the training data", record.origin)
        return self.expand(records, seed, report)

    def _filter(self, records: list[RecordT], seed: int, report: DatasetReport) -> list[RecordT]:
        if self.dedup_prefix_chars is not None:
            records = drop_duplicates(records, self.dedup_prefix_chars, seed, report)
        if self.user_column is not None and self.max_prompts_per_user is not None:
            records = cap_prompts_per_user(records, self.user_column, self.max_prompts_per_user, seed, report)
        return records

    def expand(self, records: list[RecordT], seed: int, report: DatasetReport) -> list[RecordT]:
        """Apply step 5, if there is one."""
        return records


@dataclass
class DemonstrationPreprocessing(Preprocessing):
    """The data steps of demonstrations: those of `Preprocessing`, and few-shot examples.

    Args:
        few_shot_by: The column with the task of a demonstration: the task's other demonstrations are put before each.
        few_shot_pairs: Pairs per few-shot example, K; larger tasks are split into groups. None: no limit.
        train_on_replies: Which replies of a conversation are trained on: "all", if the row's format is a full
            conversation, or only the "last".
    """

    few_shot_by: str | None = None
    few_shot_pairs: int | None = None
    train_on_replies: Literal["all", "last"] = "all"

    def validated(self, validation_fraction: float) -> Self:
        """Return these settings; see `Preprocessing.validated`."""
        if self.few_shot_pairs is not None:
            if self.few_shot_by is None:
                raise UserError(
                    "preprocessing.few_shot_pairs has no effect without preprocessing.few_shot_by: set both"
                )
            if self.few_shot_pairs < 2:
                raise UserError(f"preprocessing.few_shot_pairs: {self.few_shot_pairs} must be at least 2")
        return super().validated(validation_fraction)

    def expand(self, records: list[Any], seed: int, report: DatasetReport) -> list[Any]:
        """Build few-shot examples, and apply `train_on_replies`."""
        if self.few_shot_by is not None and records:
            records = expand_few_shot(records, self.few_shot_by, self.few_shot_pairs, seed, report)
        if self.train_on_replies == "last":
            records = [record._replace(train_on_all_replies=False) for record in records]
        return records
