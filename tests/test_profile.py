"""`make profile`: its table, and the number of calls into PyTorch that an iteration takes, which a GPU waits for."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
# calls at 2 layers and 4 micro-batches of 4 episodes, with a tenth to spare; who needs more says here why
MOST_CALLS = {
    "generate": 178,  # a decode step, with an eighth of the prefill
    "reward": 67,
    "reference log-probs": 61,
    "old values": 57,
    "policy, forward": 293,
    "backward, and the critic's passes": 999,
    "optimizer": 57,
    "collect, rest": 128,
}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """The module, and the phases of a small iteration."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import profile_ppo
        import workload
    finally:
        sys.path.remove(str(BENCHMARKS))
    folder = tmp_path_factory.mktemp("profile")
    options = "--size=32x2 --episodes=16 --micro-batch-size=4 --prompt=8 --response=16 --threads=1"
    args: argparse.Namespace = workload.build_ppo_parser().parse_args([str(folder), *options.split()])
    workload.write_models(folder, args.size)
    workload.write_prompts(workload.prompt_file(args), 64, args.prompt)
    counter, num_micro_batches = profile_ppo.profile_iteration(args, folder / "trace.json")
    assert num_micro_batches == 4
    return profile_ppo, counter, folder / "trace.json"


@pytest.mark.parametrize("phase", MOST_CALLS)
def test_a_phase_takes_no_more_calls_than_it_did(phase, profiled):
    _, counter, _ = profiled
    calls = counter.phases[phase].calls / (16 if phase == "generate" else 4)
    assert 0.7 * MOST_CALLS[phase] < calls <= MOST_CALLS[phase], "fewer is welcome: lower the number here"


def test_floating_point_operations_are_those_of_the_matrix_products(profiled):
    """One pass of the reference over 16 x 24 tokens; its head over the responses alone."""
    _, counter, _ = profiled
    hidden, layers = 32, 2
    blocks = layers * (4 * hidden**2 + 3 * hidden * (hidden * 11 // 4))
    products = 2 * (16 * 24 * blocks + 16 * 16 * hidden * 2048)
    flops = counter.phases["reference log-probs"].flops
    assert products <= flops < 1.35 * products, "attention, and padding of packed rows, are the rest"
    # backward: twice a forward, for the policy and the critic, and the critic's forward
    update = counter.phases["policy, forward"].flops + counter.phases["backward, and the critic's passes"].flops
    critic = 2 * 16 * 24 * blocks
    assert 3 * (products + critic) <= update < 1.35 * 3 * (products + critic)


def test_the_table_gives_every_phase_its_share_and_the_trace_opens(profiled):
    profile_ppo, counter, trace = profiled
    table = profile_ppo.format_table(counter, 16, 4, 1e12)
    rows = {row.split("|")[1].strip(): row.split("|") for row in table.splitlines()[2:]}
    sums = {"the update", "an iteration"}
    assert set(rows) == {*counter.phases, *sums} and set(MOST_CALLS) < set(rows)
    shares = {name: int(re.sub("%", "", row[3])) for name, row in rows.items()}
    assert 95 <= sum(share for name, share in shares.items() if name not in sums) <= 105
    assert abs(sum(shares[name] for name in profile_ppo.UPDATE) - shares["the update"]) <= 2
    assert shares["an iteration"] == 100
    assert any(event["name"] == "phase: generate" for event in json.loads(trace.read_text())["traceEvents"])


def test_launches_and_waits_go_to_the_innermost_phase(profiled, tmp_path):
    profile_ppo, _, _ = profiled
    events = [
        {"name": "phase: collect, rest", "ts": 0, "dur": 100},
        {"name": "phase: generate", "ts": 10, "dur": 50},
        {"name": "cudaGraphLaunch", "ts": 20, "dur": 1},
        {"name": "cudaLaunchKernelExC", "ts": 25, "dur": 1},
        {"name": "cudaStreamSynchronize", "ts": 30, "dur": 1},
        {"name": "cuLaunchKernel", "ts": 70, "dur": 1},
        {"name": "cudaDeviceSynchronize", "ts": 200, "dur": 1},
        {"name": "aten::mm", "ts": 30, "dur": 1},
        {"ph": "M"},
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    counter = profile_ppo.PhaseCounter("cpu")
    profile_ppo.add_launches(counter, trace)
    counts = {name: (phase.launches, phase.waits) for name, phase in counter.phases.items()}
    assert counts == {"generate": (2, 1), "collect, rest": (1, 0), profile_ppo.REST: (0, 1)}
