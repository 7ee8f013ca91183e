"""An independent reference: one row at a time, in float64, the sum of token log-probabilities."""

from functools import cache

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@cache
def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def ids_apart(folder: str, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Context as the tokenizer begins a text, continuation by itself."""
    _, tokenizer = load(folder)
    first = tokenizer(context)["input_ids"] if context else [tokenizer.bos_token_id]
    return first, tokenizer(continuation, add_special_tokens=False)["input_ids"]


def logprob(folder: str, context: str, continuation: str) -> tuple[float, int]:
    """Sum over the continuation's tokens, and how many there are."""
    return logprobs(folder, context, [continuation])[0]


@torch.no_grad()
def logprobs(folder: str, context: str, continuations: list[str]) -> list[tuple[float, int]]:
    """The same of several continuations at once, padded behind, where no token sees the padding."""
    model, _ = load(folder)
    both = [ids_apart(folder, context, continuation) for continuation in continuations]
    rows = [(before + own)[-model.config.max_position_embeddings :] for before, own in both]
    width = max(map(len, rows))
    table: Tensor = model(torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits.log_softmax(-1)
    found = []
    for place, (row, (_, own)) in enumerate(zip(rows, both)):
        start = len(row) - len(own)
        found.append((sum(float(table[place, start + i - 1, token]) for i, token in enumerate(own)), len(own)))
    return found
