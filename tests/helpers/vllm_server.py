"""A stand-in for a vLLM server: it holds a model and decodes one token at a time.

It is held to recorded answers of a real server (`tests/generation/test_vllm_stand_in.py`), and has the properties that
a careless client overlooks: a prefix cache that outlives new weights, a tied output layer that is a copy of the
embedding, an end token that counts only where the request names it, stop strings that are not searched before
`min_tokens`, responses that are cut silently, weights that are gone after a sleep, and a model that stays broken after
a reload that failed.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.services import Reply, Request, Service, serve

MAX_STOP_STRINGS = 4
TRANSFER_PATIENCE = 2.0  # seconds that weights are waited for, in place of for ever
MEMORY = {"weights", "kv_cache"}  # that a sleeping server has given back
Choices = list[dict[str, Any]]


class FakeVLLM:
    """State of the server.

    Args:
        folder: of the model that it starts with.
        name: under which it serves the model.
        max_model_len: largest number of tokens of prompt and response.
        settings: in place of those that `/server_info` tells.
    """

    def __init__(self, folder: str, name: str = "policy", max_model_len: int = 128, **settings: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder, self.name, self.max_model_len, self.settings = folder, name, max_model_len, settings
        self.weights_paths: list[str] = []  # that weights were read from
        self.lock = threading.Lock()
        self.query: dict[str, list[str]] = {}  # of the request
        self.restart()

    def restart(self) -> None:
        """Hold the initial weights, as a server that was started again."""
        self.model = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        head = copy.deepcopy(self.model.get_output_embeddings())  # packed, so a copy of a tied embedding
        self.model.set_output_embeddings(head)
        self.adapters: dict[str, Any] = {}  # a model for each
        self.version, self.is_paused, self.is_broken = "default", False, False
        self.asleep: set[str] = set()
        self.transfer: list[str] = []  # the steps of a transfer of weights since it began
        self.cache: dict[Any, Tensor] = {}  # logits after a prompt, in place of the keys and values of prefix caching

    def answer(self, request: Request, before: int) -> Reply:
        """Answer one request."""
        parts = urlsplit(request.path)
        route = getattr(self, "answer_" + parts.path.strip("/").replace("/", "_"), None)
        if route is None:
            return Reply({"detail": "Not Found"}, status=404)
        with self.lock, torch.no_grad():
            self.query = parse_qs(parts.query)
            return route(request.payload)

    def answer_health(self, _: None) -> Reply:
        return Reply(b"")

    def answer_v1_models(self, _: None) -> Reply:
        data = [{"id": self.name, "object": "model", "parent": None, "max_model_len": self.max_model_len}]
        data += [{"id": name, "object": "model", "parent": self.name, "max_model_len": None} for name in self.adapters]
        return Reply({"object": "list", "data": data})

    def answer_server_info(self, _: None) -> Reply:
        settings = {
            "dtype": f"torch.{str(self.model.dtype).removeprefix('torch.')}",
            "logprobs_mode": "processed_logprobs",
            "device": "cpu",
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 2048,
            "max_lora_rank": 8,
            "enable_sleep_mode": False,
            "backend": None,
            **self.settings,
        }
        model = {name: settings[name] for name in ("dtype", "logprobs_mode", "enable_sleep_mode")}
        scheduler = {name: settings[name] for name in ("enable_chunked_prefill", "max_num_batched_tokens")}
        config = {
            "model_config": model | {"max_model_len": self.max_model_len},
            "scheduler_config": scheduler,
            "device_config": {"device": settings["device"]},
            "lora_config": {"max_lora_rank": settings["max_lora_rank"]},
            "weight_transfer_config": settings["backend"] and {"backend": settings["backend"]},
        }
        return Reply({"vllm_config": config})

    def answer_weight_info(self, _: None) -> Reply:
        return Reply({"weight_version": self.version})

    def answer_update_weight_version(self, payload: Any) -> Reply:
        self.version = payload["new_version"]
        return Reply({"success": True, "new_version": self.version})

    def answer_is_paused(self, _: None) -> Reply:
        return Reply({"is_paused": self.is_paused or bool(self.asleep)})

    def answer_is_sleeping(self, _: None) -> Reply:
        return Reply({"is_sleeping": self.is_paused or bool(self.asleep)})  # a pause is a sleep of level 0

    def answer_sleep(self, _: Any) -> Reply:
        self.asleep = set(MEMORY)
        level = int(self.query["level"][0])
        for weight in self.model.parameters() if level == 2 else ():
            weight.zero_()
        return Reply({"status": "sleeping", "level": level})

    def answer_wake_up(self, _: Any) -> Reply:
        self.asleep -= set(self.query["tags"])
        return Reply({"status": "sleeping" if self.asleep else "awake", "tags": self.query["tags"]})

    def answer_get_world_size(self, _: None) -> Reply:
        return Reply({"world_size": 1})

    def answer_init_weight_transfer_engine(self, payload: Any) -> Reply:
        if self.settings.get("backend") is None:
            return Reply(error_body("Weight transfer not configured.", 500), status=500)
        self.transfer = ["init", *self.transfer[1:]]  # an update that was left stays under way
        return Reply({"message": "Weight transfer initialized"})

    def answer_start_weight_update(self, _: Any) -> Reply:
        if not self.transfer or "start" in self.transfer:
            return Reply(error_body("a weight update is already active, or not connected", 500), status=500)
        self.transfer.append("start")
        return Reply({"message": "Weight update started"})

    def answer_update_weights(self, payload: Any) -> Reply:
        """Read the weights that the stand-in for the package has sent, see `tests/helpers/vllm_transfer.py`."""
        if "start" not in self.transfer or "weights" in self.asleep:
            return Reply(error_body("start_weight_update must be called before update_weights.", 500), status=500)
        info = payload["update_info"]
        file, last = Path(info["file"]), time.monotonic() + TRANSFER_PATIENCE
        while not file.exists():  # by NCCL they are sent once it waits for them
            if time.monotonic() > last:
                return Reply(error_body("the weights did not come", 500), status=500)
            time.sleep(0.01)
        weights = load_file(file)
        file.unlink()
        assert list(weights) == sorted(info["names"])
        assert all(list(weights[name].shape) == shape for name, shape in zip(info["names"], info["shapes"]))
        self.model.load_state_dict(weights, strict=False)
        if "lm_head.weight" not in weights:  # on a GPU a tied output layer is the embedding
            self.model.get_output_embeddings().weight.copy_(self.model.get_input_embeddings().weight)
        self.transfer.append("update")
        return Reply({"message": "Weights updated"})

    def answer_finish_weight_update(self, _: Any) -> Reply:
        self.transfer = ["init"]
        self.weights_paths.append("")
        return Reply({"message": "Weight update finished"})

    def answer_collective_rpc(self, payload: Any) -> Reply:
        if payload["method"] == "get_model_inspection":
            return Reply({"results": [self.inspection()]})
        assert payload["method"] == "reload_weights" and payload["kwargs"].keys() == {"weights_path"}
        return self.reload(Path(payload["kwargs"]["weights_path"]))

    def reload(self, path: Path) -> Reply:
        """Read the weights in a folder, by their names."""
        files = list(path.glob("*.safetensors")) if path.is_absolute() else []
        try:
            if "weights" in self.asleep:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if not files:
                raise RuntimeError(f"Cannot find any model weights with `{path}`")
            weights = {name: weight for file in files for name, weight in load_file(file).items()}
            self.model.load_state_dict(weights, strict=False)  # an output layer that is not in it stays
        except RuntimeError as error:
            self.is_broken = True
            return Reply(error_body(str(error), 500), status=500)
        self.weights_paths.append(str(path))
        return Reply({"results": [None]})

    def inspection(self) -> str:
        """Return the model as a text, of which three sizes are read."""
        config = self.model.config
        sizes = (
            f"embedding_dim={config.hidden_size}, org_vocab_size={self.settings.get('vocab_size', config.vocab_size)}"
        )
        last = config.num_hidden_layers - 1
        return f"Model()(\n (embed_tokens): Embedding({sizes})\n (layers): (\n  (0-{last}): {last + 1} x Layer()(\n"

    def answer_v1_load_lora_adapter(self, payload: Any) -> Reply:
        from peft import PeftModel

        path = Path(payload["lora_path"])
        if not (path / "adapter_config.json").is_file():
            return Reply(error_body(f"No adapter found for {path}", 404), status=404)
        adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), path)
        self.adapters[payload["lora_name"]] = adapted.merge_and_unload()
        self.weights_paths.append(str(path))
        return Reply(f"Success: LoRA adapter '{payload['lora_name']}' added successfully.".encode())

    def answer_v1_unload_lora_adapter(self, payload: Any) -> Reply:
        if self.adapters.pop(payload["lora_name"], None) is None:
            return Reply(error_body(f"The lora adapter '{payload['lora_name']}' cannot be found.", 404), status=404)
        return Reply(f"Success: LoRA adapter '{payload['lora_name']}' removed successfully.".encode())

    def answer_v1_completions(self, payload: Any) -> Reply:
        payload = {"n": 1, "stop": [], "stop_token_ids": [], "min_tokens": 0, "seed": 0, **payload}
        payload = {"top_k": 0, "top_p": 1.0, "ignore_eos": False, **payload}
        name, prompt = payload["model"], payload["prompt"]
        if name != self.name and name not in self.adapters:
            return Reply(error_body(f"The model `{name}` does not exist.", 404), status=404)
        if self.is_broken or self.asleep:
            return Reply(error_body("EngineCore encountered an issue.", 500), status=500)
        problem = self.find_problem(payload)
        if problem:
            return Reply(error_body(problem, 400), status=400)
        payload["max_tokens"] = min(payload["max_tokens"], self.max_model_len - len(prompt))
        choices = [{"index": i, **self.sample(payload, payload["seed"] + i)} for i in range(payload["n"])]
        return Reply({"object": "text_completion", "model": name, "choices": choices[::-1]})  # not in order

    def find_problem(self, payload: Any) -> str:
        """Return why a request is refused."""
        if len(payload["stop"]) > MAX_STOP_STRINGS:
            return f"stop: at most {MAX_STOP_STRINGS} stop sequences"
        if payload["temperature"] == 0 and payload["n"] > 1:
            return "n must be 1 when using greedy sampling"
        if len(payload["prompt"]) >= self.max_model_len:
            return f"This model's maximum context length is {self.max_model_len} tokens"
        return ""

    def prompt_logprobs(self, payload: Any) -> list[Any] | None:
        """Return the log-probs of a prompt's tokens."""
        if payload.get("prompt_logprobs") is None:
            return None
        ids = torch.tensor([payload["prompt"]])
        logprobs = torch.log_softmax(self.model_of(payload)(ids).logits[0].float(), -1)
        rows = zip(payload["prompt"][1:], logprobs)
        return [None, *({str(token): {"logprob": float(row[token]), "rank": 1}} for token, row in rows)]

    def model_of(self, payload: Any) -> Any:
        """Return the model that a request names."""
        return self.adapters.get(payload["model"], self.model)

    def sample(self, payload: Any, seed: int) -> dict[str, Any]:
        """Return one choice."""
        generator, prompt = torch.Generator().manual_seed(seed), payload["prompt"]
        ids: list[int] = []
        logprobs: list[float] = []
        reason, stopped_by = "length", None
        while len(ids) < payload["max_tokens"] and stopped_by is None:
            # before `min_tokens` the model's own end token is left out as well, whatever the request says
            ends = [*payload["stop_token_ids"], self.tokenizer.eos_token_id]
            logits = process_logits(self.logits(payload, prompt, ids), payload | {"ends": ends}, len(ids))
            token = int(logits.argmax()) if not payload["temperature"] else sample_token(logits, generator)
            ids.append(token)
            logprobs.append(float(torch.log_softmax(logits, 0)[token]))
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
            "prompt_logprobs": self.prompt_logprobs(payload),
        }

    def logits(self, payload: Any, prompt: list[int], ids: list[int]) -> Tensor:
        """Return the next token's logits, (V,)."""
        model = self.model_of(payload)
        if ids:
            return model(torch.tensor([prompt + ids])).logits[0, -1].float()
        key = (payload["model"], payload.get("cache_salt"), *prompt)
        if key not in self.cache:
            self.cache[key] = model(torch.tensor([prompt])).logits[0, -1].float()
        return self.cache[key]


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": "Error", "param": None, "code": status}}


def process_logits(logits: Tensor, payload: Any, length: int) -> Tensor:
    """Return logits (V,) after `min_tokens`, temperature, `top_k` and `top_p`."""
    logits = logits / (payload["temperature"] or 1.0)
    if length < payload["min_tokens"]:
        logits = logits.index_fill(0, torch.tensor(payload["ends"]), -torch.inf)
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
        if request.path == "/v1/completions" and "prompt_logprobs" not in request.payload:
            choices = sorted(reply.body["choices"], key=lambda choice: choice["index"])
            reply.body["choices"] = modify(choices) or choices
        return reply

    with serve(answer) as service:
        yield service


def order_of_requests(service: Service) -> str:
    """Return the requests that a server got, in order: "w" for weights to read, "." for responses."""
    payloads = [request.payload or {} for request in service.requests]
    return "".join(
        "w" if each.get("method") == "reload_weights" else "." if "seed" in each else "" for each in payloads
    )
