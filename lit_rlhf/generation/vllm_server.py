"""The routes of a vLLM server that generation uses, and what its failures mean.

Nothing of vLLM is imported here. The routes, as a server of vLLM 0.32.0 answers them (`tests/contract`):

- `/v1/models`, `/v1/completions`, `/health`: always.
- `/server_info`, `/collective_rpc`, `/weight_info`, `/update_weight_version`, `/is_paused`, `/sleep`, `/wake_up`,
  `/is_sleeping`: in development mode (`VLLM_SERVER_DEV_MODE=1`).
- `/get_world_size`, `/init_weight_transfer_engine`, `/start_weight_update`, `/update_weights`,
  `/finish_weight_update`: the same, for weights from GPU to GPU (`--weight-transfer-config`).
- `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`: with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_rlhf.errors import UserError
from lit_rlhf.generation.vllm_responses import Payload, read_choices
from lit_rlhf.http import CredentialsRejected, JSONClient, RequestFailed

START = "start the server as docs/vllm.md says"
SAFE_BATCHED_TOKENS = 65536  # with fewer, a CPU server dies of chunked prompts whose requests carry seeds
# sizes in the text of a model
SHAPE_PATTERNS = {"vocab_size": r"org_vocab_size=(\d+)", "embedding_dim": r"embedding_dim=(\d+)"}
LAYER_GROUP = re.compile(r"^ *\(\d[\d, -]*\): (?:(\d+) x )?", re.MULTILINE)  # "(0-1): 2 x ", or "(0): " of one layer
HEALTH_INTERVAL, HEALTH_TIMEOUT = 2.0, 10.0  # seconds
MAX_PROBLEMS = 3  # consecutive health checks that end a rollout


class ServerSettings(NamedTuple):
    """What a server was started with."""

    dtype: str  # such as "float32"
    max_model_len: int  # tokens of prompt and response
    logprobs_mode: str
    device: str  # such as "cpu"
    chunks_prompts: bool
    max_batched_tokens: int
    shape: dict[str, int]  # of its model: vocab_size, embedding_dim, layers; those that `read_shape` finds
    max_lora_rank: int | None  # None without --enable-lora
    can_sleep: bool  # --enable-sleep-mode
    transfer_backend: str | None  # of --weight-transfer-config, such as "nccl"


class VLLMServer:
    """A client of one server.

    Args:
        url: its address.
        model: the name under which it serves the policy (`--served-model-name`).
        parallel: concurrent completions.
        timeout: seconds that a completion or the reading of weights may take.
        retries: further attempts at a completion after a failure that may pass, see `JSONClient`.
        pause: seconds before the second attempt.
        api_key_env: environment variable that holds the server's `--api-key`; if it is unset, none is sent.
    """

    def __init__(
        self, url: str, model: str, parallel: int, timeout: float, retries: int, pause: float, api_key_env: str
    ) -> None:
        token = os.environ.get(api_key_env)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url, self.model, self.parallel = url.rstrip("/"), model, parallel
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.name = f"vLLM at {JSONClient.without_query(url)}"
        self.key_hint = f"it comes from the environment variable {api_key_env}, which is {'' if token else 'not '}set"
        self._client("/v1/models")  # refuses an address that is none

    # ------------------------------------------------------------------------------------------------- what it is

    def served_models(self) -> list[str]:
        """Return the names of its models and adapters.

        Raises:
            UserError: it does not answer.
        """
        found = self._request("/v1/models", lambda answer: [each["id"] for each in answer["data"]])
        if isinstance(found, RequestFailed):
            raise self.error(f"{describe(found)}; {START}, or set model.generator.init_args.url")
        return list(found)

    def check(self) -> ServerSettings:
        """Return what it was started with.

        Raises:
            UserError: it does not answer, serves no model of that name, or was started with other options than
                rollouts need.
        """
        served = self.served_models()
        if self.model not in served:
            raise self.error(
                f"it serves {', '.join(served)} and no {self.model!r}; start it with --served-model-name {self.model}, "
                "or set model.generator.init_args.model"
            )
        settings = self._request("/server_info?config_format=json", read_settings)
        if isinstance(settings, RequestFailed):
            raise self.dev_mode_error(settings)
        inspection = self._request("/collective_rpc", read_shape, {"method": "get_model_inspection"})
        if isinstance(inspection, RequestFailed):
            raise self.dev_mode_error(inspection)
        settings = settings._replace(shape=inspection)
        if settings.logprobs_mode != "processed_logprobs":
            raise self.error(
                f"its log-probs are {settings.logprobs_mode!r}, before temperature and truncation; start it with "
                "--logprobs-mode processed_logprobs"
            )
        if settings.device == "cpu" and settings.chunks_prompts and settings.max_batched_tokens < SAFE_BATCHED_TOKENS:
            raise self.error(
                f"on a CPU it dies of prompts of over {settings.max_batched_tokens:,} tokens together; start it with "
                "--no-enable-chunked-prefill"
            )
        return settings

    def find_problem(self) -> str:
        """Return why it answers no requests; "" if it does, or is too busy to say."""
        health = self._request("/health", lambda text: text, timeout=HEALTH_TIMEOUT, decode=bytes.decode)
        if isinstance(health, RequestFailed):
            if "status 503" in health.reason:
                return "its engine has died; its log says why. Restart it, and resume the run"
            if "no response within" in health.reason:
                return ""
            return f"it has stopped ({health.reason}); restart it, and resume the run"
        paused = self._request("/is_paused", lambda answer: answer["is_paused"], timeout=HEALTH_TIMEOUT)
        return "it is paused; resume it (POST /resume, or POST /wake_up if it sleeps)" if paused is True else ""

    # ---------------------------------------------------------------------------------------------------- weights

    def weights_version(self) -> str:
        """Return the label of the weights that it holds: of the last `set_weights_version`, "default" after a start."""
        version = self._request("/weight_info", lambda answer: answer["weight_version"])
        if isinstance(version, RequestFailed):
            raise self.dev_mode_error(version)
        return str(version)

    def set_weights_version(self, version: str) -> None:
        """Label the weights that it holds."""
        answer = self._request("/update_weight_version", lambda answer: answer["success"], {"new_version": version})
        if isinstance(answer, RequestFailed):
            raise self.dev_mode_error(answer)

    def reload_weights(self, folder: Path) -> None:
        """Have it read the weights in a folder, which must stay until the next reload.

        It is asked once: after a failure it may hold part of the weights.
        """
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        answer = self._request("/collective_rpc", lambda said: said["results"], call, timeout=self.timeout)
        if isinstance(answer, RequestFailed):
            problem = self.find_problem()
            raise self.error(
                f"it did not read the policy's weights: {problem or describe(answer)}; it must see the folder "
                f"{str(folder.parent)!r} and serve a model of the policy's shape. It may hold part of them now: "
                "restart it, and resume the run"
            )

    def world_size(self) -> int:
        """Return the number of its workers, each on a GPU of its own."""
        size = self._request("/get_world_size", lambda answer: int(answer["world_size"]))
        if isinstance(size, RequestFailed):
            raise self.dev_mode_error(size)
        return int(size)

    def transfer_client(self, step: str) -> JSONClient:
        """Return a client for `control_transfer`; another thread can break its request off."""
        return self._client(f"/{step}", self.timeout)

    def control_transfer(self, step: str, payload: Payload | None = None, client: JSONClient | None = None) -> None:
        """Have it take a step of a transfer of weights from GPU to GPU; it is asked once.

        Args:
            step: the route, such as "start_weight_update".
            payload: of the route.
            client: of `transfer_client`; by default a new one.
        """
        client = client or self.transfer_client(step)
        answer = client.request(payload or {}, lambda said, _: said["message"])
        if isinstance(answer, RequestFailed):
            raise self.error(
                f"it did not take the policy's weights ({step}): {self.find_problem() or describe(answer)}; its log "
                "says more. It may hold part of them now: restart it, and resume the run"
            )

    def is_sleeping(self) -> bool:
        """Whether it is asleep, or a part of its memory is; also of one that is paused, which is a sleep of level 0."""
        answer = self._request("/is_sleeping", lambda said: said["is_sleeping"])
        if isinstance(answer, RequestFailed):
            raise self.dev_mode_error(answer)
        return bool(answer)

    def sleep(self) -> None:
        """Have it give its memory back, the weights included (level 2)."""
        self._change_memory("/sleep?level=2")

    def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """Have it take memory for a part again; its weights must then be pushed."""
        self._change_memory(f"/wake_up?tags={part}")

    def _change_memory(self, path: str) -> None:
        answer = self._request(path, lambda said: said["status"], {}, timeout=self.timeout)
        if isinstance(answer, RequestFailed):
            route = path.split("?")[0]
            raise self.error(
                f"it did not follow {route}: {describe(answer)}; its log says more, most often that the GPU's memory "
                "is taken: start it with a smaller --gpu-memory-utilization"
            )

    def load_adapter(self, name: str, folder: Path) -> None:
        """Have it read a PEFT folder and serve it as a model of that name."""
        call = {"lora_name": name, "lora_path": str(folder)}
        answer = self._request("/v1/load_lora_adapter", str, call, timeout=self.timeout, decode=bytes.decode)
        if isinstance(answer, RequestFailed):
            hint = f"it must see the folder {str(folder.parent)!r}; its log says more"
            if "status 404" in answer.reason:
                hint = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
            raise self.error(f"it did not load the policy's adapter: {self.find_problem() or describe(answer)}; {hint}")

    def unload_adapter(self, name: str) -> None:
        """Have it forget an adapter."""
        self._request("/v1/unload_lora_adapter", str, {"lora_name": name}, decode=bytes.decode)

    # ------------------------------------------------------------------------------------------------ completions

    def prompt_logprobs(self, model: str, prompt: list[int], salt: str) -> list[float]:
        """Return its log-prob of each token of a prompt but the first, at temperature 1."""
        payload = {
            "model": model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "cache_salt": salt,
        }

        def read(answer: Any) -> list[float]:
            given = answer["choices"][0]["prompt_logprobs"][1:]
            return [float(each[str(token)]["logprob"]) for token, each in zip(prompt[1:], given, strict=True)]

        answer = self._request("/v1/completions", read, payload, timeout=self.timeout)
        if isinstance(answer, RequestFailed):
            raise self.completion_error(answer)
        return answer

    def completion_client(self) -> JSONClient:
        """Return a client for `complete`; another thread can break its requests off."""
        return self._client("/v1/completions", self.timeout, self.retries, parallel=self.parallel)

    def complete(self, payloads: Sequence[Payload], client: JSONClient | None = None) -> Iterator[list[dict[str, Any]]]:
        """Yield the choices for each payload, in order.

        A server that stops, dies or is paused meanwhile ends it within seconds.

        Args:
            payloads: the requests.
            client: of `completion_client`; by default a new one.

        Raises:
            UserError: a request got no usable response.
        """
        client = client or self.completion_client()
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(client, done), daemon=True)
        watch.start()
        try:
            for answer in client.request_all(payloads, read_choices):
                if isinstance(answer, RequestFailed):
                    raise self.completion_error(answer)
                yield answer
        except CredentialsRejected as refusal:
            raise UserError(f"{refusal}; {self.key_hint}") from None
        finally:
            done.set()
            client.break_off("")  # else requests under way would be waited for, and tried again

    def _watch(self, client: JSONClient, done: threading.Event) -> None:
        """Break off the requests of a client when the server has had a problem for some seconds."""
        problems = 0
        while not done.wait(HEALTH_INTERVAL):
            try:
                problem = self.find_problem()
            except UserError:  # a rejected key, which the requests report
                return
            problems = problems + 1 if problem else 0
            if problems == MAX_PROBLEMS:
                client.break_off(problem)
                return

    # ----------------------------------------------------------------------------------------------------- errors

    def error(self, text: str) -> UserError:
        """Return an error that names the server."""
        return UserError(f"{self.name}: {text}")

    def dev_mode_error(self, failure: RequestFailed) -> UserError:
        """Return the error for a route of the development mode."""
        if "status 404" in failure.reason:
            return self.error("it has no routes for weights; start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1")
        return self.error(f"{self.find_problem() or describe(failure)}; its log says more")

    def completion_error(self, failure: RequestFailed) -> UserError:
        """Return the error for a request that got no usable response."""
        problem = self.find_problem()
        if problem:
            return self.error(problem)
        if "status 404" in failure.reason:
            hint = f"start it with --served-model-name {self.model}, or set model.generator.init_args.model"
        else:
            hint = "its log says more"
        return self.error(f"{describe(failure)}; {hint}")

    def _client(self, path: str, timeout: float = 60.0, retries: int = 0, **settings: Any) -> JSONClient:
        return JSONClient(self.url + path, self.headers, timeout, retries, self.pause, **settings)

    def _request(
        self,
        path: str,
        parse: Callable[[Any], Any],
        payload: Any = None,
        timeout: float = 60.0,
        decode: Callable[[bytes], Any] = json.loads,
    ) -> Any:
        """Return a parsed response or a `RequestFailed`; a refused key says where it comes from."""
        try:
            return self._client(path, timeout, decode=decode).request(payload, lambda said, _: parse(said))
        except CredentialsRejected as refusal:
            raise UserError(f"{refusal}; {self.key_hint}") from None


def describe(failure: RequestFailed) -> str:
    """Return a failure with the server's own words."""
    return f"{failure.reason}: {failure.message}" if failure.message else failure.reason


