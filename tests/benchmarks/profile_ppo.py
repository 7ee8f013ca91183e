"""Profile one PPO iteration, phase by phase: `make profile`, with ARGS of the PPO benchmark, or a folder before them.

Seconds are of an iteration that nothing but a clock watches. The next one is counted: calls of the host into PyTorch,
floating-point operations of matrix products and attention, and, under PyTorch's profiler, kernel launches and waits on
a GPU. Calls stand on a CPU for what the host would launch on a GPU. `runs/profile/trace.json` opens in Perfetto.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import ours_ppo
import torch
import workload
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lit_rlhf.modules import PPOModule

with suppress(ImportError):
    import torch.nn.attention.varlen

OUT = Path(__file__).parents[2] / "runs" / "profile"
REST = "everything else"
UPDATE = ("policy, forward", "backward, and the critic's passes", "optimizer")
LAUNCHES = re.compile(r"(cuda|cu)(LaunchKernel|GraphLaunch)")
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")


@dataclass
class Phase:
    """Figures of one phase of an iteration."""

    seconds: float = 0.0
    calls: int = 0  # operators that the host dispatched
    flops: float = 0.0  # of matrix products and attention
    launches: int = 0
    waits: int = 0


@dataclass
class PhaseCounter:
    """Assigns time, calls and operations to the phase that runs; the inner one where two are nested.

    Attributes:
        counting: whether operators are counted, which takes time; otherwise seconds are.
    """

    device: str
    counting: bool = False
    phases: dict[str, Phase] = field(default_factory=dict)
    running: list[str] = field(default_factory=lambda: [REST])
    since: float = 0.0

    @property
    def current(self) -> Phase:
        """The phase that runs."""
        return self.phases.setdefault(self.running[-1], Phase())

    def settle(self) -> None:
        """Give the time since the last change to the phase that runs."""
        if not self.counting:
            now = workload.clock(self.device)
            self.current.seconds += now - self.since
            self.since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a phase."""
        self.settle()
        self.running.append(name)
        with record_function(f"phase: {name}"):
            yield
            self.settle()
        self.running.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return run


class CountCalls(TorchDispatchMode):
    """Counts the operators of each phase, and the floating-point operations that `FlopCounterMode` knows."""

    def __init__(self, counter: PhaseCounter) -> None:
        super().__init__()
        self.counter = counter
        self.registry: dict[Any, Any] = dict(FlopCounterMode(display=False).flop_registry)
        for name in ("mkldnn::_linear_pointwise", "aten::linear"):  # not decomposed in inference mode
            self.registry[name] = _linear_flops

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call and run it."""
        result = function(*args, **(kwargs or {}))
        self.counter.current.calls += 1
        flops = self.registry.get(function._overloadpacket) or self.registry.get(function.name())
        if flops is not None:
            self.counter.current.flops += flops(*args, **(kwargs or {}), out_val=result)
        return result


def _linear_flops(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def watch(module: PPOModule, counter: PhaseCounter) -> None:
    """Make phases of the parts of an iteration."""
    steps: list[tuple[str, object, str]] = [
        ("generate", module.generator, "generate"),
        ("reward", module.reward, "score"),
        ("reference log-probs", module, "ref_logprobs"),
        ("old values", module, "critic_values"),
        ("collect, rest", module, "collect_experience"),
        *((name, module, method) for name, method in zip(UPDATE, ("training_step", "backward", "optimizer_step"))),
    ]
    for name, owner, method in steps:
        setattr(owner, method, counter.wrap(name, getattr(owner, method)))


class Profile(L.Callback):
    """Times the second iteration and counts the third."""

    def __init__(self, counter: PhaseCounter) -> None:
        self.counter = counter
        activities = [ProfilerActivity.CPU]
        if counter.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.calls = CountCalls(counter)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting in the third iteration; forget the first."""
        counter = self.counter
        if trainer.current_epoch == 1:
            counter.phases.clear()
        counter.since = workload.clock(counter.device)
        if trainer.current_epoch == 2:
            counter.counting = True
            self.profiler.start()
            self.calls.__enter__()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock, or the counting."""
        self.counter.settle()
        if trainer.current_epoch == 2:
            self.calls.__exit__(None, None, None)
            self.profiler.stop()


def add_launches(counter: PhaseCounter, trace: Path) -> None:
    """Add kernel launches and waits of a GPU to the innermost phase around each."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [(e["ts"], e["ts"] + e["dur"], e["name"][7:]) for e in events if e.get("name", "").startswith("phase: ")]
    for event in events:
        is_launch, is_wait = (pattern.match(event.get("name", "")) for pattern in (LAUNCHES, WAITS))
        if is_launch or is_wait:
            around = [(end - start, name) for start, end, name in spans if start <= event["ts"] <= end]
            phase = counter.phases.setdefault(min(around)[1] if around else REST, Phase())
            phase.launches += bool(is_launch)
            phase.waits += bool(is_wait)


