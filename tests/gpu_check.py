"""What the tests show on a CPU, on the GPUs of this machine: `make gpu-check`. Prints tables for docs/hardware.md.

Each check is one run of the command in a process of its own: a stage's quickstart recipe on a small model, under
overlays. `--list` prints the commands and runs none.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

STAGES = ("sft", "reward", "ppo", "ppo_ptx")
FUSED = "--model.optimizer.init_args.fused=true"
# overlays and settings of a check on one GPU
ONE_GPU = (
    "-c precision/32-true",
    "-c precision/bf16-mixed",
    "-c precision/bf16-true",
    "-c precision/16-mixed",
    f"-c precision/bf16-mixed {FUSED}",
    "-c precision/bf16-mixed -c optimizer/adamw-8bit",
    "-c precision/bf16-mixed -c optimizer/paged-adamw-8bit",
    "-c precision/bf16-mixed -c optimizer/lion-8bit",
    "-c precision/bf16-mixed -c optimizer/adamw-8bit-sharded",
    "-c precision/bf16-mixed -c adapter/lora",
    "-c precision/bf16-mixed -c adapter/qlora --model.options.dtype=bfloat16",
    "-c precision/bf16-mixed -c compute/gradient-checkpointing",
    "-c precision/bf16-mixed -c compute/compile",
    "-c precision/bf16-mixed -c averaging/ema",
    "-c precision/bf16-mixed -c compute/offload-frozen",
    "-c precision/bf16-mixed -c strategy/fsdp -c compute/offload-frozen",
    "-c precision/bf16-mixed -c strategy/fsdp",
    "-c precision/32-true -c strategy/fsdp --trainer.strategy.save_distributed_checkpoint=true",
)
# on all GPUs, where there are several
ALL_GPUS = (
    "-c strategy/ddp -c precision/bf16-mixed",
    "-c strategy/ddp -c precision/bf16-mixed -c optimizer/adamw-8bit",
    "-c strategy/fsdp -c precision/32-true",
    "-c strategy/fsdp -c precision/bf16-mixed -c compute/gradient-checkpointing",
    "-c strategy/fsdp -c precision/bf16-mixed -c adapter/lora",
    "-c strategy/fsdp -c precision/bf16-mixed -c optimizer/adamw-8bit-sharded",
    "-c strategy/fsdp -c precision/bf16-mixed --trainer.strategy.tensor_parallel_size=2",
    "-c strategy/deepspeed -c precision/bf16-mixed",
    "--trainer.strategy=fsdp --trainer.gradient_clip_val=null",
)


def command(stage: str, words: str, devices: int) -> list[str]:
    """Return the words of a check, after `lit-rlhf`."""
    recipes = f"-c quickstart/{stage} -c small.yaml -c small-{stage}.yaml {words}"
    return ["fit", *shlex.split(recipes), "--trainer.accelerator=gpu", f"--trainer.devices={devices}"]


def checks(gpus: int) -> list[tuple[str, str, list[str]]]:
    """Return stage, overlays and command of every check that this many GPUs allow."""
    plans = [(words, 1) for words in ONE_GPU] + ([(words, gpus) for words in ALL_GPUS] if gpus > 1 else [])
    return [(stage, words, command(stage, words, devices)) for words, devices in plans for stage in STAGES]


def outcome(args: list[str], folder: Path, limit: float) -> str:
    """Run one; return seconds, or why it did not run."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lit_rlhf", *args], cwd=folder, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"FAILED: not done after {limit:.0f} s"
    if done.returncode == 0:
        return f"runs, {time.perf_counter() - start:.0f} s"
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return ("refused: " if done.returncode == 2 else "FAILED: ") + re.sub(r"^error: ", "", last)[:160]


def main() -> int:
    """Run all checks, or list them; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--only", default="", help="those whose command holds this text")
    parser.add_argument("--limit", type=float, default=300, help="seconds a check may take")
    parsed = parser.parse_args()
    gpus = torch.cuda.device_count()
    wanted = [check for check in checks(gpus or (2 if parsed.list else 0)) if parsed.only in " ".join(check[2])]
    if parsed.list:
        print("\n".join(shlex.join(["lit-rlhf", *args]) for _, _, args in wanted))
        return 0
    if not gpus:
        print("no GPU here; --list prints what would run", file=sys.stderr)
        return 2
    from overlay_world import write_world

    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print("without torchao" if find_spec("torchao") is None else "with torchao", "\n")
    print("| with | " + " | ".join(STAGES) + " |\n" + "|---" * (len(STAGES) + 1) + "|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder))
        for words in dict.fromkeys(words for _, words, _ in wanted):
            cells = [outcome(args, Path(folder), parsed.limit) for _, each, args in wanted if each == words]
            failed |= any(cell.startswith("FAILED") for cell in cells)
            print(f"| `{words}` | " + " | ".join(cells) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
