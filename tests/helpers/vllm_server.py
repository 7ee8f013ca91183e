"""A stand-in for a vLLM server, by its documentation: it holds a model of its own, and decodes one token at a time.

What real servers do and a careless client trips over is kept: a cache of prompts that survives new weights, an end
token that only counts where it is named, and the text of a stop string that may not be looked for before `min_tokens`.
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

# of vLLM's page "OpenAI-Compatible Server", Completions API: sampling parameters and extra parameters
KNOWN = {
    *("model", "prompt", "max_tokens", "n", "seed", "stop", "temperature", "top_p", "logprobs"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "min_p", "min_tokens"),
    *("stop_token_ids", "ignore_eos", "return_token_ids", "cache_salt"),
}
Choices = list[dict[str, Any]]


class VLLM:
    """The server's state.

    Args:
        folder: of the model that it is started with.
        name: that it serves it under.
        length: `--max-model-len`.
        processed: `--logprobs-mode processed_logprobs`, else raw.
    """

    def __init__(self, folder: str, name: str = "policy", length: int = 128, processed: bool = True) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name, self.length, self.processed = name, length, processed
        self.pushed: list[str] = []  # paths of weights that were read
        self.cache: dict[Any, Tensor] = {}  # logits behind a prompt, as prefix caching keeps keys and values
        self.lock = threading.Lock()

    def answer(self, request: Request, before: int) -> Reply:
        """Answer one request."""
        with self.lock, torch.no_grad():
            return getattr(self, request.path.strip("/").replace("/", "_"))(request.payload)

    def v1_models(self, _: None) -> Reply:
        return Reply({"object": "list", "data": [{"id": self.name, "object": "model", "max_model_len": self.length}]})

    def collective_rpc(self, payload: Any) -> Reply:
        assert payload["method"] == "reload_weights" and payload["kwargs"].keys() == {"weights_path"}
        path = Path(payload["kwargs"]["weights_path"])
        if not path.is_absolute() or not list(path.glob("*.safetensors")):
            return Reply({"error": {"message": f"no weights in {path}"}}, status=500)
        self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
        self.pushed.append(str(path))
        return Reply({"results": [None]})

    def v1_completions(self, payload: Any) -> Reply:
        if payload["model"] != self.name:
            return Reply({"error": {"message": "no such model"}}, status=404)
        greedy_several = payload["temperature"] == 0 and payload["n"] > 1
        if payload.keys() - KNOWN or len(payload["prompt"]) + payload["max_tokens"] > self.length or greedy_several:
            return Reply({"error": {"message": "bad request"}}, status=400)
        choices = [{"index": i, **self.sample(payload, payload["seed"] + i)} for i in range(payload["n"])]
        return Reply({"object": "text_completion", "model": self.name, "choices": choices[::-1]})  # in no order

    def sample(self, payload: Any, seed: int) -> dict[str, Any]:
        """Return one choice."""
        noise, prompt = torch.Generator().manual_seed(seed), payload["prompt"]
        ids: list[int] = []
        logprobs: list[float] = []
        reason, stopped_by = "length", None
        while len(ids) < payload["max_tokens"] and stopped_by is None:
            raw = self.logits(payload.get("cache_salt"), prompt, ids)
            logits = processed(raw, payload, len(ids))
            token = int(logits.argmax()) if not payload["temperature"] else draw(logits, noise)
            ids.append(token)
            logprobs.append(float(torch.log_softmax(logits if self.processed else raw, 0)[token]))
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


def processed(logits: Tensor, payload: Any, length: int) -> Tensor:
    """Return logits (V,) behind `min_tokens`, temperature, `top_k` and `top_p`."""
    logits = logits / (payload["temperature"] or 1.0)
    if length < payload["min_tokens"]:
        logits = logits.index_fill(0, torch.tensor(payload["stop_token_ids"]), -torch.inf)
    if payload["top_k"] > 0:
        logits = logits.masked_fill(logits < logits.topk(payload["top_k"]).values[-1], -torch.inf)
    order = logits.argsort(descending=True)
    shares = torch.softmax(logits[order], 0)
    out = order[shares.cumsum(0) - shares > payload["top_p"]]
    return logits.index_fill(0, out, -torch.inf)


def draw(logits: Tensor, noise: torch.Generator) -> int:
    """Draw a token."""
    return int(torch.multinomial(torch.softmax(logits, 0), 1, generator=noise))


@contextmanager
def serve_vllm(folder: str, **settings: Any) -> Iterator[tuple[Service, VLLM]]:
    """Run one."""
    server = VLLM(folder, **settings)
    with serve(server.answer) as service:
        yield service, server


@contextmanager
def serve_changed(folder: str, change: Callable[[Choices], Any]) -> Iterator[Service]:
    """Run one whose choices are changed, in place or by what is returned."""
    server = VLLM(folder)

    def answer(request: Request, before: int) -> Reply:
        reply = server.answer(request, before)
        if request.path == "/v1/completions":
            choices = sorted(reply.body["choices"], key=lambda choice: choice["index"])
            reply.body["choices"] = change(choices) or choices
        return reply

    with serve(answer) as service:
        yield service
