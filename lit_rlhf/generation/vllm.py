"""Generation by a vLLM server over HTTP, which gets the policy's weights, or its adapter, after each change."""

import hashlib
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.distributed import all_gather_object, broadcast_object, full_tensor, is_rank_zero, reshard
from lit_rlhf.errors import UserError
from lit_rlhf.functional import token_logprobs
from lit_rlhf.generation.base import GenerationOutput, RemoteGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.generation.vllm_responses import Payload, ResponseTable
from lit_rlhf.generation.vllm_server import ServerSettings, VLLMServer
from lit_rlhf.generation.vllm_transfer import NativeTransfer
from lit_rlhf.http import JSONClient
from lit_rlhf.models.export import write_untied_model
from lit_rlhf.models.fingerprint import live_model_fingerprint, live_weights_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.lora import policy_lora, policy_state_dict
from lit_rlhf.models.peft_folder import write_adapter
from lit_rlhf.paths import expand_path
from lit_rlhf.progress import report_progress

MIN_TEMPERATURE = 0.01  # vLLM raises a lower temperature above 0 to this
MAX_STOP_STRINGS = 4  # of a request to vLLM; responses are cut by all of them here
MAX_ROLLOUTS = 2  # attempts at a batch whose server lost the weights meanwhile
PROBE_TOKENS = 128
MAX_MISMATCH = {"float32": 5e-4, "float16": 0.1, "bfloat16": 0.1}  # nats per token, by the server's dtype
LABEL = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
INCOMPLETE = "incomplete"  # in place of a label while a server reads weights
ASLEEP = "asleep "  # before the label of weights that a sleeping server has forgotten
Value = TypeVar("Value")


class RolloutRequest(NamedTuple):
    """What responses are requested to, of this rank."""

    model: PreTrainedModel
    rows: list[list[int]]  # token ids of the prompts
    seeds: list[int]
    num_samples: int
    sampling: SamplingParams
    stopping: StoppingCriteria


class PendingRollout:
    """Responses that are waited for in another thread, which knows nothing of other ranks.

    Args:
        request: what is requested.
        payloads: the requests.
        client: sends them.
    """

    def __init__(self, request: RolloutRequest, payloads: list[Payload], client: JSONClient) -> None:
        self.request, self.payloads, self.client = request, payloads, client
        self.answers: list[Any] | UserError = UserError("vLLM: the requests ended without responses")
        self.thread: threading.Thread | None = None  # None once all ranks have their responses, or have failed
        self.output: GenerationOutput | None = None  # None: the server lost the weights meanwhile
        self.error: UserError | None = None


