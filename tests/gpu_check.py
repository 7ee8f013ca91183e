"""What the tests show on a CPU, on the GPUs of this machine: `make gpu-check`. Prints tables for docs/hardware.md.

Each check is one run of the command in a process of its own: a stage's quickstart recipe on a small model, under
overlays. A cell gives the seconds it took and the largest difference of its losses, at any of its six steps, from a
run on the CPU in float32 with AdamW. What those that fail say goes to stderr. `--list` prints the commands alone.
"""

import argparse
import csv
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

STAGES = ("sft", "reward", "ppo", "ppo-ptx")
FUSED = "--model.optimizer.init_args.fused=true"
DEEPSPEED = "-c strategy/deepspeed -c precision/bf16-mixed"
FSDP1 = "--trainer.strategy=fsdp --trainer.gradient_clip_val=null"
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
    "-c precision/bf16-mixed -c adapter/qlora --model.loading.dtype=bfloat16",
    "-c precision/bf16-mixed -c compute/gradient-checkpointing",
    "-c precision/bf16-mixed -c compute/compile",
    "-c precision/bf16-mixed -c averaging/ema",
    "-c precision/bf16-mixed -c compute/offload-frozen",
    "-c precision/bf16-mixed -c strategy/fsdp -c compute/offload-frozen",
    "-c precision/bf16-mixed -c strategy/fsdp",
    "-c precision/32-true -c strategy/fsdp --trainer.strategy.save_distributed_checkpoint=true",
    DEEPSPEED,
    FSDP1,
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
    DEEPSPEED,
    FSDP1,
)
# what is compared with the CPU's run: of the metrics that a stage has
LOSSES = ("train/loss", "validation/loss", "pretraining/loss", "policy/loss", "policy/entropy_estimate", "value/loss")


def command(stage: str, words: str, devices: int, accelerator: str = "gpu") -> list[str]:
    """Return the words of a check, after `lit-rlhf`."""
    recipes = f"-c quickstart/{stage} -c small.yaml -c small-{stage}.yaml {words}"
    settings = f"--trainer.accelerator={accelerator} --trainer.devices={devices} --trainer.max_steps=6"
    return ["fit", *shlex.split(recipes), *settings.split(), "--trainer.log_every_n_steps=1"]


def reference(stage: str, words: str) -> list[str]:
    """Return the run that a check is compared with: on the CPU, with what changes the model itself."""
    same = re.findall(r"-c (?:adapter|averaging)/\S+|--trainer.gradient_clip_val=\S+", words)
    return command(stage, " ".join(["-c precision/32-true", *same]), 1, "cpu")


def checks(gpus: int) -> list[tuple[str, str, list[str]]]:
    """Return stage, overlays and command of every check that this many GPUs allow."""
    plans = [(words, 1) for words in ONE_GPU] + ([(words, gpus) for words in ALL_GPUS] if gpus > 1 else [])
    return [(stage, words, command(stage, words, devices)) for words, devices in plans for stage in STAGES]


def run(args: list[str], world: Path, limit: float) -> tuple[str, list[dict[str, str]]]:
    """Run one in a folder of its own; return seconds, or why it did not run, and the rows of its metrics."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=world.parent) as folder:
        (Path(folder) / "runs").symlink_to(world / "runs")
        for overlay in world.glob("*.yaml"):
            (Path(folder) / overlay.name).symlink_to(overlay)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lit_rlhf", *args, "--run_dir=out"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return f"FAILED: not done after {limit:.0f} s", []
        if done.returncode == 0:
            with (Path(folder) / "out/metrics.csv").open() as file:
                return f"{time.perf_counter() - start:.0f} s", list(csv.DictReader(file))
    print(f"\n{shlex.join(args)}\n{done.stdout}\n{done.stderr}", file=sys.stderr)
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return ("refused: " if done.returncode == 2 else "FAILED: ") + re.sub(r"^error: ", "", last)[:160], []


def difference(rows: list[dict[str, str]], others: list[dict[str, str]]) -> float:
    """Return the largest difference between the losses of two runs, relative to the larger of 1 and the other's."""

    def losses(rows: list[dict[str, str]]) -> dict[tuple[str, str], float]:
        return {(row["step"], name): float(row[name]) for row in rows for name in LOSSES if row.get(name)}

    own, other = losses(rows), losses(others)
    assert own.keys() == other.keys(), "the runs measured different things"
    return max(abs(own[key] - other[key]) / max(1.0, abs(other[key])) for key in own)


def main() -> int:
    """Run all checks, or list them; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--only", default="", help="those whose command holds this text")
    parser.add_argument("--limit", type=float, default=300, help="seconds a check may take")
    parser.add_argument("--jobs", type=int, default=1, help="checks at a time, where the GPUs have room for several")
    parser.add_argument(
        "what",
        nargs="?",
        choices=["overlays", "memory", "speed"],
        default="overlays",
        help="memory: what `plan` says beside what was held; speed: an iteration's profile, rollouts, attention, peers",
    )
    parser.add_argument("--tiny", action="store_true", help="with speed: whether it runs, on a CPU")
    parsed = parser.parse_args()
    if parsed.what == "speed" and (parsed.tiny or torch.cuda.is_available()):
        tiny = ["--tiny"] * parsed.tiny
        return subprocess.run(
            [sys.executable, str(Path(__file__).parent / "benchmarks/gpu_speed.py"), *tiny]
        ).returncode
    gpus = torch.cuda.device_count()
    wanted = [check for check in checks(gpus or (2 if parsed.list else 0)) if parsed.only in " ".join(check[2])]
    if parsed.list:
        print("\n".join(shlex.join(["lit-rlhf", *args]) for _, _, args in wanted))
        return 0
    if not gpus:
        print("no GPU here; --list prints what would run", file=sys.stderr)
        return 2
    from tests.helpers.overlay_world import write_world

    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if parsed.what == "memory":
        from tests.helpers.gpu_memory import print_table

        print_table(parsed.jobs)
        return 0
    print("without torchao" if find_spec("torchao") is None else "with torchao", "\n")
    print("| with | " + " | ".join(STAGES) + " |\n" + "|---" * (len(STAGES) + 1) + "|")
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(parsed.jobs) as pool:
        world = Path(folder) / "world"
        world.mkdir()
        write_world(world)
        comparisons = {shlex.join(args): args for args in (reference(stage, words) for stage, words, _ in wanted)}
        references = {key: pool.submit(run, args, world, parsed.limit) for key, args in comparisons.items()}
        runs = [pool.submit(run, args, world, parsed.limit) for _, _, args in wanted]
        cells: dict[str, list[str]] = {}
        for (stage, words, _), own in zip(wanted, runs):
            said, rows = own.result()
            expected = references[shlex.join(reference(stage, words))].result()[1]
            if rows and expected:
                said += f", {difference(rows, expected):.0e}"
            failed |= said.startswith("FAILED") or not expected
            cells.setdefault(words, []).append(said)
            if len(cells[words]) == len({each for each, others, _ in wanted if others == words}):
                print(f"| `{words}` | " + " | ".join(cells[words]) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
