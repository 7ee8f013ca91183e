"""How the cost of an iteration grows with episodes, response length and model, and that of a ranking with K."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import work

matplotlib.use("agg")
import matplotlib.pyplot as plt


class Axis(NamedTuple):
    """One thing that grows, and the worker that is timed at each of its values."""

    name: str
    worker: str
    option: str
    values: list[Any]

    def script(self, value: Any) -> list[str]:
        """Return the worker and its arguments at a value."""
        return [self.worker, self.option.format(value), "--updates=1"]


EPISODES = Axis("episodes of an iteration", "ours_ppo.py", "--episodes={}", [16, 32, 64, 128])
RESPONSE = Axis("tokens of a response", "ours_ppo.py", "--response={}", [32, 64, 128, 256, 512])
COMPLETIONS = Axis("completions K of a ranking", "ours_reward.py", "--rankings=rankings-{}.jsonl", [2, 4, 9, 16])
SIZE = Axis("parameters of the model, millions", "ours_ppo.py", "--size={}", ["128x4", "256x4", "512x4", "512x8"])
AXES = (EPISODES, RESPONSE, COMPLETIONS, SIZE)


def place(axis: Axis, value: Any) -> float:
    """Return a value as a number."""
    return work.parameters(value) / 1e6 if axis is SIZE else float(value)


def table(seconds: dict[str, list[float]]) -> str:
    """Return the seconds at each value, and how many times those of the first, where it grew so many times."""
    lines = ["| what grows | values | seconds | grew | cost grew |", "|---|---|---|---|---|"]
    for axis in AXES:
        cost, places = seconds[axis.name], [place(axis, value) for value in axis.values]
        values = [f"{x:.1f}" if axis is SIZE else f"{x:.0f}" for x in places]
        lines.append(
            f"| {axis.name} | {', '.join(values)} | {', '.join(f'{second:.3g}' for second in cost)} | "
            f"{places[-1] / places[0]:.1f} × | {cost[-1] / cost[0]:.1f} × |"
        )
    return "\n".join(lines)


def plot(seconds: dict[str, list[float]], path: Path) -> None:
    """Draw them, each beside a line through its last point that grows as its axis does."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(3 * len(AXES), 2.8), layout="constrained")
    for axis, panel in zip(AXES, panels):
        places = [place(axis, value) for value in axis.values]
        cost = seconds[axis.name]
        panel.loglog(places, [cost[-1] * x / places[-1] for x in places], color="0.7", label="proportional")
        panel.loglog(places, cost, marker="o", label="measured")
        panel.set_xticks(places, [f"{x:.3g}" for x in places])
        panel.minorticks_off()
        panel.set_xlabel(axis.name)
    panels[0].set_ylabel("seconds of a step")
    panels[0].legend(frameon=False)
    figure.savefig(path)
