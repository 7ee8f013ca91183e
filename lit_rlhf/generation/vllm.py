"""vLLM as a rollout engine: a server of its own, asked over HTTP, that takes the policy's weights from a shared folder.

Nothing of vLLM is imported here. What is relied on, by the pages of vLLM's documentation (the latest, about v0.32.0):

- "OpenAI-Compatible Server", Completions API: a prompt of token ids, `n`, `seed`, `logprobs`, and of vLLM's own
  `return_token_ids` (the choices then hold `token_ids`), `stop_token_ids`, `ignore_eos`, `min_tokens`, `top_k`, and
  `stop_reason` in a choice; the server's model names in `/v1/models`.
- "What is Layerwise (Re)loading?": the worker method `reload_weights` with `weights_path`, a safetensors folder.
- "Sleep Mode": `POST /collective_rpc` calls such a method, on servers started with `VLLM_SERVER_DEV_MODE=1`.
- "Automatic Prefix Caching": `cache_salt` keeps requests apart from what other requests left in the cache.
- "Engine Arguments": `--logprobs-mode processed_logprobs`, log-probs behind temperature and truncation.
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

from lit_rlhf.distributed import broadcast_object, is_distributed
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.generation.vllm_responses import Payload, ResponseTable, choices_of
from lit_rlhf.http import CredentialsRefused, JSONClient, RequestFailed
from lit_rlhf.models.export import write_model
from lit_rlhf.models.fingerprint import live_model_fingerprint
from lit_rlhf.rollout.experience import GenerationOutput

MIN_TEMPERATURE = 0.01  # vLLM takes this in place of a lower temperature above 0


class VLLMGenerator:
    """Asks a running vLLM server for responses, and hands it the policy whenever its weights have changed.

    Rank zero writes the weights (adapters folded in) to a new folder, has the server read them, and removes them again;
    every rank asks for the responses to its own prompts. A request's seed depends on (seed, iteration, row) alone, so a
    resumed run sends the same requests. vLLM draws with noise of its own: not what the engines in this process draw.

    Its log-probs are of another implementation, so `ppo.old_logprobs` must be "recomputed".

    Args:
        folder: where the weights are handed over; the server must see it under the same absolute path.
        url: address of the server.
        model: the name that it serves the policy under (`--served-model-name`).
        parallel: requests under way at once, from each rank; each is a prompt with all its samples.
        timeout: seconds that an answer may take, or the reading of the weights.
        retries: further tries after a failure that may pass, see `JSONClient`.
        pause: seconds before the second try.
        token_variable: environment variable with the server's `--api-key`; where it is not set, none is sent.
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

        def client(path: str, tries: int = retries) -> JSONClient:
            return JSONClient(url.rstrip("/") + path, headers, timeout, tries, pause, parallel=parallel)

        self.folder, self.model = Path(folder).expanduser().resolve(), model
        self.models, self.completions = client("/v1/models", 0), client("/v1/completions")
        self.rpc = client("/collective_rpc")
        self.where = f"vLLM at {self.models.public(url)}"
        self.advice = f"it comes from the environment variable {token_variable}, which is {'' if token else 'not '}set"
        self.version = ""  # of the weights that the server holds, by their values

    def check(self, sampling: SamplingParams, logprobs: str) -> None:
        """Refuse what vLLM does not do.

        Args:
            sampling: of the run.
            logprobs: `ppo.old_logprobs`.
        """
        if logprobs == "sampled":
            raise UserError(
                "ppo.old_logprobs is 'sampled', but vLLM's log-probs are of another implementation than the update's, and "
                "the ratio would not start at 1; set ppo.old_logprobs to 'recomputed', as -c generator/vllm does"
            )
        if 0 < sampling.temperature < MIN_TEMPERATURE:
            raise UserError(
                f"sampling.temperature {sampling.temperature} would become {MIN_TEMPERATURE} in vLLM; set it to {MIN_TEMPERATURE} or "
                "more, or leave out model.generator"
            )

    def check_connection(self) -> None:
        """Ask which models are served.

        Raises:
            UserError: no server there, or none of that name.
        """
        served = self.request(self.models, None, lambda answer: [each["id"] for each in answer["data"]])
        if isinstance(served, RequestFailed):
            raise UserError(
                f"{self.where}: {served.reason}; start the server (docs/ppo.md, vLLM), or set "
                "model.generator.init_args.url"
            )
        if self.model not in served:
            raise UserError(
                f"{self.where}: it serves {', '.join(served)} and no {self.model!r}; start it with "
                f"--served-model-name {self.model}, or set model.generator.init_args.model"
            )

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: SamplingParams,
        stop_string_matcher: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """See `Generator.generate`; of the noise, the first number of a prompt's rows becomes its request's seed."""
        ending, samples = StoppingCriteria(model, sampling, stop_string_matcher), len(uniforms) // len(prompt_ids)
        self.sync_weights(model)
        settings = self.settings(sampling, ending, samples)
        seeds = (uniforms[::samples, 0].double() * 2**53).long().tolist()
        prompts = [ids[kept].tolist() for ids, kept in zip(prompt_ids.cpu(), prompt_mask.cpu().bool())]
        payloads = [{**settings, "prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds)]
        table = ResponseTable(model, len(uniforms), sampling, ending.stop_token_ids.tolist(), self.where)
        row = 0
        try:
            for payload, answer in zip(payloads, self.completions.ask_all(payloads, choices_of)):
                if isinstance(answer, RequestFailed):
                    raise UserError(f"{self.where}: {answer.reason}; {self.hint(answer)}")
                table.fill(row, payload, answer)
                row += samples
        except CredentialsRefused as refusal:
            raise UserError(f"{refusal}; {self.advice}") from None
        return table.rollout(ending)

    def settings(self, sampling: SamplingParams, ending: StoppingCriteria, samples: int) -> Payload:
        """Return what all requests have in common. Everything is said, for a server may have defaults of the model."""
        return {
            "model": self.model,
            "n": samples,
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens - 1,  # theirs does not count the end token
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p or 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # the end tokens are those that we name
            "stop_token_ids": ending.stop_token_ids.tolist(),
            "stop": sampling.stop_strings,
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "cache_salt": self.version,  # else keys and values of earlier weights are found there
        }

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Have the server read the policy's weights, unless it holds them; every rank must call it.

        Raises:
            UserError: on all ranks, where it did not work.
        """
        problem = None
        if not is_distributed() or dist.get_rank() == 0:
            version = live_model_fingerprint(model)
            try:
                if version != self.version:
                    self.push(model, self.folder / version)
                    self.version = version
            except UserError as error:
                problem = str(error)
        self.version, problem = broadcast_object((self.version, problem))
        if problem is not None:
            raise UserError(problem)

    def push(self, model: PreTrainedModel, target: Path) -> None:
        """Write the weights and have them read.

        Args:
            model: the policy.
            target: a folder of a name that no other weights had: vLLM was seen to keep what it read from a path.
        """
        self.version = ""  # what the server holds after a failure is not known
        try:
            shutil.rmtree(target, ignore_errors=True)
            write_model(model, target)
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}
            answer = self.request(self.rpc, call, lambda said: said["results"])
        except OSError as error:
            raise UserError(f"cannot hand the policy over in {str(target)!r}: {error.strerror}") from None
        finally:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(answer, RequestFailed):
            how = f"it must see the folder {str(self.folder)!r} and serve a model of that shape; its log says more"
            if "status 404" in answer.reason:
                how = "start it with VLLM_SERVER_DEV_MODE=1"
            raise UserError(f"{self.where}: it did not read the policy's weights ({answer.reason}); {how}")

    def request(self, client: JSONClient, payload: Any, parse: Callable[[Any], Any]) -> Any:
        """Return an answer; a key that is refused says where it comes from."""
        try:
            return client.ask(payload, lambda said, _: parse(said))
        except CredentialsRefused as refusal:
            raise UserError(f"{refusal}; {self.advice}") from None

    def hint(self, answer: RequestFailed) -> str:
        """Return what to do about a request without an answer."""
        if "status 404" in answer.reason:
            return f"start it with --served-model-name {self.model}, or set model.generator.init_args.model"
        if "status 400" in answer.reason:
            return "prompt and sampling.max_new_tokens must fit its --max-model-len; its log says more"
        return "is the server up? its log says more"
