"""What is measured: models of one shape with random weights, prompts, and how often a response ends."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

VOCABULARY = 2048
SIZE = "256x4"  # hidden size x layers, where nothing else is said
SFT_LENGTH, SFT_PROMPT = 256, 16  # tokens of a packed row, and of a demonstration's prompt
SFT_ROWS = 16  # packed rows of a step
PAD, EOS = 0, 1
NEVER_ENDS = -30.0  # added to the logit of the end token
ENDS_AT_A_THIRD = 4.63  # a mean response of about 21 of 64 tokens, with weights drawn as below


def config(hidden: int, layers: int) -> LlamaConfig:
    """The Llama shape of all benchmarks: 4.3 M parameters, of them 1 M embeddings, at 256 x 4."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(4, hidden // 64),
        max_position_embeddings=2048,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=False,
        num_labels=1,
    )


def parameters(size: str) -> int:
    """The parameters that a token is multiplied with: all but the embeddings at the input."""
    hidden, layers = map(int, size.split("x"))
    return layers * (4 * hidden**2 + 3 * hidden * (hidden * 11 // 4)) + hidden * VOCABULARY


def write_models(folder: Path, size: str) -> None:
    """A policy (`policy-SIZE/`) and a reward model (`reward-SIZE/`), random but the same in every process."""
    hidden, layers = map(int, size.split("x"))
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        kind(config(hidden, layers)).save_pretrained(folder / f"{name}-{size}")
        tokenizer.save_pretrained(folder / f"{name}-{size}")


def write_prompts(path: Path, count: int, length: int) -> None:
    """Prompts of exactly `length` tokens, as words."""
    ids = torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    path.write_text("".join(json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids.tolist()))


def bias_end(model: LlamaForCausalLM, bias: float) -> None:
    """Add a constant to the end token's logit, so that responses end early, late or never."""

    def add(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        offset = logits.new_zeros(VOCABULARY)
        offset[EOS] = bias
        return logits + offset

    model.lm_head.register_forward_hook(add)


def arguments() -> argparse.ArgumentParser:
    """What every worker is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--size", default=SIZE, help="hidden size x layers")
    return parser


def ppo_arguments() -> argparse.ArgumentParser:
    """What the workers of PPO are told besides."""
    parser = arguments()
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--bias", type=float, default=NEVER_ENDS)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=1, help="episodes a prompt")
    parser.add_argument("--micro-batch", type=int, default=16, help="episodes a backward pass, of the 16 of a step")
    return parser


def prompt_file(args: argparse.Namespace) -> Path:
    """Where the prompts of the asked length are."""
    file: Path = args.folder / f"prompts-{args.prompt}.jsonl"
    return file


def prompt_batches(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The prompts of each update and of the warm-up, (episodes, prompt) int64."""
    rows = [json.loads(line)["prompt"].split() for line in prompt_file(args).read_text().splitlines()]
    ids = torch.tensor([[int(word[1:]) for word in row] for row in rows])
    for update in range(args.updates + 1):
        yield ids.roll(-update * args.episodes, 0)[: args.episodes]


def clock(device: str = "cpu") -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(seconds: list[float], **more: Any) -> None:
    """The worker's result, as its last line; the peak is the process's, or the GPU's where it used one."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"seconds": seconds, "peak_mib": peak, **more}), flush=True)


def write_demonstrations(path: Path, count: int) -> None:
    """Demonstrations of 32 to 256 tokens, prompt and end token included."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(32, SFT_LENGTH + 1, (count,), generator=draw).tolist()
    with path.open("w") as file:
        for length in lengths:
            words = [f"w{i}" for i in torch.randint(2, VOCABULARY, (length - 1,), generator=draw).tolist()]
            row = {"prompt": " ".join(words[:SFT_PROMPT]), "completion": " ".join(words[SFT_PROMPT:])}
            file.write(json.dumps(row) + "\n")


def write_rankings(path: Path, count: int, completions: int, prompt: int, completion: int) -> None:
    """Rankings of `completions` random answers without ties, all of the same length."""
    draw = torch.Generator().manual_seed(2)

    def words(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, VOCABULARY, (length,), generator=draw).tolist())

    rows = [
        {
            "prompt": words(prompt),
            "completions": [words(completion - 1) for _ in range(completions)],  # the end token is one more
            "ranks": list(range(completions)),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
