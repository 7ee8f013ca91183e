"""Generation by a vLLM server over HTTP, which reads the policy's weights from a shared folder.

Nothing of vLLM is imported here. The features relied on, by the pages of vLLM's documentation (v0.32.0):

- "OpenAI-Compatible Server", Completions API: a prompt of token ids, `n`, `seed`, `logprobs`, and of vLLM's own
  `return_token_ids` (the choices then hold `token_ids`), `stop_token_ids`, `ignore_eos`, `min_tokens`, `top_k`, and
  `stop_reason` in a choice; the server's model names in `/v1/models`.
- "What is Layerwise (Re)loading?": the worker method `reload_weights` with `weights_path`, a safetensors folder.
- "Sleep Mode": `POST /collective_rpc` calls such a method, on servers started with `VLLM_SERVER_DEV_MODE=1`.
- "Automatic Prefix Caching": `cache_salt` keeps a request from reading what other requests left in the prefix cache.
- "Engine Arguments": `--logprobs-mode processed_logprobs`, log-probs after temperature, top-k and top-p.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.distributed import broadcast_object, is_distributed
from lit_rlhf.errors import UserError
from lit_rlhf.generation.base import GenerationOutput, Generator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.generation.vllm_responses import Payload, ResponseTable, read_choices
from lit_rlhf.http import CredentialsRejected, JSONClient, RequestFailed
from lit_rlhf.models.export import write_model
from lit_rlhf.models.fingerprint import live_model_fingerprint
from lit_rlhf.progress import report_progress

MIN_TEMPERATURE = 0.01  # vLLM raises a lower temperature above 0 to this


class VLLMGenerator(Generator):
    """Requests responses from a running vLLM server, and syncs the policy's weights to it whenever they have changed.

    Rank zero writes the weights (adapters merged) to a new folder, has the server read them, and removes them again;
    every rank requests the responses to its own prompts. A request's seed depends on (seed, iteration, row) alone, so a
    resumed run sends the same requests. vLLM samples with noise of its own, so not the responses of `CachedGenerator`.

    Its log-probs come from another implementation, so `ppo.old_logprobs` must be "recompute".

    Args:
        folder: where the weights are written; the server must see it under the same absolute path.
        url: address of the server.
        model: the name under which it serves the policy (`--served-model-name`).
        parallel: concurrent requests per rank; each is a prompt with all its samples.
        timeout: seconds that a response or the reading of the weights may take.
        retries: further attempts after a failure that may pass, see `JSONClient`.
        pause: seconds before the second attempt.
        token_variable: environment variable that holds the server's `--api-key`; if it is unset, none is sent.
    """

    def __init__(
        self,
        folder: str,
        url: str = "http://127.0.0.1:8000",
        model: str = "policy",
        parallel: int = 256,
        timeout: float = 600.0,
        retries: int = 4,
        pause: float = 1.0,
        token_variable: str = "VLLM_API_KEY",
    ) -> None:
        token = os.environ.get(token_variable)
        headers = {"Authorization": f"Bearer {token}"} if token else {}

        def client(path: str, attempts: int = retries) -> JSONClient:
            return JSONClient(url.rstrip("/") + path, headers, timeout, attempts, pause, parallel=parallel)

        self.folder, self.model = Path(folder).expanduser().resolve(), model
        self.models, self.completions = client("/v1/models", 0), client("/v1/completions")
        self.rpc = client("/collective_rpc")
        self.name = f"vLLM at {self.models.without_query(url)}"
        self.key_hint = (
            f"it comes from the environment variable {token_variable}, which is {'' if token else 'not '}set"
        )
        self.weights_version = ""  # fingerprint of the weights that the server holds

    def check(self, sampling: SamplingParams, old_logprobs: str) -> None:
        """See `Generator.check`."""
        if old_logprobs == "rollout":
            raise UserError(
                "ppo.old_logprobs is 'rollout', but vLLM's log-probs come from another implementation than the "
                "update's, and the ratio would not start at 1; set ppo.old_logprobs to 'recompute', as "
                "-c generator/vllm does"
            )
        if 0 < sampling.temperature < MIN_TEMPERATURE:
            raise UserError(
                f"sampling.temperature {sampling.temperature} would become {MIN_TEMPERATURE} in vLLM; set it to "
                f"{MIN_TEMPERATURE} or more, or leave out model.generator"
            )

    def check_connection(self) -> None:
        """Refuse a server that does not answer, or that serves no model of that name."""
        served = self.request(self.models, None, lambda answer: [each["id"] for each in answer["data"]])
        if isinstance(served, RequestFailed):
            raise UserError(
                f"{self.name}: {served.reason}; start the server (docs/ppo.md, vLLM), or set "
                "model.generator.init_args.url"
            )
        if self.model not in served:
            raise UserError(
                f"{self.name}: it serves {', '.join(served)} and no {self.model!r}; start it with "
                f"--served-model-name {self.model}, or set model.generator.init_args.model"
            )

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """See `Generator.generate`; a request's seed is the first uniform of its prompt's rows."""
        stopping = StoppingCriteria(model, sampling, matches_stop_string)
        num_samples = len(uniforms) // len(prompts.input_ids)
        self.sync_weights(model)
        settings = self.request_settings(sampling, stopping, num_samples)
        seeds = (uniforms[::num_samples, 0].double() * 2**53).long().tolist()
        ids, mask = prompts.input_ids.cpu(), prompts.attention_mask.cpu().bool()
        payloads = [
            {**settings, "prompt": row[kept].tolist(), "seed": seed} for row, kept, seed in zip(ids, mask, seeds)
        ]
        table = ResponseTable(model, len(uniforms), sampling, stopping.stop_token_ids.tolist(), self.name)
        row = 0
        try:
            for payload, answer in zip(payloads, self.completions.request_all(payloads, read_choices)):
                if isinstance(answer, RequestFailed):
                    raise UserError(f"{self.name}: {answer.reason}; {self.hint(answer)}")
                table.fill(row, payload, answer)
                row += num_samples
                report_progress("generate", row, len(uniforms))
        except CredentialsRejected as refusal:
            raise UserError(f"{refusal}; {self.key_hint}") from None
        return table.output(stopping)

    def request_settings(self, sampling: SamplingParams, stopping: StoppingCriteria, num_samples: int) -> Payload:
        """Return the settings of all requests; every one explicit, for a server may take defaults from the model."""
        return {
            "model": self.model,
            "n": num_samples,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens - 1,  # does not count the end token
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p or 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # the end tokens are the stop_token_ids
            "stop_token_ids": stopping.stop_token_ids.tolist(),
            "stop": sampling.stop_strings,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "cache_salt": self.weights_version,  # else keys and values of earlier weights would be reused
        }

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Have the server read the policy's weights unless it holds them; every rank must call it.

        Raises:
            UserError: on all ranks, if it failed.
        """
        problem = None
        if not is_distributed() or dist.get_rank() == 0:
            version = live_model_fingerprint(model)
            try:
                if version != self.weights_version:
                    self.push_weights(model, self.folder / version)
                    self.weights_version = version
            except UserError as error:
                problem = str(error)
        self.weights_version, problem = broadcast_object((self.weights_version, problem))
        if problem is not None:
            raise UserError(problem)

    def push_weights(self, model: PreTrainedModel, target: Path) -> None:
        """Write the weights and have the server read them.

        Args:
            model: the policy.
            target: a folder that no other weights were read from: vLLM was seen to keep what it read from a path.
        """
        self.weights_version = ""  # unknown after a failure
        try:
            shutil.rmtree(target, ignore_errors=True)
            write_model(model, target)
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
            answer = self.request(self.rpc, call, lambda said: said["results"])
        except OSError as error:
            raise UserError(f"cannot write the policy's weights to {str(target)!r}: {error.strerror}") from None
        finally:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(answer, RequestFailed):
            how = f"it must see the folder {str(self.folder)!r} and serve a model of that shape; its log says more"
            if "status 404" in answer.reason:
                how = "start it with VLLM_SERVER_DEV_MODE=1"
            raise UserError(f"{self.name}: it did not read the policy's weights ({answer.reason}); {how}")

    def request(self, client: JSONClient, payload: Any, parse: Callable[[Any], Any]) -> Any:
        """Return a parsed response; a refused key says where it comes from."""
        try:
            return client.request(payload, lambda said, _: parse(said))
        except CredentialsRejected as refusal:
            raise UserError(f"{refusal}; {self.key_hint}") from None

    def hint(self, answer: RequestFailed) -> str:
        """Return what to do about a failed request."""
        if "status 404" in answer.reason:
            return f"start it with --served-model-name {self.model}, or set model.generator.init_args.model"
        if "status 400" in answer.reason:
            return "prompt and sampling.max_new_tokens must fit its --max-model-len; its log says more"
        return "is the server up? its log says more"
