"""Responses of a vLLM server, checked against the request and collected into a `GenerationOutput`."""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.generation.base import GenerationOutput
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria

Payload = dict[str, Any]


def read_choices(answer: Any, payload: Payload) -> list[dict[str, Any]]:
    """Return the choices of a response in order; raise `TypeError` or `KeyError` where it has none."""
    return sorted(answer["choices"], key=lambda choice: choice["index"])


class ResponseTable:
    """Token ids and log-probs of N responses, filled one request (a prompt's samples) at a time."""

    def __init__(
        self, model: PreTrainedModel, rows: int, sampling: SamplingParams, stop_token_ids: list[int], server: str
    ) -> None:
        size, self.pad = (rows, sampling.max_new_tokens), model.config.pad_token_id
        self.ids = torch.full(size, self.pad)
        self.logprobs = torch.zeros(size)
        self.mask = torch.zeros(size, dtype=torch.bool)
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.device, self.width = model.device, sampling.max_new_tokens
        self.stop_token_ids, self.server = set(stop_token_ids), server
        self.vocabulary = model.config.get_text_config().vocab_size

    def fill(self, row: int, payload: Payload, choices: list[dict[str, Any]]) -> None:
        """Write the samples of one prompt to the rows from `row` on.

        Raises:
            UserError: they do not match the request.
        """
        if len(choices) != payload["n"]:
            raise self.error(f"{len(choices)} samples in place of {payload['n']}", "is it a vLLM server?")
        for index, choice in enumerate(choices):
            ids = choice.get("token_ids")
            if not isinstance(ids, list):
                raise self.error("no token ids", "it needs a vLLM that knows return_token_ids")
            given = (choice.get("logprobs") or {}).get("token_logprobs") or []
            self.check(payload, choice, ids, given)
            self.ids[row + index, : len(ids)] = torch.tensor(ids)
            self.logprobs[row + index, : len(ids)] = torch.tensor(given, dtype=torch.float32)
            self.mask[row + index, : len(ids)] = True
            self.finished[row + index] = choice["finish_reason"] == "stop"

    def check(self, payload: Payload, choice: Any, ids: list[int], logprobs: list[float]) -> None:
        """Refuse a response that does not match its request."""
        unknown = [token for token in ids if not 0 <= token < self.vocabulary]
        if unknown:
            raise self.error(
                f"token {unknown[0]}, and the policy has {self.vocabulary:,}", "start it from the policy's own folder"
            )
        if len(logprobs) != len(ids) or not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
            raise self.error(f"{len(ids)} tokens without a finite log-prob each", "is it a vLLM server?")
        if choice.get("prompt_token_ids", payload["prompt"]) not in (payload["prompt"], None):
            raise self.error("another prompt than the one that was sent", "start it without a prompt template")
        reason, last = choice.get("finish_reason"), ids[-1] if ids else None
        if reason == "length" and len(ids) < self.width:
            raise self.error(f"{len(ids)} of {self.width} tokens", "raise its --max-model-len")
        stopped = reason == "stop" and (last in self.stop_token_ids or choice.get("stop_reason") in payload["stop"])
        if not (ids and len(ids) <= self.width and (stopped or reason == "length")):
            raise self.error(
                f"{len(ids)} tokens that end with {last} for the reason {reason!r}",
                "is it paused?",
            )

    def error(self, what: str, hint: str) -> UserError:
        """Return the error for a response that does not match its request."""
        return UserError(f"{self.server} answered with {what}; {hint}")

    def output(self, stopping: StoppingCriteria) -> GenerationOutput:
        """Return the responses, each cut after the first token that ends it by `stopping`."""
        ids, mask, finished = self.ids.to(self.device), self.mask.to(self.device), self.finished.to(self.device)
        rows = torch.arange(len(ids), device=self.device)
        for step in range(self.width):
            rows = rows[mask[rows, step]]
            if not len(rows):
                break
            stops = stopping.is_finished(ids[rows, : step + 1])
            finished[rows[stops]] = True
            mask[rows[stops], step + 1 :] = False
        return GenerationOutput(ids.masked_fill(~mask, self.pad), mask, self.logprobs.to(self.device) * mask, finished)
