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

from lit_rlhf.errors import UserError
from lit_rlhf.gather import from_rank_zero, several_ranks
from lit_rlhf.http import CredentialsRefused, JSONClient, NoAnswer
from lit_rlhf.models.export import write_model
from lit_rlhf.models.identity import fingerprint
from lit_rlhf.rollout.endings import Ending, TextEnds
from lit_rlhf.rollout.experience import Rollout
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.rollout.vllm_answers import Answers, Payload, choices_of

COLDEST = 0.01  # vLLM takes this in place of a lower temperature above 0


class VLLMGenerator:
    """Asks a running vLLM server for responses, and hands it the policy whenever its weights have changed.

    Rank zero writes the weights (adapters folded in) to a new folder, has the server read them, and removes them again;
    every rank asks for the responses to its own prompts. A request's seed depends on (seed, iteration, row) alone, so a
    resumed run sends the same requests. vLLM draws with noise of its own: not what the engines in this process draw.

    Its log-probs are of another implementation, so `ppo.logprobs` must be "recomputed".

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

    def check(self, sampling: Sampling, logprobs: str) -> None:
        """Refuse what vLLM does not do.

        Args:
            sampling: of the run.
            logprobs: `ppo.logprobs`.
        """
        if logprobs == "sampled":
            raise UserError(
                "ppo.logprobs is 'sampled', but vLLM's log-probs are of another implementation than the update's, and "
                "the ratio would not start at 1; set ppo.logprobs to 'recomputed', as -c generator/vllm does"
            )
        if 0 < sampling.temperature < COLDEST:
            raise UserError(
                f"sampling.temperature {sampling.temperature} would become {COLDEST} in vLLM; set it to {COLDEST} or "
                "more, or leave out model.generator"
            )

    def reach(self) -> None:
        """Ask which models are served.

        Raises:
            UserError: no server there, or none of that name.
        """
        served = self.asked(self.models, None, lambda answer: [each["id"] for each in answer["data"]])
        if isinstance(served, NoAnswer):
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
        sampling: Sampling,
        text_ends: TextEnds | None = None,
    ) -> Rollout:
        """See `Generator.generate`; of the noise, the first number of a prompt's rows becomes its request's seed."""
        ending, samples = Ending(model, sampling, text_ends), len(uniforms) // len(prompt_ids)
        self.hand_over(model)
        settings = self.settings(sampling, ending, samples)
        seeds = (uniforms[::samples, 0].double() * 2**53).long().tolist()
        prompts = [ids[kept].tolist() for ids, kept in zip(prompt_ids.cpu(), prompt_mask.cpu().bool())]
        payloads = [{**settings, "prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds)]
        table = Answers(model, len(uniforms), sampling, ending.ids.tolist(), self.where)
        row = 0
        try:
            for payload, answer in zip(payloads, self.completions.ask_all(payloads, choices_of)):
                if isinstance(answer, NoAnswer):
                    raise UserError(f"{self.where}: {answer.reason}; {self.mend(answer)}")
                table.fill(row, payload, answer)
                row += samples
        except CredentialsRefused as refusal:
            raise UserError(f"{refusal}; {self.advice}") from None
        return table.rollout(ending)

    def settings(self, sampling: Sampling, ending: Ending, samples: int) -> Payload:
        """Return what all requests have in common. Everything is said, for a server may have defaults of the model."""
        return {
            "model": self.model,
            "n": samples,
            "max_tokens": sampling.response_length,
            "min_tokens": sampling.min_length - 1,  # theirs does not count the end token
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p or 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # the end tokens are those that we name
            "stop_token_ids": ending.ids.tolist(),
            "stop": sampling.stop_strings,
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "cache_salt": self.version,  # else keys and values of earlier weights are found there
        }

    def hand_over(self, model: PreTrainedModel) -> None:
        """Have the server read the policy's weights, unless it holds them; every rank must call it.

        Raises:
            UserError: on all ranks, where it did not work.
        """
        problem = None
        if not several_ranks() or dist.get_rank() == 0:
            version = fingerprint(model)
            try:
                if version != self.version:
                    self.push(model, self.folder / version)
                    self.version = version
            except UserError as error:
                problem = str(error)
        self.version, problem = from_rank_zero((self.version, problem))
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
            answer = self.asked(self.rpc, call, lambda said: said["results"])
        except OSError as error:
            raise UserError(f"cannot hand the policy over in {str(target)!r}: {error.strerror}") from None
        finally:
            shutil.rmtree(target, ignore_errors=True)
        if isinstance(answer, NoAnswer):
            how = f"it must see the folder {str(self.folder)!r} and serve a model of that shape; its log says more"
            if "status 404" in answer.reason:
                how = "start it with VLLM_SERVER_DEV_MODE=1"
            raise UserError(f"{self.where}: it did not read the policy's weights ({answer.reason}); {how}")

    def asked(self, client: JSONClient, payload: Any, parse: Callable[[Any], Any]) -> Any:
        """Return an answer; a key that is refused says where it comes from."""
        try:
            return client.ask(payload, lambda said, _: parse(said))
        except CredentialsRefused as refusal:
            raise UserError(f"{refusal}; {self.advice}") from None

    def mend(self, answer: NoAnswer) -> str:
        """Return what to do about a request without an answer."""
        if "status 404" in answer.reason:
            return f"start it with --served-model-name {self.model}, or set model.generator.init_args.model"
        if "status 400" in answer.reason:
            return "prompt and sampling.response_length must fit its --max-model-len; its log says more"
        return "is the server up? its log says more"
