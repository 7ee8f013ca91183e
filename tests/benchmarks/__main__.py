"""Benchmarks against other libraries on the same workload: `make benchmark`, or ARGS="reward_model" for one part.

Each measurement runs in a separate process; ours and the peer's alternate, each after a warm-up that is not counted,
and medians are compared. Each peer is installed in its own folder of `.venv-peers/`, which only its process imports.
Results go to `runs/benchmarks/results.json` and to the terminal.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import scaling
import torch
import workload

HERE = workload.HERE
ROOT = HERE.parents[1]
OUT = ROOT / "runs" / "benchmarks"
PEERS = {"trl": "trl==1.16.0", "trl-1.12.0": "trl==1.12.0"}
ROUNDS = 3


class Case(NamedTuple):
    """One row of the table."""

    name: str
    ours: list[str]  # script and arguments
    peer: list[str]
    environment: str  # a key of PEERS, or a label where the peer needs no package of its own
    unit: str
    work: int  # units per timed step, unless the workers report them
    target: float


BIAS = f"--bias={workload.ENDS_AT_A_THIRD}"
BF16 = "--precision=bf16-mixed"
GPU, GPU_PPO = workload.GPU, workload.GPU_PPO
SMOLLM2 = [f"--size={workload.SMOLLM2}", "--updates=2"]
ONLY_IF_NAMED = ("smollm2", "gpu")
CASES = {
    "reward_model": [
        Case("K = 9 rankings, 64 + 64 tokens", ["ours_reward.py"], ["trl_reward.py"], "trl", "rankings/s", 1, 10.0)
    ],
    "ppo": [
        Case("PPO, no response ends early", ["ours_ppo.py"], ["trl_ppo.py"], "trl-1.12.0", "updates/s", 1, 1.2),
        Case(
            "PPO, no response ends early, 8 episodes per backward pass",
            ["ours_ppo.py", "--micro-batch-size=8"],
            ["trl_ppo.py", "--micro-batch-size=8"],
            "trl-1.12.0",
            "updates/s",
            1,
            1.2,
        ),
        Case("PPO, ragged", ["ours_ppo.py", BIAS], ["trl_ppo.py", BIAS], "trl-1.12.0", "updates/s", 1, 1.9),
        Case(
            "PPO, ragged, prompt 256, 4 samples each",
            ["ours_ppo.py", BIAS, "--prompt=256", "--samples=4"],
            ["trl_ppo.py", BIAS, "--prompt=256", "--samples=4"],
            "trl-1.12.0",
            "updates/s",
            1,
            2.5,
        ),
        Case(
            "PPO, ragged, bf16",
            ["ours_ppo.py", BIAS, BF16],
            ["trl_ppo.py", BIAS, BF16],
            "trl-1.12.0",
            "updates/s",
            1,
            1.9,
        ),
    ],
    "ranks": [
        Case(
            "PPO, two processes against one, one thread each",
            ["ours_ppo.py", "--devices=2", "--threads=1"],
            ["ours_ppo.py", "--threads=1"],
            "one process",
            "updates/s",
            1,
            1.7,
        )
    ],
    "rollout": [
        Case("rollout, ragged", ["ours_rollout.py", BIAS], ["hf_rollout.py", BIAS], "generate", "tokens/s", 1, 2.5),
        Case(
            "rollout, ragged, compiled",
            ["ours_rollout.py", BIAS, "--compile"],
            ["hf_rollout.py", BIAS],
            "generate",
            "tokens/s",
            1,
            4.0,
        ),
        Case(
            "its products and attention",
            ["rollout_bound.py", BIAS],
            ["hf_rollout.py", BIAS],
            "generate",
            "tokens/s",
            1,
            4.0,
        ),
    ],
    "sft": [
        Case("SFT, packed", ["ours_sft.py"], ["trl_sft.py"], "trl", "real tokens/s", 1, 2.0),
        Case("SFT, packed, bare loop", ["ours_sft.py"], ["bare_sft.py"], "bare loop", "real tokens/s", 1, 0.9),
    ],
    "smollm2": [
        Case(
            "SFT, packed",
            ["ours_sft.py", *SMOLLM2, "--rows=4"],
            ["trl_sft.py", *SMOLLM2, "--rows=4"],
            "trl",
            "real tokens/s",
            1,
            1.5,
        ),
        Case(
            "K = 4 rankings, 64 + 64 tokens",
            ["ours_reward.py", *SMOLLM2, "--rankings=rankings-4.jsonl"],
            ["trl_reward.py", *SMOLLM2, "--rankings=rankings-4.jsonl"],
            "trl",
            "rankings/s",
            1,
            3.0,
        ),
        Case(
            "rollout",
            ["ours_rollout.py", *SMOLLM2, "--episodes=32"],
            ["hf_rollout.py", *SMOLLM2, "--episodes=32"],
            "generate",
            "tokens/s",
            1,
            1.0,
        ),
    ],
    "gpu": [
        Case("rollout", ["ours_rollout.py", *GPU_PPO], ["hf_rollout.py", *GPU_PPO], "generate", "tokens/s", 1, 2.5),
        Case("SFT, packed", ["ours_sft.py", *GPU], ["trl_sft.py", *GPU], "trl", "real tokens/s", 1, 1.0),
        Case("PPO", ["ours_ppo.py", *GPU_PPO], ["trl_ppo.py", *GPU_PPO], "trl-1.12.0", "updates/s", 1, 1.0),
    ],
}


def install(peer: str) -> Path:
    """Install a peer without its dependencies, which it shares with this library, and return its folder."""
    if peer not in PEERS:
        return ROOT
    folder = ROOT / ".venv-peers" / peer
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEERS[peer]]
        subprocess.run(command, check=True)
    return folder


def compare(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Return medians and ratios of a case, and the FLOP/s of our side next to the machine's peak."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    peer = install(case.environment)
    peak_rate = peak_flops(case.ours, folder)
    for _ in range(rounds):
        runs["ours"].append(workload.run_worker(case.ours, folder, [ROOT, HERE]))
        runs["peer"].append(workload.run_worker(case.peer, folder, [peer, HERE]))
    seconds = {
        who: statistics.median(cost for run in side for cost in seconds_per_unit(run)) for who, side in runs.items()
    }
    peak = {who: statistics.median(run["peak_mib"] for run in side) for who, side in runs.items()}
    return {
        "name": case.name,
        "unit": case.unit,
        "ours": case.work / seconds["ours"],
        "peer": case.work / seconds["peer"],
        "ratio": seconds["peer"] / seconds["ours"],
        "target": case.target,
        "memory_ratio": peak["ours"] / peak["peer"],
        "peak_mib": peak,
        "against": case.environment,
        "peak_flops": peak_rate,
        "flops": runs["ours"][0].get("flops", 0) / seconds["ours"],
        "runs": runs,
    }


def seconds_per_unit(run: dict[str, Any]) -> list[float]:
    """Return the seconds of each step, per unit of work where the worker counted units."""
    return [second / unit for second, unit in zip(run["seconds"], run.get("units", [1] * len(run["seconds"])))]


def peak_flops(script: list[str], folder: Path) -> float:
    """Measure the FLOP/s of bare matrix products on the device and in the precision of a worker."""
    options = [option for option in script if option.startswith(("--device=", "--precision=", "--threads="))]
    result = workload.run_worker(["matrix_peak.py", *options], folder, [HERE])
    return float(result["flops"]) / statistics.median(result["seconds"])


def reason_to_skip(case: Case, folder: Path) -> str:
    """Return why a case is pointless on this machine, or an empty string."""
    if BF16 not in case.ours or "--device=cuda" in case.ours:
        return ""
    bf16, fp32 = peak_flops(case.ours, folder) / 1e9, peak_flops([], folder) / 1e9
    reason = f"this CPU reaches {bf16:,.0f} GFLOP/s of matrix products in bfloat16, and {fp32:,.0f} in float32"
    return reason if bf16 < fp32 else ""


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    lines = ["| work | ours | peer | ratio | target | matrix peak | peak memory, ours / peer |", "|---" * 7 + "|"]
    for r in results:
        utilization = (
            f"{r['flops'] / r['peak_flops']:.0%} of {r['peak_flops'] / 1e9:,.0f} GFLOP/s" if r["flops"] else ""
        )
        memory = f"{r['peak_mib']['ours']:.0f} / {r['peak_mib']['peer']:.0f} MiB = {r['memory_ratio']:.2f}"
        lines.append(
            f"| {r['name']} ({r['unit']}) | {r['ours']:.3g} | {r['peer']:.3g} ({r['against']}) | {r['ratio']:.2f} | "
            f"{r['target']} | {utilization} | {memory} |"
        )
    return "\n".join(lines)


def measure_scaling(folder: Path) -> dict[str, list[float]]:
    """Return the median seconds per step at each value of each axis, by the name of the axis."""
    return {
        axis.name: [
            statistics.median(workload.run_worker(axis.script(value), folder, [ROOT, HERE])["seconds"])
            for value in axis.values
        ]
        for axis in scaling.AXES
    }


def write_workload(folder: Path, parts: list[str]) -> None:
    """Write the models and data of the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    further = {"scaling": scaling.SIZE.values, "smollm2": [workload.SMOLLM2], "gpu": ["2048x16"]}
    sizes = [workload.SIZE, *(size for part, values in further.items() if part in parts for size in values)]
    for size in dict.fromkeys(sizes):
        workload.write_models(folder, size)
    for length in (32, 256):
        workload.write_prompts(folder / f"prompts-{length}.jsonl", 256, length)
    workload.write_demonstrations(folder / "demonstrations.jsonl", 512)
    for completions in scaling.COMPLETIONS.values:
        lengths = workload.RANKED_PROMPT, workload.RANKED_COMPLETION
        workload.write_rankings(folder / f"rankings-{completions}.jsonl", 32, completions, *lengths)