def read_settings(answer: Any) -> ServerSettings:
    """Return the settings in the response of `/server_info`."""
    config = answer["vllm_config"]
    model, scheduler = config["model_config"], config["scheduler_config"]
    return ServerSettings(
        dtype=model["dtype"].removeprefix("torch."),
        max_model_len=model["max_model_len"],
        logprobs_mode=model["logprobs_mode"],
        device=config["device_config"]["device"],
        chunks_prompts=scheduler["enable_chunked_prefill"],
        max_batched_tokens=scheduler["max_num_batched_tokens"],
        shape={},
        max_lora_rank=(config["lora_config"] or {}).get("max_lora_rank"),
        can_sleep=bool(model.get("enable_sleep_mode")),
        transfer_backend=(config.get("weight_transfer_config") or {}).get("backend"),
    )


def read_shape(answer: Any) -> dict[str, int]:
    """Return the sizes of a model in the response to `get_model_inspection`, a text like that of a torch module."""
    text = answer["results"][0]
    found = {name: re.search(pattern, text) for name, pattern in SHAPE_PATTERNS.items()}
    sizes = {name: int(match[1]) for name, match in found.items() if match}
    groups = LAYER_GROUP.findall(text)
    # equal layers are one group. With several, none is all layers: layers that differ, those that another worker of a
    # pipeline holds (PPMissingLayer), or a second list
    return sizes | ({"layers": int(groups[0] or 1)} if len(groups) == 1 else {})
