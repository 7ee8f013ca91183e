"""This library against others on the same work: `make benchmark`, or with ARGS="reward_model" for one part.

Every figure comes from processes of their own that run in turn (ours, the peer's, ours, …), each with a warm-up that is
not counted; what is compared are medians. Peers are installed beside each other in `.venv-peers/`, seen by their own
process alone. Results go to `runs/benchmarks/results.json` and to the terminal.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import work

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = ROOT / "runs" / "benchmarks"
PEERS = {"trl": "trl==1.16.0", "trl-1.12.0": "trl==1.12.0"}
ROUNDS = 3


class Case(NamedTuple):
    """One row of the table."""

    name: str
    ours: list[str]  # script and arguments
    peer: list[str]
    environment: str  # of the peer; one that is not in PEERS is this library's own
    unit: str
    work: int  # of that unit in one timed step, where the workers do not count it themselves
    target: float


BIAS = f"--bias={work.ENDS_AT_A_THIRD}"
CASES = {
    "reward_model": [
        Case("K = 9 rankings, 64 + 64 tokens", ["ours_reward.py"], ["trl_reward.py"], "trl", "rankings/s", 1, 10.0)
    ],
    "ppo": [
        Case("PPO, no response ends early", ["ours_ppo.py"], ["trl_ppo.py"], "trl-1.12.0", "updates/s", 1, 1.2),
        Case(
            "PPO, no response ends early, 8 episodes a backward pass",
            ["ours_ppo.py", "--micro-batch=8"],
            ["trl_ppo.py", "--micro-batch=8"],
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
            ["ours_ppo.py", BIAS, "--precision=bf16-mixed"],
            ["trl_ppo.py", BIAS, "--bf16"],
            "trl-1.12.0",
            "updates/s",
            1,
            1.9,
        ),
    ],
    "ranks": [
        Case(
            "PPO, two processes against one, a thread each",
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
    ],
    "sft": [
        Case("SFT, packed", ["ours_sft.py"], ["trl_sft.py"], "trl", "real tokens/s", 1, 2.0),
        Case("SFT, packed, bare loop", ["ours_sft.py"], ["bare_sft.py"], "bare loop", "real tokens/s", 1, 0.9),
    ],
}


def install(peer: str) -> Path:
    """Return the folder of a peer, installed without its dependencies, which it shares with the library."""
    if peer not in PEERS:
        return ROOT
    folder = ROOT / ".venv-peers" / peer
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEERS[peer]]
        subprocess.run(command, check=True)
    return folder


def measure(script: list[str], folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Run a worker in a process of its own and return what it reports."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(HERE / script[0]), str(folder), *script[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Return medians and ratios of a case."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    peer = install(case.environment)
    for _ in range(ROUNDS):
        runs["ours"].append(measure(case.ours, folder, [ROOT, HERE]))
        runs["peer"].append(measure(case.peer, folder, [peer, HERE]))
    seconds = {who: statistics.median(cost for run in own for cost in costs(run)) for who, own in runs.items()}
    peak = {who: statistics.median(run["peak_mib"] for run in own) for who, own in runs.items()}
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
        "runs": runs,
    }


def costs(run: dict[str, Any]) -> list[float]:
    """Seconds of each step, for a unit of work where the worker counted them."""
    return [second / unit for second, unit in zip(run["seconds"], run.get("units", [1] * len(run["seconds"])))]


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| work | ours | peer | ratio | aim | peak memory, ours / peer |", "|---|---|---|---|---|---|"]
    for r in results:
        memory = f"{r['peak_mib']['ours']:.0f} / {r['peak_mib']['peer']:.0f} MiB = {r['memory_ratio']:.2f}"
        lines.append(
            f"| {r['name']} ({r['unit']}) | {r['ours']:.3g} | {r['peer']:.3g} ({r['against']}) | {r['ratio']:.2f} | "
            f"{r['target']} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the parts that are named, or all."""
    names = sys.argv[1:] or list(CASES)
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        sys.exit(f"error: no benchmark {unknown[0]!r}; there are {', '.join(CASES)}")
    folder = OUT / "work"
    folder.mkdir(parents=True, exist_ok=True)
    work.write_models(folder)
    for length in (32, 256):
        work.write_prompts(folder / f"prompts-{length}.jsonl", 256, length)
    work.write_demonstrations(folder / "demonstrations.jsonl", 512)
    work.write_rankings(folder / "rankings.jsonl", 32, 9, 64, 64)
    results = [compare(case, folder) for name in names for case in CASES[name]]
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": sys.version}
    about |= {"torch": torch.__version__, "lightning": version("lightning"), "transformers": version("transformers")}
    (OUT / "results.json").write_text(json.dumps({"about": about, "results": results}, indent=2))
    print(table(results))
    print(f"\n{about['cores']} cores, torch {about['torch']}; every run: {OUT / 'results.json'}")


if __name__ == "__main__":
    main()
