"""What `lit-rlhf plan` says of a run beside the peak that a GPU saw: `make gpu-check ARGS=memory`."""

import contextlib
import io
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from lit_rlhf.cli import main
from tests.helpers.overlay_world import SPECIAL, word_tokenizer
from tests.helpers.small_runs import write_rows

# 1.1 billion parameters
SHAPE = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}
SFT = "-c small/sft --data.path=demonstrations.jsonl --data.max_prompt_length=64 --data.max_completion_length=448 \
--data.validation_fraction=0 --data.batching=none --data.micro_batch_size=8 --trainer.max_steps=3"
PPO = "-c small/ppo --model.reward.init_args.model=reward --data.path=prompts.jsonl --data.max_prompt_length=256 \
--model.sampling.max_new_tokens=256 --model.ppo.rollout_batch_size=64 --model.ppo.micro_batch_size=8 \
--trainer.max_epochs=1"
RUNS = {
    "SFT, bf16-mixed": f"{SFT} -c precision/bf16-mixed",
    "SFT, bf16-mixed, gradient checkpointing": f"{SFT} -c precision/bf16-mixed -c compute/gradient-checkpointing",
    "SFT, bf16-mixed, 8-bit AdamW": f"{SFT} -c precision/bf16-mixed -c optimizer/adamw-8bit",
    "SFT, LoRA on a base in bfloat16": f"{SFT} -c precision/bf16-true -c adapter/lora",
    "SFT, QLoRA": f"{SFT} -c precision/bf16-mixed -c adapter/qlora --model.loading.dtype=bfloat16",
    "PPO, bf16-mixed": f"{PPO} -c precision/bf16-mixed",
}
MEASURE = """
import sys, torch
from lit_rlhf.cli import main
code = main(sys.argv[1:])
print(f"peak: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
sys.exit(code)
"""


def write_inputs(root: Path, shape: dict[str, int]) -> None:
    """Write a policy, a reward model, and rows that are as long as the runs allow."""
    config = LlamaConfig(**shape, **SPECIAL, num_attention_heads=shape["hidden_size"] // 64)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for name, kind in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
            config.num_labels = 1
            kind.from_config(config).save_pretrained(root / name)
            word_tokenizer().save_pretrained(root / name)
    words = ["w1"] * 447
    write_rows(root / "demonstrations.jsonl", [{"prompt": " ".join(words[:64]), "completion": " ".join(words)}] * 64)
    # no two of them alike, whose prompt would be computed once
    write_rows(
        root / "prompts.jsonl",
        [{"prompt": " ".join([f"w{n}", f"w{m}", *words[:254]])} for n in range(8) for m in range(8)],
    )


def planned(args: list[str]) -> float:
    """Return the peak that the plan names, in GB."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(["plan", *args])
    found = re.search(r"^peak: ([\d.]+) GB", said.getvalue(), re.MULTILINE)
    assert found, said.getvalue()
    return float(found[1])


def measured(args: list[str], folder: Path) -> float:
    """Return the peak of what a run of `fit` held on the GPU at once, in GB."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    command = [sys.executable, "-c", MEASURE, "fit", *args, *quiet]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}\n{done.stderr[-3000:]}")
    return float(done.stdout.split("peak: ")[-1].split()[0])


def print_table(jobs: int) -> None:
    """Print planned and measured peaks of all runs, so many of them at a time."""
    print("| run, 1.1 billion parameters | planned, GB | peak, GB | planned / peak |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), ThreadPoolExecutor(jobs) as pool:
        write_inputs(Path(folder), SHAPE)
        settings = ["--model.model=policy", "--trainer.accelerator=gpu"]
        runs = {
            name: [*words.split(), *settings, f"--run_dir={name.replace(' ', '-')}"] for name, words in RUNS.items()
        }
        peaks = {name: pool.submit(measured, args, Path(folder)) for name, args in runs.items()}
        for name, args in runs.items():
            plan, peak = planned(args), peaks[name].result()
            print(f"| {name} | {plan:.1f} | {peak:.1f} | {plan / peak:.2f} |", flush=True)
