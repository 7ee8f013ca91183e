"""Requests whose answers by a real vLLM server are recorded, and to which the stand-in of the tests is held.

`python -m tests.helpers.vllm_recording` records them again, with the environment of `make peers-vllm`.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.models.export import write_untied_model
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.peft_folder import write_adapter
from tests.helpers.vllm_models import write_model

RECORDING = Path(__file__).resolve().parents[1] / "contract" / "recordings" / "vllm-0.32.0.json"
MODEL, MAX_MODEL_LEN = "llama-tied", 128
OPTIONS = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--enable-lora", "--max-lora-rank", "8")
PROMPT = [5, 6, 7, 9]
ALL: dict[str, Any] = {
    "model": "policy",
    "prompt": PROMPT,
    "n": 1,
    "max_tokens": 6,
    "min_tokens": 0,
    "temperature": 0.0,
    "top_k": -1,
    "top_p": 1.0,
    "seed": 3,
    "ignore_eos": True,
    "stop_token_ids": [1],
    "stop": [],
    "logprobs": 0,
    "return_token_ids": True,
    "cache_salt": "first",
}
PROBE = {"model": "policy", "prompt": PROMPT, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
COMPLETIONS, RPC = "/v1/completions", "/collective_rpc"


def reload(folder: str) -> dict[str, Any]:
    return {"method": "reload_weights", "kwargs": {"weights_path": f"{{{folder}}}"}}


# what is asked, in this order: name, path and payload; {name} is the path of a folder
EXCHANGES: list[tuple[str, str, Any]] = [
    ("models", "/v1/models", None),
    ("health", "/health", None),
    ("settings", "/server_info?config_format=json", None),
    ("shape", RPC, {"method": "get_model_inspection"}),
    ("version of a started server", "/weight_info", None),
    ("paused", "/is_paused", None),
    ("greedy", COMPLETIONS, ALL),
    ("greedy, hot", COMPLETIONS, ALL | {"temperature": 1.0, "top_k": 1}),
    ("two samples", COMPLETIONS, ALL | {"temperature": 1.0, "n": 2}),
    ("a stop token", COMPLETIONS, ALL | {"stop_token_ids": "{third token}"}),
    ("a stop token before min_tokens", COMPLETIONS, ALL | {"stop_token_ids": "{third token}", "min_tokens": 4}),
    ("a stop string", COMPLETIONS, ALL | {"stop": "{third word}"}),
    ("an unknown field", COMPLETIONS, ALL | {"unknown": 1}),
    ("cut by the longest sequence", COMPLETIONS, ALL | {"prompt": PROMPT * 31, "max_tokens": 20}),
    ("a prompt over the longest sequence", COMPLETIONS, ALL | {"prompt": PROMPT * 33}),
    ("five stop strings", COMPLETIONS, ALL | {"stop": ["a", "b", "c", "d", "e"]}),
    ("several greedy samples", COMPLETIONS, ALL | {"n": 2}),
    ("another model", COMPLETIONS, ALL | {"model": "other"}),
    ("a path that is none", "/v1/nothing", {}),
    ("log-probs of a prompt", COMPLETIONS, PROBE),
    ("set version", "/update_weight_version", {"new_version": "second"}),
    ("version that was set", "/weight_info", None),
    ("load an adapter", "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": "{adapter}"}),
    ("models with an adapter", "/v1/models", None),
    ("log-probs of the adapter", COMPLETIONS, PROBE | {"model": "policy-1"}),
    ("load an adapter that is not there", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "{nothing}"}),
    ("unload the adapter", "/v1/unload_lora_adapter", {"lora_name": "policy-1"}),
    ("unload it again", "/v1/unload_lora_adapter", {"lora_name": "policy-1"}),
    ("reload without the output layer", RPC, reload("tied")),
    ("log-probs with the old output layer", COMPLETIONS, PROBE),
    ("reload with the output layer", RPC, reload("untied")),
    ("log-probs of the new weights", COMPLETIONS, PROBE),
    ("greedy with another salt", COMPLETIONS, ALL | {"cache_salt": "second"}),
    ("workers", "/get_world_size", None),
    ("awake", "/is_sleeping", None),
    ("a transfer that it was not started for", "/init_weight_transfer_engine", {"init_info": {}}),
    ("sleep", "/sleep?level=2", {}),
    ("asleep", "/is_sleeping", None),
    ("paused while asleep", "/is_paused", None),
    ("wake its weights", "/wake_up?tags=weights", {}),
    ("wake its cache", "/wake_up?tags=kv_cache", {}),
    ("awake again", "/is_sleeping", None),
    ("reload from nowhere", RPC, reload("nothing")),
    ("health after a failed reload", "/health", None),
    ("greedy after a failed reload", COMPLETIONS, ALL | {"cache_salt": "third"}),
]


class Answer(NamedTuple):
    """An answer of a server: its status, and its body, JSON or text."""

    status: int
    body: Any


def write_folders(root: Path, tokenizer: Any) -> dict[str, str]:
    """Write the model that the server starts from, changed ones and an adapter; return the folders by name."""
    folders = {name: str(root / name) for name in ("start", "tied", "untied", "adapter", "nothing")}
    write_model(MODEL, Path(folders["start"]), tokenizer)
    changed = AutoModelForCausalLM.from_pretrained(folders["start"])
    with torch.no_grad():
        for index, weight in enumerate(changed.parameters()):
            weight.mul_(1.0 + 0.3 * (-1) ** index)
    changed.save_pretrained(folders["tied"])
    write_untied_model(changed, Path(folders["untied"]))
    adapted, lora = AutoModelForCausalLM.from_pretrained(folders["start"]), LoRA(rank=4, alpha=8)
    add_lora(adapted, lora)
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0.0, 0.2, generator=generator)
    Path(folders["adapter"]).mkdir()
    base = (folders["start"], ModelLoadingConfig())
    write_adapter(Path(folders["adapter"]), dict(adapted.named_parameters()), lora, base)
    return folders


def play(url: str, folders: dict[str, str]) -> dict[str, Answer]:
    """Ask a server everything; return its answers by name."""
    answers: dict[str, Answer] = {}
    values: dict[str, Any] = {f"{{{name}}}": path for name, path in folders.items()}
    for name, path, payload in EXCHANGES:
        answers[name] = ask(url + path, fill_in(payload, values))
        if name == "greedy":
            choice = answers[name].body["choices"][0]
            values["{third token}"] = [choice["token_ids"][2]]
            values["{third word}"] = [[*choice["text"].split(), "w1", "w1", "w1"][2]]
    return answers


def fill_in(payload: Any, values: dict[str, Any]) -> Any:
    """Return a payload with values in the place of their names."""
    if isinstance(payload, dict):
        return {name: fill_in(value, values) for name, value in payload.items()}
    return values.get(payload, payload) if isinstance(payload, str) else payload


def ask(url: str, payload: Any) -> Answer:
    """Send one request."""
    body = None if payload is None else json.dumps(payload).encode()
    request = Request(url, body, {"Content-Type": "application/json"})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=300) as response:
            return Answer(response.status, decode(response.read()))
    except HTTPError as error:
        return Answer(error.code, decode(error.read()))


def decode(body: bytes) -> Any:
    """Return JSON, or a text that is none."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