def measure_peak(device: str, precision: str) -> float:
    """Return the floating-point operations per second of bare matrix products."""
    size = 1024 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    seconds = []
    for _ in range(6):
        start = workload.clock(device)
        matrix @ matrix
        seconds.append(workload.clock(device) - start)
    return float(2 * size**3 / min(seconds))


def format_table(counter: PhaseCounter, num_tokens: int, num_micro_batches: int, peak: float) -> str:
    """Return the figures as a Markdown table. `num_tokens` are decode steps, of all batches of a rollout."""
    total = sum(phase.seconds for phase in counter.phases.values())
    lines = [
        "| phase | seconds | share | calls | calls per | GFLOP | of the peak | kernel launches | waits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, phase in counter.phases.items():
        per, unit = (num_tokens, "decode step") if name == "generate" else (num_micro_batches, "micro-batch")
        rate = phase.flops / phase.seconds / peak if phase.seconds else 0.0
        lines.append(
            f"| {name} | {phase.seconds:.3f} | {phase.seconds / total:.0%} | {phase.calls:,} "
            f"| {phase.calls / per:.0f} a {unit} | {phase.flops / 1e9:,.1f} | {rate:.0%} "
            f"| {phase.launches or '-'} | {phase.waits or '-'} |"
        )
    for name, phases in (
        ("the update", [counter.phases[each] for each in UPDATE]),
        ("an iteration", [*counter.phases.values()]),
    ):
        seconds, flops = (sum(getattr(phase, what) for phase in phases) for what in ("seconds", "flops"))
        lines.append(
            f"| {name} | {seconds:.3f} | {seconds / total:.0%} | {sum(phase.calls for phase in phases):,} | "
            f"| {flops / 1e9:,.1f} | {flops / seconds / peak:.0%} | {sum(phase.launches for phase in phases) or '-'} "
            f"| {sum(phase.waits for phase in phases) or '-'} |"
        )
    return "\n".join(lines)


def profile_iteration(args: Any, trace: Path) -> tuple[PhaseCounter, int]:
    """Profile an iteration; return its figures and the number of micro-batches, and write the trace."""
    counter = PhaseCounter(args.device)
    profiler = Profile(counter)
    args.updates = 2
    module, trainer, prompts = ours_ppo.build_run(args, profiler)
    watch(module, counter)
    trainer.fit(module, prompts)
    profiler.profiler.export_chrome_trace(str(trace))
    if args.device == "cuda":
        add_launches(counter, trace)
    return counter, args.episodes // args.micro_batch_size


def main() -> None:
    """Profile, and print the table."""
    parser = workload.build_ppo_parser()
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the trace")
    given = [argument for argument in sys.argv[1:2] if not argument.startswith("-")]
    with nullcontext(given[0]) if given else tempfile.TemporaryDirectory() as folder:
        args = parser.parse_args([folder, *sys.argv[1 + len(given) :]])
        workload.write_models(args.folder, args.size)
        workload.write_prompts(workload.prompt_file(args), 4 * args.episodes, args.prompt)
        args.out.mkdir(parents=True, exist_ok=True)
        counter, num_micro_batches = profile_iteration(args, args.out / "trace.json")
    peak = measure_peak(args.device, args.precision)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    print(f"PPO, {args.size}, {args.episodes} episodes of at most {args.response} tokens, {args.precision}, on {name}:")
    print(f"peak of bare matrix products {peak / 1e12:.3f} TFLOP/s\n")
    print(format_table(counter, args.response, num_micro_batches, peak))
    print(f"\ntrace: {args.out / 'trace.json'}")
    workload.report([sum(phase.seconds for phase in counter.phases.values())])


if __name__ == "__main__":
    main()