class VLLMGenerator(RemoteGenerator):
    """Requests responses from a running vLLM server, and hands the policy's weights to it whenever they have changed.

    Rank zero writes the weights (adapters merged) to a new folder and has the server read them, or all ranks send them
    by a `transfer`. Then the server's log-probs of a probe, the first tokens of the batch's prompts, must be the
    policy's: else the run ends. The server keeps a label, the weights' fingerprint and the number of the push, which
    tells one that was restarted, or that another run uses. Weights that are sharded over ranks stay so: each is
    gathered when it is handed over.

    Every rank requests the responses to its own prompts. A request's seed depends on (seed, iteration, row) alone, so a
    resumed run sends the same requests. vLLM samples with noise of its own, so not the responses of `CachedGenerator`.

    Its log-probs come from another implementation, so `ppo.old_logprobs` must be "recompute".

    Args:
        folder: where the weights are written, of this run alone; the server must see it under the same absolute path.
            The last ones stay in it: the server may read them again. None with a `transfer`.
        url: address of the server.
        model: the name under which it serves the policy (`--served-model-name`).
        dtype: the precision of the server (`--dtype`); by default that in which the policy computes is needed.
        max_mismatch: largest mean difference of the probe's log-probs, in nats per token; by default 0.0005 of a server
            in float32, and 0.1 in half precision.
        transfer: sends the weights from GPU to GPU, in place of the folder.
        sleep: whether the server gives its GPU memory back after each rollout (`--enable-sleep-mode`), for a trainer on
            the same GPU. It forgets the weights, so they are handed over before each rollout and validation batch.
        parallel: concurrent requests per rank; each is a prompt with all its samples.
        timeout: seconds that a response or the reading of the weights may take.
        retries: further attempts at a response after a failure that may pass, see `JSONClient`.
        pause: seconds before the second attempt.
        api_key_env: environment variable that holds the server's `--api-key`; if it is unset, none is sent.
    """

    needs_full_weights = False

    def __init__(
        self,
        folder: str | None = None,
        url: str = "http://127.0.0.1:8000",
        model: str = "policy",
        dtype: str | None = None,
        max_mismatch: float | None = None,
        transfer: NativeTransfer | None = None,
        sleep: bool = False,
        parallel: int = 256,
        timeout: float = 600.0,
        retries: int = 4,
        pause: float = 1.0,
        api_key_env: str = "VLLM_API_KEY",
    ) -> None:
        if dtype is not None and dtype not in MAX_MISMATCH:
            raise UserError(f"model.generator.init_args.dtype is {dtype!r}; take one of {', '.join(MAX_MISMATCH)}")
        if (folder is None) == (transfer is None):
            raise UserError("model.generator.init_args: set one of folder and transfer, and the other to null")
        self.folder = None if folder is None else expand_path(folder).resolve()
        self.transfer, self.sleep, self.dtype, self.max_mismatch = transfer, sleep, dtype, max_mismatch
        self.server = VLLMServer(url, model, parallel, timeout, retries, pause, api_key_env)
        self.settings: ServerSettings | None = None  # of the server, once it was asked
        self.label = ""  # of the weights that the server was seen to hold
        self.pending: PendingRollout | None = None

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

    def check_overlap(self) -> None:
        """See `RemoteGenerator.check_overlap`."""
        if self.sleep:
            raise UserError(
                "ppo.overlap_rollouts: the server sleeps during the update (model.generator.init_args.sleep); set one "
                "of the two to false"
            )

    def check_connection(self) -> None:
        """Refuse a server that does not answer, serves no model of that name, or was started with other options."""
        if self.transfer is not None:
            self.transfer.check()
        self.settings = self.server.check()
        self.check_options(self.settings)

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """See `Generator.generate`; a request's seed is the first uniform of its prompt's rows.

        Raises:
            UserError: on all ranks, if it failed on one. Every rank must call it.
        """
        request = make_request(model, prompts, sampling, uniforms, matches_stop_string)
        self.settle()
        for _ in range(MAX_ROLLOUTS):
            self.sync_weights(model, request.rows)
            payloads = self.make_payloads(request)
            output = self.conclude(request, payloads, self.request_responses(payloads, request))
            if output is not None:
                if self.sleep:
                    on_rank_zero(self.put_to_sleep)
                return output
        raise self.server.error(
            "its weights were replaced during the rollout, twice: is it restarted again and again, or used by another "
            "run? One server serves one run"
        )

    @torch.no_grad()
    def start(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> None:
        """See `RemoteGenerator.start`."""
        request = make_request(model, prompts, sampling, uniforms, matches_stop_string)
        self.settle()
        self.sync_weights(model, request.rows)
        pending = PendingRollout(request, self.make_payloads(request), self.server.completion_client())

        def wait() -> None:
            pending.answers = self.request_responses(pending.payloads, request, pending.client)

        pending.thread, self.pending = threading.Thread(target=wait, daemon=True), pending
        pending.thread.start()

    def ready_output(self, timeout: float | None = None) -> GenerationOutput | None:
        """See `RemoteGenerator.ready_output`."""
        return self.pending.output if self.settle(timeout) and self.pending is not None else None

    def finish(self) -> GenerationOutput | None:
        """See `RemoteGenerator.finish`."""
        self.settle()
        pending, self.pending = self.pending, None
        if pending is not None and pending.error is not None:
            raise pending.error
        return None if pending is None else pending.output

    def cancel(self) -> None:
        """See `RemoteGenerator.cancel`."""
        if self.pending is not None:
            self.pending.client.break_off("the rollout was dropped")
            self.pending = None

    def settle(self, timeout: float | None = None) -> bool:
        """Wait for the responses that were started, before the server gets other weights; every rank must call it.

        Args:
            timeout: seconds; None waits for all.

        Returns:
            Whether no responses are waited for any more; the same on all ranks.
        """
        pending = self.pending
        if pending is None or pending.thread is None:
            return True
        pending.thread.join(timeout)
        if timeout is not None and any(all_gather_object(pending.thread.is_alive())):
            return False
        pending.thread = None
        try:
            pending.output = self.conclude(pending.request, pending.payloads, pending.answers)
        except UserError as error:
            pending.error = error
        return True

    def request_responses(
        self, payloads: list[Payload], request: RolloutRequest, client: JSONClient | None = None
    ) -> list[Any] | UserError:
        """Return the choices for each request, or why there are none; other ranks are not asked."""
        answers, total = [], len(payloads) * request.num_samples
        try:
            self.check_length(max(map(len, request.rows)) + request.sampling.max_new_tokens)
            for choices in self.server.complete(payloads, client):
                answers.append(choices)
                report_progress("generate", len(answers) * request.num_samples, total)
        except UserError as error:
            return error
        return answers

    def conclude(
        self, request: RolloutRequest, payloads: list[Payload], answers: list[Any] | UserError
    ) -> GenerationOutput | None:
        """Return the responses, `num_samples` consecutive rows for each request; every rank must call it.

        None if the server lost the weights meanwhile.

        Raises:
            UserError: on all ranks, if it failed on one.
        """
        problem, output = None, None
        try:
            if isinstance(answers, UserError):
                raise answers
            output = self.read_responses(request, payloads, answers)
        except UserError as error:
            problem = str(error)
        problems = [each for each in all_gather_object(problem) if each is not None]
        if not problems:
            return output if on_rank_zero(self.has_label) else None
        # a server that was restarted knows the adapter of the requests no more: that is no failure
        if on_rank_zero(self.has_lost_label):
            return None
        raise UserError(problems[0])

    def has_label(self) -> bool:
        """Whether the server holds the weights that it was seen to hold."""
        return self.find_label(self.label) == self.label

    def has_lost_label(self) -> bool:
        """Whether the server answers, and holds other weights than those that it was seen to hold."""
        try:
            return not self.has_label()
        except UserError:  # it does not answer: the problem that was found before says more
            return False

    def read_responses(self, request: RolloutRequest, payloads: list[Payload], answers: list[Any]) -> GenerationOutput:
        """Return responses, each checked against its request."""
        stopping, size = request.stopping, len(payloads) * request.num_samples
        table = ResponseTable(request.model, size, request.sampling, stopping.stop_token_ids.tolist(), self.server.name)
        row = 0
        for payload, choices in zip(payloads, answers):
            for _ in range(request.num_samples // payload["n"]):  # greedy samples are all the same
                table.fill(row, payload, choices)
                row += payload["n"]
        return table.output(stopping)

    def make_payloads(self, request: RolloutRequest) -> list[Payload]:
        """Return one request per prompt, with all its samples."""
        settings = self.request_settings(request.sampling, request.stopping, request.num_samples)
        return [{**settings, "prompt": row, "seed": seed} for row, seed in zip(request.rows, request.seeds)]

    def request_settings(self, sampling: SamplingParams, stopping: StoppingCriteria, num_samples: int) -> Payload:
        """Return the settings of all requests; every one explicit, for a server may take defaults from the model."""
        return {
            "model": self.served_name(self.label),
            "n": num_samples if sampling.temperature else 1,  # vLLM refuses several greedy samples
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
            "stop": sampling.stop_strings[:MAX_STOP_STRINGS],
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            # else keys and values of other weights would be reused: of earlier ones, or of those that a restarted
            # server had when it answered the same requests, so it is not the fingerprint alone
            "cache_salt": self.label,
        }

    # ---------------------------------------------------------------------------------------------------- weights

    def sync_weights(self, model: PreTrainedModel, prompts: list[list[int]]) -> None:
        """Have the server hold the policy's weights; every rank must call it.

        Args:
            model: the policy.
            prompts: token ids, of which rank zero's are the probe.

        Raises:
            UserError: on all ranks, if it failed.
        """
        try:
            self.label = self.ensure_weights(model, prompts)
        except UserError:
            self.label = ""  # unknown
            raise

    def ensure_weights(self, model: PreTrainedModel, prompts: list[list[int]]) -> str:
        """Push the weights unless the server holds them, check that it does, and return their label."""
        reshard(model)
        version = self.compute_fingerprint(model)
        is_known, label, self.settings = on_rank_zero(lambda: self.find_weights(model, version))
        if label and label == self.label:
            return label
        if not is_known and self.transfer is not None:
            self.transfer.forget()
        if not label:
            label = broadcast_object(f"{version}-{secrets.token_hex(4)}")
            self.push_weights(model, label)
        self.check_probe(model, label, prompts)
        on_rank_zero(lambda: self.finish_push(label))
        return label

    def compute_fingerprint(self, model: PreTrainedModel) -> str:
        """Return the fingerprint of what is handed over; every rank must call it."""
        return with_adapter_scale(live_model_fingerprint(model), model)

    def find_weights(self, model: PreTrainedModel, version: str) -> tuple[bool, str, ServerSettings]:
        """Return whether the server is the one of the last push, the label of its weights, and its settings.

        The label is "" if they are not of this fingerprint. One that was started since is checked, and one that sleeps
        gets memory for weights.
        """
        label = self.find_label(version)
        is_known = bool(self.label) and (label == self.label or self.find_label(self.label) == self.label)
        if self.sleep and self.label and not is_known:
            is_known = self.server.weights_version() == ASLEEP + self.label
        if self.settings is None or not is_known:
            self.settings = self.server.check()
            self.check_server(model, self.settings)
            if not self.sleep and self.server.is_sleeping():
                raise self.server.error(self.server.find_problem())
        if self.sleep and self.server.is_sleeping():
            self.server.wake_up("weights")
        return is_known, label, self.settings

    def find_label(self, version: str) -> str:
        """Return the label under which the server holds weights of a fingerprint; "" if it holds others."""
        label = self.server.weights_version()
        return label if label.startswith(version) else ""

    def served_name(self, label: str) -> str:
        """Return the name of the model that requests are sent to."""
        return self.server.model

    def push_weights(self, model: PreTrainedModel, label: str) -> None:
        """Hand over the weights; every rank must call it."""
        # a run that is killed here must not leave the label before
        on_rank_zero(lambda: self.server.set_weights_version(INCOMPLETE))
        if self.transfer is None:
            self.write_weights(model, label)
        else:
            assert self.settings is not None
            self.transfer.push(self.server, model, getattr(torch, self.settings.dtype))
        if self.sleep:
            on_rank_zero(lambda: self.server.wake_up("kv_cache"))

    def write_weights(self, model: PreTrainedModel, label: str) -> None:
        """Write the weights and have the server read them.

        They go to a folder that no other weights were read from: vLLM was seen to keep what it read from a path.
        """
        assert self.folder is not None
        target, problem = self.folder / label, None
        try:
            write_untied_model(model, target)
        except (UserError, OSError, SafetensorError) as error:  # on rank zero, when all ranks have gathered
            problem = f"cannot write the policy's weights to {str(target)!r}: {error}"

        def reload() -> None:
            if problem is not None:
                raise UserError(problem)
            self.server.reload_weights(target)

        on_rank_zero(reload)

    def put_to_sleep(self) -> None:
        """Have the server give its memory back, and say so in its label."""
        self.server.set_weights_version(ASLEEP + self.label)
        self.server.sleep()

    def finish_push(self, label: str) -> None:
        """Label the server with the weights that it was seen to hold, and remove the folders of earlier ones."""
        self.server.set_weights_version(label)
        self.remove_folders(label)

    def remove_folders(self, label: str) -> None:
        """Remove the folders of other weights than these, also those that a killed run has left."""
        for path in () if self.folder is None else self.folder.glob("*"):
            if LABEL.fullmatch(path.name) and path.name != label:
                shutil.rmtree(path, ignore_errors=True)

    # ----------------------------------------------------------------------------------------------------- checks

    def check_length(self, tokens: int) -> None:
        """Refuse prompts and responses that the server would cut."""
        assert self.settings is not None
        if tokens > self.settings.max_model_len:
            raise self.server.error(
                f"the longest prompt and sampling.max_new_tokens are {tokens:,} tokens, and it takes "
                f"{self.settings.max_model_len:,}; start it with --max-model-len {tokens} or more"
            )

    def check_options(self, settings: ServerSettings) -> None:
        """Refuse a server that was started without what the settings here need."""
        if self.transfer is not None:
            self.transfer.check_server(self.server, settings)
        if self.sleep and not settings.can_sleep:
            raise self.server.error(
                "it cannot sleep; start it with --enable-sleep-mode, or set model.generator.init_args.sleep to false"
            )

    def check_server(self, model: PreTrainedModel, settings: ServerSettings) -> None:
        """Refuse a server of other options or precision, or of a model of another shape than the policy's."""
        self.check_options(settings)
        wanted = self.dtype or compute_dtype(model)
        if settings.dtype != wanted:
            by = "model.generator.init_args.dtype says" if self.dtype else "the policy computes in"
            raise self.server.error(
                f"it serves in {settings.dtype}, and {by} {wanted}; start it with --dtype {wanted}, or set "
                f"model.generator.init_args.dtype to {settings.dtype}"
            )
        rows, columns = model.get_input_embeddings().weight.shape
        ours = {
            "vocab_size": rows,
            "embedding_dim": columns,
            "layers": model.config.get_text_config().num_hidden_layers,
        }
        for name, size in settings.shape.items():
            if ours[name] != size:
                raise self.server.error(
                    f"its model has {name} {size}, and the policy {ours[name]}; start it from the folder that the "
                    "policy is initialized from"
                )

    def check_probe(self, model: PreTrainedModel, label: str, prompts: list[list[int]]) -> None:
        """Refuse a server whose log-probs are not those of the policy; every rank must call it."""
        assert self.settings is not None
        tokens = broadcast_object([token for prompt in prompts for token in prompt])
        probe = (tokens * 2)[: min(PROBE_TOKENS, self.settings.max_model_len - 1)]  # two tokens at least
        ids = torch.tensor([probe], device=model.device)
        ours = token_logprobs(model(input_ids=ids).logits[:, :-1], ids[:, 1:], 1.0)[0].cpu()
        reshard(model)
        on_rank_zero(lambda: self.compare_probe(label, probe, ours))

    def compare_probe(self, label: str, probe: list[int], ours: Tensor) -> None:
        """Refuse a server whose log-probs of a prompt's tokens but the first are not `ours`, (P - 1,)."""
        assert self.settings is not None
        theirs = torch.tensor(self.server.prompt_logprobs(self.served_name(label), probe, label))
        mismatch = float((ours - theirs).abs().mean())
        limit = MAX_MISMATCH[self.settings.dtype] if self.max_mismatch is None else self.max_mismatch
        if not mismatch <= limit:
            raise self.server.error(
                f"after it read the policy's weights its log-probs of a prompt differ from the policy's by "
                f"{mismatch:.2g} nats per token on average, over {limit:g}: it does not hold these weights, or "
                "computes in another precision. Restart it, and resume the run (docs/vllm.md)"
            )


class VLLMLoRAGenerator(VLLMGenerator):
    """Hands the policy's adapter to the server, megabytes in place of the whole model.

    The server holds the base and serves each version of the adapter as a model of its own; earlier ones are unloaded.
    Adapters go through a folder: no `transfer`, and no `sleep`, which would lose the base.
    """

    def check_options(self, settings: ServerSettings) -> None:
        """See `VLLMGenerator.check_options`."""
        if self.transfer is not None or self.sleep:
            raise UserError(
                "model.generator: VLLMLoRAGenerator takes neither transfer nor sleep; use -c generator/vllm, which "
                "merges the adapter, or set them to null and false"
            )

    def compute_fingerprint(self, model: PreTrainedModel) -> str:
        """See `VLLMGenerator.compute_fingerprint`; the base is frozen, and the probe compares it with the server's."""
        return with_adapter_scale(live_weights_fingerprint(adapter_weights(model)), model)

    def served_name(self, label: str) -> str:
        """See `VLLMGenerator.served_name`."""
        return f"{self.server.model}-{label}"

    def find_label(self, version: str) -> str:
        """See `VLLMGenerator.find_label`."""
        prefix = self.served_name("")
        labels = [name.removeprefix(prefix) for name in self.server.served_models() if name.startswith(prefix)]
        return next((label for label in labels if label.startswith(version)), "")

    def check_server(self, model: PreTrainedModel, settings: ServerSettings) -> None:
        """See `VLLMGenerator.check_server`; the adapter must be of a rank that it takes."""
        super().check_server(model, settings)
        lora = policy_lora(model)
        assert lora is not None
        if settings.max_lora_rank is None or lora.rank > settings.max_lora_rank:
            raise self.server.error(
                f"it takes no adapters of rank {lora.rank}; start it with --enable-lora --max-lora-rank {lora.rank}"
            )

    def push_weights(self, model: PreTrainedModel, label: str) -> None:
        """Write the adapter and have the server load it; every rank must call it."""
        assert self.folder is not None
        target = self.folder / label
        adapter = {name: full_tensor(weight) for name, weight in adapter_weights(model).items()}

        def load() -> None:
            lora = policy_lora(model)
            assert lora is not None
            try:
                target.mkdir(parents=True)
                write_adapter(target, adapter, lora, (self.server.model, ModelLoadingConfig()))
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot write the policy's adapter to {str(target)!r}: {error}") from None
            self.server.load_adapter(self.served_name(label), target)

        on_rank_zero(load)

    def check_probe(self, model: PreTrainedModel, label: str, prompts: list[list[int]]) -> None:
        """See `VLLMGenerator.check_probe`."""
        try:
            super().check_probe(model, label, prompts)
        except UserError:
            if is_rank_zero():
                self.server.unload_adapter(self.served_name(label))
            raise

    def finish_push(self, label: str) -> None:
        """Unload earlier adapters, and remove their folders."""
        for name in self.server.served_models():
            if name.startswith(self.served_name("")) and name != self.served_name(label):
                self.server.unload_adapter(name)
        self.remove_folders(label)


def compute_dtype(model: PreTrainedModel) -> str:
    """Return the precision in which a model computes here, such as "float32"."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return str(dtype).removeprefix("torch.")


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of the policy's adapter by name; they may be sharded over ranks.

    Raises:
        UserError: it has none.
    """
    if policy_lora(model) is None:
        raise UserError("model.generator: VLLMLoRAGenerator needs model.adapter; use -c generator/vllm without one")
    named = policy_state_dict(dict(model.named_parameters()))
    return {name: weight for name, weight in named.items() if ".lora_" in name}


def with_adapter_scale(fingerprint: str, model: PreTrainedModel) -> str:
    """Return a fingerprint that changes with rank and alpha too: the scale of an adapter is in none of its weights."""
    lora = policy_lora(model)
    if lora is None:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {lora.rank} {float(lora.alpha)}".encode()).hexdigest()[:16]


def make_request(
    model: PreTrainedModel,
    prompts: PromptBatch,
    sampling: SamplingParams,
    uniforms: Tensor,
    matches_stop_string: StopStringMatcher | None,
) -> RolloutRequest:
    """Return what `Generator.generate` is asked for."""
    num_samples = len(uniforms) // len(prompts.input_ids)
    ids, mask = prompts.input_ids.cpu(), prompts.attention_mask.cpu().bool()
    rows = [row[kept].tolist() for row, kept in zip(ids, mask)]
    seeds = (uniforms[::num_samples, 0].double() * 2**53).long().tolist()
    stopping = StoppingCriteria(model, sampling, matches_stop_string)
    return RolloutRequest(model, rows, seeds, num_samples, sampling, stopping)


def on_rank_zero(call: Callable[[], Value]) -> Value:
    """Return what a call returns on rank zero; every rank must call this.

    Raises:
        UserError: on all ranks, if it raised one there.
    """
    result, problem = None, None
    if is_rank_zero():
        try:
            result = call()
        except UserError as error:
            problem = str(error)
    result, problem = broadcast_object((result, problem))
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[return-value]  # that of rank zero
