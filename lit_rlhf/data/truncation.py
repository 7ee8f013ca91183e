"""What happens to prompts and completions that are too long: nothing of it silently."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError


class TruncationPolicy(NamedTuple):
    """The limits, in tokens, and the policy for prompts over theirs."""

    max_prompt_length: int
    max_completion_length: int = 1024  # the EOS included
    overlong_prompts: Literal["drop", "truncate"] = "drop"

    def fit_prompt(self, ids: list[int], leading: list[int], origin: str, report: DatasetReport) -> list[int] | None:
        """A prompt within the limit: as it is, or its end behind `leading` (the BOS), or None where it is dropped."""
        limit = self.max_prompt_length
        if not ids:
            # a loss needs a token before its first target
            report.skip("prompt without a token", origin)
            return None
        if len(ids) <= limit:
            return ids
        if self.overlong_prompts == "drop":
            report.skip(f"prompt longer than {limit} tokens", origin)
            return None
        report.note(f"prompt truncated to its last {limit} tokens", origin)
        begin = leading[:limit] if ids[: len(leading)] == leading else []
        return begin + ids[len(ids) - (limit - len(begin)) :]

    def fit_completion(self, ids: list[int], eos: int, origin: str, report: DatasetReport) -> list[int]:
        """A completion with EOS behind it; one over the limit is cut and has no EOS, for it did not end there."""
        ended = ids if ids[-1:] == [eos] else [*ids, eos]
        if eos in ended[:-1]:
            report.note("completion spells the EOS token before its end", origin)
        if len(ended) > self.max_completion_length:
            report.note(f"completion cut to {self.max_completion_length} tokens", origin)
        return ended[: self.max_completion_length]

    def checked(self) -> TruncationPolicy:
        """This policy.

        Raises:
            UserError: A limit below 1 token.
        """
        for name in ("max_prompt_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1 token")
        return self
