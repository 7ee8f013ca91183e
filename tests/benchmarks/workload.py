"""Workload of the benchmarks: models with random weights, data, arguments, and the report of a worker."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 2048
SIZE = "256x4"  # hidden size x layers, by default
SMOLLM2 = "smollm2-135m"  # the size of SmolLM2-135M, which `lit-rlhf real` trains; weights are random, as in the others
SFT_LENGTH, SFT_PROMPT = 256, 16  # tokens of a packed row, and of a demonstration's prompt
RANKED_PROMPT, RANKED_COMPLETION = 64, 64  # tokens of a ranking
SFT_ROWS = 16  # packed rows per step, by default
PAD, EOS = 0, 1
# on a GPU: 0.8 B parameters, prompts of 256 tokens, responses of at most 256, about a third of it on average
GPU = ["--device=cuda", "--precision=bf16-mixed", "--size=2048x16"]
GPU_PPO = [*GPU, "--prompt=256", "--response=256", "--episodes=128", "--micro-batch-size=32", "--bias=3.1"]
NEVER_ENDS = -30.0  # added to the logit of the end token
ENDS_AT_A_THIRD = 4.63  # gives a mean response of about 21 of 64 tokens with the weights of `write_models`


def build_config(size: str) -> LlamaConfig:
    """Build the Llama configuration of a size, hidden size x layers, or `SMOLLM2`.

    4.3 M parameters at 256 x 4, of which 1 M are embeddings.
    """
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "num_labels": 1}
    if size == SMOLLM2:
        return LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **ids,
        )
    hidden, layers = map(int, size.split("x"))
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(4, hidden // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **ids,
    )


def num_matmul_parameters(size: str, head: bool = True) -> int:
    """Return the number of parameters that take part in matrix products: all but the input embedding."""
    config = build_config(size)
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * hidden * head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layers: int = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    return layers + head * hidden * config.vocab_size


def write_models(folder: Path, size: str) -> None:
    """Write a policy (`policy-SIZE/`) and a reward model (`reward-SIZE/`) with weights of a fixed seed, once."""
    if (folder / f"reward-{size}").is_dir():
        return
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        kind(build_config(size)).save_pretrained(folder / f"{name}-{size}")
        tokenizer.save_pretrained(folder / f"{name}-{size}")


def write_prompts(path: Path, count: int, length: int) -> None:
    """Write prompts of exactly `length` tokens, one word per token."""
    ids = torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    path.write_text("".join(json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids.tolist()))


class BiasedHead(torch.nn.Linear):
    """A head that adds constants to the logits. No hook: a model with hooks is not captured in CUDA graphs."""

    offset: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return super().forward(input) + self.offset


def bias_end_token(model: LlamaForCausalLM, bias: float) -> None:
    """Add a constant to the end token's logit, so that responses end early, late or never."""
    head = model.lm_head
    head.__class__ = BiasedHead
    head.register_buffer("offset", head.weight.new_zeros(len(head.weight)), persistent=False)
    head.offset[EOS] = bias


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of every worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--size", default=SIZE, help=f"hidden size x layers, or {SMOLLM2}")
    parser.add_argument("--rows", type=int, default=SFT_ROWS, help="packed rows per step of SFT")
    return parser


def build_reward_parser() -> argparse.ArgumentParser:
    """Build the argument parser of the workers of reward models."""
    parser = build_parser()
    parser.add_argument("--rankings", default="rankings-9.jsonl")
    return parser


def build_ppo_parser() -> argparse.ArgumentParser:
    """Build the argument parser of the PPO workers."""
    parser = build_parser()
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--bias", type=float, default=NEVER_ENDS)
    parser.add_argument("--prompt", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--samples", type=int, default=1, help="episodes per prompt")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile: in a rollout the step, in PPO the blocks")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="episodes per backward pass, of 16 per step")
    return parser


def prompt_file(args: argparse.Namespace) -> Path:
    """Return the file of prompts of the length in `args`."""
    file: Path = args.folder / f"prompts-{args.prompt}.jsonl"
    return file


def prompt_batches(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield the prompts of the warm-up and of each update, (episodes, prompt) int64."""
    rows = [json.loads(line)["prompt"].split() for line in prompt_file(args).read_text().splitlines()]
    ids = torch.tensor([[int(word[1:]) for word in row] for row in rows])
    for update in range(args.updates + 1):
        yield ids.roll(-update * args.episodes, 0)[: args.episodes]


def run_worker(
    script: list[str], folder: Path, paths: list[Path], python: str = sys.executable, timeout: float | None = None
) -> dict[str, Any]:
    """Run a worker in a process of its own and return its report, with what it printed before as `text`.

    Args:
        script: the worker and its options.
        folder: of the models and data.
        paths: that it imports from.
        python: that runs it.
        timeout: seconds after which it is stopped.

    Raises:
        RuntimeError: it failed.
        TimeoutError: it took longer.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, str(HERE / script[0]), str(folder), *script[1:]]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{script} was not done after {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-3000:]}")
    *text, report = done.stdout.strip().splitlines()
    result: dict[str, Any] = json.loads(report)
    return result | {"text": "\n".join(text)}


def clock(device: str = "cpu") -> float:
    """Return the time in seconds, after all kernels of the device are done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(seconds: list[float], **more: Any) -> None:
    """Print the worker's result as its last line, with the peak memory of the process, or of the GPU if it used one."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"seconds": seconds, "peak_mib": peak, **more}), flush=True)


def write_demonstrations(path: Path, count: int) -> None:
    """Write demonstrations of 32 to 256 tokens, prompt and end token included."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(32, SFT_LENGTH + 1, (count,), generator=generator).tolist()
    with path.open("w") as file:
        for length in lengths:
            words = [f"w{i}" for i in torch.randint(2, VOCABULARY, (length - 1,), generator=generator).tolist()]
            row = {"prompt": " ".join(words[:SFT_PROMPT]), "completion": " ".join(words[SFT_PROMPT:])}
            file.write(json.dumps(row) + "\n")


def write_rankings(path: Path, count: int, completions: int, prompt: int, completion: int) -> None:
    """Write rankings of random completions of one length, without ties."""
    generator = torch.Generator().manual_seed(2)

    def words(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    rows = [
        {
            "prompt": words(prompt),
            "completions": [words(completion - 1) for _ in range(completions)],  # the end token is one more
            "ranks": list(range(completions)),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
