"""What a vLLM server answers, checked against what was asked for and made into a rollout."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria
from lit_rlhf.rollout.experience import GenerationOutput

Payload = dict[str, Any]


def choices_of(answer: Any, payload: Payload) -> list[dict[str, Any]]:
    """Return the choices of an answer in their order; raise `TypeError` or `KeyError` where it has none."""
    return sorted(answer["choices"], key=lambda choice: choice["index"])


class ResponseTable:
    """The table of responses, filled with a request's samples at a time."""

    def __init__(
        self, model: PreTrainedModel, rows: int, sampling: SamplingParams, ends: list[int], where: str
    ) -> None:
        size, self.pad = (rows, sampling.max_new_tokens), model.config.pad_token_id
        self.ids = torch.full(size, self.pad)
        self.logprobs = torch.zeros(size)
        self.mask = torch.zeros(size, dtype=torch.bool)
        self.ended = torch.zeros(rows, dtype=torch.bool)
        self.device, self.width, self.ends, self.where = model.device, sampling.max_new_tokens, set(ends), where
        self.vocabulary = model.config.get_text_config().vocab_size

    def fill(self, row: int, payload: Payload, choices: list[dict[str, Any]]) -> None:
        """Write the samples of one prompt from `row` on.

        Raises:
            UserError: they are not what was asked for.
        """
        if len(choices) != payload["n"]:
            raise self.wrong(f"{len(choices)} samples in place of {payload['n']}", "is it a vLLM server?")
        for place, choice in enumerate(choices):
            ids = choice.get("token_ids")
            if not isinstance(ids, list):
                raise self.wrong("no token ids", "it needs a vLLM that knows return_token_ids")
            given = (choice.get("logprobs") or {}).get("token_logprobs") or []
            self.check(payload, choice, ids, given)
            self.ids[row + place, : len(ids)] = torch.tensor(ids)
            self.logprobs[row + place, : len(ids)] = torch.tensor(given, dtype=torch.float32)
            self.mask[row + place, : len(ids)] = True
            self.ended[row + place] = choice["finish_reason"] == "stop"

    def check(self, payload: Payload, choice: Any, ids: list[int], logprobs: list[float]) -> None:
        """Refuse a response that is not as agreed."""
        strange = [token for token in ids if not 0 <= token < self.vocabulary]
        if strange:
            raise self.wrong(
                f"token {strange[0]}, and the policy has {self.vocabulary:,}", "start it from the policy's own folder"
            )
        if len(logprobs) != len(ids) or not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
            raise self.wrong(f"{len(ids)} tokens without a finite log-prob each", "is it a vLLM server?")
        if choice.get("prompt_token_ids", payload["prompt"]) not in (payload["prompt"], None):
            raise self.wrong("another prompt than the one that was sent", "start it without a prompt template")
        reason, last = choice.get("finish_reason"), ids[-1] if ids else None
        if reason == "length" and len(ids) < self.width:
            raise self.wrong(f"{len(ids)} of {self.width} tokens", "raise its --max-model-len")
        stopped = reason == "stop" and (last in self.ends or choice.get("stop_reason") in payload["stop"])
        if not (ids and len(ids) <= self.width and (stopped or reason == "length")):
            raise self.wrong(
                f"{len(ids)} tokens that end with {last} for the reason {reason!r}",
                "is it paused?",
            )

    def wrong(self, what: str, mend: str) -> UserError:
        """Return the error for an answer that is not as agreed."""
        return UserError(f"{self.where} answered with {what}; {mend}")

    def rollout(self, ending: StoppingCriteria) -> GenerationOutput:
        """Return them, each cut behind the first token that ends it by our own rule."""
        ids, mask, ended = self.ids.to(self.device), self.mask.to(self.device), self.ended.to(self.device)
        rows = torch.arange(len(ids), device=self.device)
        for step in range(self.width):
            rows = rows[mask[rows, step]]
            if not len(rows):
                break
            here = ending.is_finished(ids[rows, : step + 1])
            ended[rows[here]] = True
            mask[rows[here], step + 1 :] = False
        return GenerationOutput(ids.masked_fill(~mask, self.pad), mask, self.logprobs.to(self.device) * mask, ended)
