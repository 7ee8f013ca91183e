"""The speed of one GPU in less than six minutes: `make gpu-check ARGS=speed`; with `--tiny` the same steps on a CPU.

A packed row by the kernel and under a mask; an iteration of PPO at 0.8 billion parameters, phase by phase, with the
share of the peak that the update reaches; rollouts with steps captured in CUDA graphs and without; and transformers,
TRL and vLLM beside them, where they are installed (`.venv-peers/trl-1.12.0`, `.venv-vllm`). The most important is
first: a step that is not done when the time is up is stopped, and those after it are left out.
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import workload

ROOT = workload.HERE.parents[1]
TRL, VLLM = ROOT / ".venv-peers" / "trl-1.12.0", ROOT / ".venv-vllm" / "bin" / "python"
TINY = ["--size=32x2", "--prompt=8", "--response=8", "--episodes=8", "--micro-batch-size=2", "--threads=1"]


class Step(NamedTuple):
    """One worker, and how its result is called."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    unit: str = "s"  # of a step; tokens/s; or none, for one that prints a table of its own
    path: Path = ROOT
    python: str = sys.executable
    is_installed: bool = True


def list_steps(out: Path) -> list[Step]:
    """Return the steps in the order of their importance."""
    python = str(VLLM) if VLLM.exists() else sys.executable
    has_vllm = VLLM.exists() or find_spec("vllm") is not None
    once = ("--updates=1",)
    return [
        Step("packed attention", "packed_attention.py", unit=""),
        Step("PPO iteration", "profile_ppo.py", (f"--out={out}",)),
        Step("rollout, captured", "ours_rollout.py", once, "tokens/s"),
        Step("rollout, eager", "ours_rollout.py", (*once, "--eager"), "tokens/s"),
        Step("rollout, transformers' generate", "hf_rollout.py", once, "tokens/s"),
        Step("PPO iteration, TRL 1.12.0", "trl_ppo.py", once, "s", TRL, is_installed=TRL.is_dir()),
        Step("PPO iteration, compiled blocks", "ours_ppo.py", (*once, "--compile")),
        Step("rollout, vLLM", "vllm_rollout.py", once, "tokens/s", ROOT, python, has_vllm),
    ]


def measure(step: Step, options: list[str], folder: Path, left: float) -> tuple[str, bool]:
    """Run a step in the seconds that are left and print its own tables; return its figure, and whether it failed."""
    if not step.is_installed:
        return "not installed", False
    script, paths = [step.script, *options, *step.options], [step.path, workload.HERE]
    try:
        result = workload.run_worker(script, folder, paths, step.python, max(left, 0.0))
    except TimeoutError:
        return "no time left", False
    except RuntimeError as error:
        print(f"{step.name}: {error}", file=sys.stderr)
        return "FAILED", True
    if result["text"]:
        print(f"{result['text']}\n", flush=True)
    if not step.unit:
        return "above", False
    rates = (unit / second for unit, second in zip(result.get("units", ()), result["seconds"]))
    return f"{statistics.median(rates if step.unit == 'tokens/s' else result['seconds']):,.3g} {step.unit}", False


def main(arguments: list[str] | None = None) -> int:
    """Run the steps and print a table; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: whether all steps run")
    parser.add_argument("--limit", type=float, default=340, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "profile", help="folder of the trace")
    parsed = parser.parse_args(arguments)
    options, end, failed = TINY if parsed.tiny else workload.GPU_PPO, time.monotonic() + parsed.limit, False
    lines = ["| what | figure |", "|---|---|"]
    print(f"{'a CPU' if parsed.tiny else torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = workload.build_ppo_parser().parse_args([name, *options])
        workload.write_models(folder, args.size)
        workload.write_prompts(workload.prompt_file(args), 4 * args.episodes, args.prompt)
        for step in list_steps(parsed.out):
            if parsed.tiny and "--compile" in step.options:  # takes a minute
                continue
            figure, failure = measure(step, options, folder, end - time.monotonic())
            lines.append(f"| {step.name} | {figure} |")
            failed |= failure
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