def is_read(name: str) -> bool:
    """Whether a key of an answer is recorded: what tells one server from another is not."""
    return name not in ("id", "created", "usage", "permission", "root", "vllm_env", "system_env", "instance_id")


def without_paths(value: Any, folders: dict[str, str]) -> Any:
    """Return an answer without the paths of this machine, and without what no client reads."""
    if isinstance(value, dict):
        return {name: without_paths(each, folders) for name, each in value.items() if is_read(name)}
    if isinstance(value, list):
        return [without_paths(each, folders) for each in value]
    if isinstance(value, str):
        for name, path in folders.items():
            value = value.replace(path, f"{{{name}}}")
    return value


SETTINGS = {
    "model_config": ("dtype", "max_model_len", "logprobs_mode", "enable_sleep_mode"),
    "scheduler_config": ("enable_chunked_prefill", "max_num_batched_tokens"),
    "device_config": ("device",),
    "lora_config": ("max_lora_rank",),
}


def main() -> None:
    """Record the answers of a real server."""
    from tests.helpers.real_vllm import run_vllm
    from tests.helpers.word_tokenizer import word_tokenizer

    with tempfile.TemporaryDirectory() as root:
        folders = write_folders(Path(root), word_tokenizer())
        with run_vllm(folders["start"], Path(root) / "log", *OPTIONS) as server:
            answers = play(server.url, folders)
    config = answers["settings"].body["vllm_config"]
    kept: dict[str, Any] = {part: {name: config[part][name] for name in names} for part, names in SETTINGS.items()}
    kept["weight_transfer_config"] = config["weight_transfer_config"]
    answers["settings"] = Answer(200, {"vllm_config": kept})
    recorded = {name: without_paths(answer._asdict(), folders) for name, answer in answers.items()}
    RECORDING.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
