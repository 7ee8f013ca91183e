"""Scaling of an iteration's cost with episodes, response length and model size, and of a ranking's cost with K."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import workload

matplotlib.use("agg")
import matplotlib.pyplot as plt


class Axis(NamedTuple):
    """One quantity that is scaled, and the worker that is timed at each of its values."""

    name: str
    worker: str
    option: str
    values: list[Any]

    def script(self, value: Any) -> list[str]:
        """Return the worker and its arguments at a value."""
        return [self.worker, self.option.format(value), "--updates=1"]


EPISODES = Axis("episodes per iteration", "ours_ppo.py", "--episodes={}", [16, 32, 64, 128])
RESPONSE = Axis("tokens per response", "ours_ppo.py", "--response={}", [32, 64, 128, 256, 512])
COMPLETIONS = Axis("completions K per ranking", "ours_reward.py", "--rankings=rankings-{}.jsonl", [2, 4, 9, 16])
SIZE = Axis("parameters of the model, millions", "ours_ppo.py", "--size={}", ["128x4", "256x4", "512x4", "512x8"])
AXES = (EPISODES, RESPONSE, COMPLETIONS, SIZE)


def to_number(axis: Axis, value: Any) -> float:
    """Convert a value of an axis to a number."""
    return workload.num_matmul_parameters(value) / 1e6 if axis is SIZE else float(value)


def table(seconds: dict[str, list[float]]) -> str:
    """Format seconds at each value, and the growth of value and seconds from first to last, as a Markdown table."""
    lines = ["| what grows | values | seconds | grew | cost grew |", "|---|---|---|---|---|"]
    for axis in AXES:
        cost, numbers = seconds[axis.name], [to_number(axis, value) for value in axis.values]
        values = [f"{x:.1f}" if axis is SIZE else f"{x:.0f}" for x in numbers]
        lines.append(
            f"| {axis.name} | {', '.join(values)} | {', '.join(f'{second:.3g}' for second in cost)} | "
            f"{numbers[-1] / numbers[0]:.1f} × | {cost[-1] / cost[0]:.1f} × |"
        )
    return "\n".join(lines)


def plot(seconds: dict[str, list[float]], path: Path) -> None:
    """Plot seconds over each axis, with a proportional line through the last point."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(3 * len(AXES), 2.8), layout="constrained")
    for axis, panel in zip(AXES, panels):
        numbers = [to_number(axis, value) for value in axis.values]
        cost = seconds[axis.name]
        panel.loglog(numbers, [cost[-1] * x / numbers[-1] for x in numbers], color="0.7", label="proportional")
        panel.loglog(numbers, cost, marker="o", label="measured")
        panel.set_xticks(numbers, [f"{x:.3g}" for x in numbers])
        panel.minorticks_off()
        panel.set_xlabel(axis.name)
    panels[0].set_ylabel("seconds per step")
    panels[0].legend(frameon=False)
    figure.savefig(path)
