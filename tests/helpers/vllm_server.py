"""A fake vLLM server, written after vLLM's documentation: it holds a model and decodes one token at a time.

It has the properties of a real server that a careless client overlooks: a prefix cache that outlives new weights, an
end token that counts only where the request names it, and stop strings that are not searched before `min_tokens`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.services import Reply, Request, Service, serve

# vLLM's page "OpenAI-Compatible Server", Completions API: sampling parameters and extra parameters
KNOWN_PARAMETERS = {
    *("model", "prompt", "max_tokens", "n", "seed", "stop", "temperature", "top_p", "logprobs"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p", "min_tokens"),
    *("stop_token_ids", "ignore_eos", "return_token_ids", "cache_salt"),
}
Choices = list[dict[str, Any]]


class FakeVLLM:
    """State of the server.

    Args:
        folder: of the model that it starts with.
        name: under which it serves the model.
        max_model_len: largest number of tokens of prompt and response.
        processed_logprobs: `--logprobs-mode processed_logprobs`, else raw.
    """

    def __init__(
        self, folder: str, name: str = "policy", max_model_len: int = 128, processed_logprobs: bool = True
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name, self.max_model_len, self.processed_logprobs = name, max_model_len, processed_logprobs
        self.weights_paths: list[str] = []  # that weights were read from
        self.cache: dict[Any, Tensor] = {}  # logits after a prompt, in place of the keys and values of prefix caching
        self.lock = threading.Lock()

    def answer(self, request: Request, before: int) -> Reply:
        """Answer one request."""
        with self.lock, torch.no_grad():
            return getattr(self, request.path.strip("/").replace("/", "_"))(request.payload)

    def v1_models(self, _: None) -> Reply:
        model = {"id": self.name, "object": "model", "max_model_len": self.max_model_len}
        return Reply({"object": "list", "data": [model]})

    def collective_rpc(self, payload: Any) -> Reply:
        assert payload["method"] == "reload_weights" and payload["kwargs"].keys() == {"weights_path"}
        path = Path(payload["kwargs"]["weights_path"])
        if not path.is_absolute() or not list(path.glob("*.safetensors")):
            return Reply({"error": {"message": f"no weights in {path}"}}, status=500)
        self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
        self.weights_paths.append(str(path))
        return Reply({"results": [None]})

    def v1_completions(self, payload: Any) -> Reply:
        if payload["model"] != self.name:
            return Reply({"error": {"message": "no such model"}}, status=404)
        is_greedy_with_samples = payload["temperature"] == 0 and payload["n"] > 1
        is_too_long = len(payload["prompt"]) + payload["max_tokens"] > self.max_model_len
        if payload.keys() - KNOWN_PARAMETERS or is_too_long or is_greedy_with_samples:
            return Reply({"error": {"message": "bad request"}}, status=400)
        choices = [{"index": i, **self.sample(payload, payload["seed"] + i)} for i in range(payload["n"])]
        return Reply({"object": "text_completion", "model": self.name, "choices": choices[::-1]})  # not in order

    def sample(self, payload: Any, seed: int) -> dict[str, Any]:
        """Return one choice."""
        generator, prompt = torch.Generator().manual_seed(seed), payload["prompt"]
        ids: list[int] = []
        logprobs: list[float] = []
        reason, stopped_by = "length", None
        while len(ids) < payload["max_tokens"] and stopped_by is None:
            raw = self.logits(payload.get("cache_salt"), prompt, ids)
            logits = process_logits(raw, payload, len(ids))
            token = int(logits.argmax()) if not payload["temperature"] else sample_token(logits, generator)
            ids.append(token)
            logprobs.append(float(torch.log_softmax(logits if self.processed_logprobs else raw, 0)[token]))
            stopped_by = token if token in payload["stop_token_ids"] else None
            if len(ids) > payload["min_tokens"]:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                stopped_by = next((stop for stop in payload["stop"] if stop in text), stopped_by)
            if not payload["ignore_eos"] and token == self.tokenizer.eos_token_id:
                stopped_by = ""
        reason = "length" if stopped_by is None else "stop"
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": reason,
            "stop_reason": stopped_by,
            "prompt_token_ids": prompt if payload.get("return_token_ids") else None,
            "token_ids": ids if payload.get("return_token_ids") else None,
            "logprobs": None if payload.get("logprobs") is None else {"token_logprobs": logprobs},
        }

    def logits(self, salt: str | None, prompt: list[int], ids: list[int]) -> Tensor:
        """Return the next token's logits, (V,)."""
        if ids:
            return self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
        key = (salt, *prompt)
        if key not in self.cache:
            self.cache[key] = self.model(torch.tensor([prompt])).logits[0, -1].float()
        return self.cache[key]


def process_logits(logits: Tensor, payload: Any, length: int) -> Tensor:
    """Return logits (V,) after `min_tokens`, temperature, `top_k` and `top_p`."""
    logits = logits / (payload["temperature"] or 1.0)
    if length < payload["min_tokens"]:
        logits = logits.index_fill(0, torch.tensor(payload["stop_token_ids"]), -torch.inf)
    if payload["top_k"] > 0:
        logits = logits.masked_fill(logits < logits.topk(payload["top_k"]).values[-1], -torch.inf)
    order = logits.argsort(descending=True)
    probabilities = torch.softmax(logits[order], 0)
    filtered = order[probabilities.cumsum(0) - probabilities > payload["top_p"]]
    return logits.index_fill(0, filtered, -torch.inf)


def sample_token(logits: Tensor, generator: torch.Generator) -> int:
    """Sample a token."""
    return int(torch.multinomial(torch.softmax(logits, 0), 1, generator=generator))


@contextmanager
def serve_vllm(folder: str, **settings: Any) -> Iterator[tuple[Service, FakeVLLM]]:
    """Run a fake server."""
    server = FakeVLLM(folder, **settings)
    with serve(server.answer) as service:
        yield service, server


@contextmanager
def serve_modified(folder: str, modify: Callable[[Choices], Any]) -> Iterator[Service]:
    """Run a fake server whose choices `modify` changes, in place or by its return value."""
    server = FakeVLLM(folder)

    def answer(request: Request, before: int) -> Reply:
        reply = server.answer(request, before)
        if request.path == "/v1/completions":
            choices = sorted(reply.body["choices"], key=lambda choice: choice["index"])
            reply.body["choices"] = modify(choices) or choices
        return reply

    with serve(answer) as service:
        yield service
