"""Length limits of prompts and completions; whatever they drop or truncate is counted."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError


class TruncationPolicy(NamedTuple):
    """The length limits in tokens, and whether longer prompts are dropped or truncated."""

    max_prompt_length: int
    max_completion_length: int = 1024  # including EOS
    overlong_prompts: Literal["drop", "truncate"] = "drop"

    def fit_prompt(self, ids: list[int], bos_ids: list[int], origin: str, report: DatasetReport) -> list[int] | None:
        """Return a prompt within the limit, truncated from the left but with its BOS; None if it is dropped."""
        limit = self.max_prompt_length
        if ids == bos_ids:
            # its text has no token, and a loss needs one before its first target
            report.skip("prompt without a token", origin)
            return None
        if len(ids) <= limit:
            return ids
        if self.overlong_prompts == "drop":
            report.skip(f"prompt longer than {limit} tokens", origin)
            return None
        report.flag(f"prompt truncated to its last {limit} tokens", origin)
        begin = bos_ids[:limit] if ids[: len(bos_ids)] == bos_ids else []
        return begin + ids[len(ids) - (limit - len(begin)) :]

    def fit_completion(self, ids: list[int], eos: int, origin: str, report: DatasetReport) -> list[int]:
        """Return a completion with EOS; one over the limit is truncated and has no EOS, for it did not end there."""
        completion = ids if ids[-1:] == [eos] else [*ids, eos]
        if completion == [eos]:
            report.flag("completion without a token before its end token", origin)
        if eos in completion[:-1]:
            report.flag("completion spells the EOS token before its end", origin)
        if len(completion) > self.max_completion_length:
            report.flag(f"completion cut to {self.max_completion_length} tokens", origin)
        return completion[: self.max_completion_length]

    def validated(self) -> TruncationPolicy:
        """Return this policy.

        Raises:
            UserError: A limit is below 1 token.
        """
        for name in ("max_prompt_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1 token")
        return self