def main() -> None:
    """Run the named parts, by default all that need no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CASES, "scaling"]
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; all but {' and '.join(ONLY_IF_NAMED)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parsed = parser.parse_args()
    parts = parsed.parts or [name for name in names if name not in ONLY_IF_NAMED]
    unknown = sorted(set(parts) - set(names))
    if unknown:
        sys.exit(f"error: no benchmark {unknown[0]!r}; there are {', '.join(names)}")
    if "gpu" in parts and not torch.cuda.is_available():
        sys.exit("error: the part 'gpu' needs a GPU, and there is none")
    folder = OUT / "work"
    write_workload(folder, parts)
    results = []
    for case in (case for name in parts for case in CASES.get(name, [])):
        if reason := reason_to_skip(case, folder):
            print(f"skipped: {case.name}: {reason}", flush=True)
        else:
            results.append(compare(case, folder, parsed.rounds))
            print(table(results[-1:]), flush=True)  # a run of many parts may be stopped
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": sys.version}
    about |= {"torch": torch.__version__, "lightning": version("lightning"), "transformers": version("transformers")}
    if results:
        print(table(results))
    growth = measure_scaling(folder) if "scaling" in parts else {}
    if growth:
        scaling.plot(growth, OUT / "scaling.svg")
        print(scaling.table(growth))
    (OUT / "results.json").write_text(json.dumps({"about": about, "results": results, "scaling": growth}, indent=2))
    print(f"\n{about['cores']} cores, torch {about['torch']}; every run: {OUT / 'results.json'}")


if __name__ == "__main__":
    main()
