"""The pictures of docs/wandb.md and docs/lineage.md, from a quickstart.

`python -m tests.helpers.docs_pictures [runs/quickstart]`
"""

import csv
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from lit_rlhf.commands.workspace import SECTIONS, STEP, Plot
from lit_rlhf.lineage.page import render_page
from lit_rlhf.lineage.tree import build_tree
from tests.helpers.pages import ROOT

WORKSPACE, LINEAGE = ROOT / "docs" / "workspace.png", ROOT / "docs" / "lineage.svg"
STAGES = {"sft": "tab:green", "reward": "tab:orange", "ppo-ptx": "tab:blue"}
STYLES = ("-", "--", ":")  # of the metrics of a panel
COLUMNS, WIDTH, HEIGHT = 3, 3.4, 2.0  # inches of a panel


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Return the numbers of a run's metrics.csv, with W&B's name of the optimizer step."""
    with open(folder / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, STEP: row["step"]} for row in rows if "step" in row]


def draw_panel(axes: Axes, plot: Plot, runs: dict[str, list[dict[str, float]]]) -> bool:
    """Draw the lines of a panel; return whether there are any."""
    for stage, rows in runs.items():
        for metric, style in zip(plot.metrics, STYLES, strict=False):
            points = [(row[plot.x], row[metric]) for row in rows if metric in row and plot.x in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=STAGES[stage], label=f"{stage} {metric}", lw=1.2)
    axes.set_title(", ".join(plot.metrics), fontsize=7, loc="left")
    axes.set_xlabel(plot.x, fontsize=7)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=5, framealpha=0.6)
    return bool(axes.lines)


def draw_workspace(folder: Path, picture: Path) -> None:
    """Write the panels that have data, section by section, as a PNG of few colors.

    Args:
        folder: of a quickstart.
        picture: the file to write.
    """
    runs = {stage: read_rows(folder / stage) for stage in STAGES}
    logged = {name for rows in runs.values() for row in rows for name in row}
    sections = {
        title: [panel for panel in panels if isinstance(panel, Plot) and logged.intersection(panel.metrics)]
        for title, panels in SECTIONS.items()
    }
    lines = [
        (title if start == 0 else "", panels[start : start + COLUMNS])
        for title, panels in sections.items()
        for start in range(0, len(panels), COLUMNS)
    ]
    size = (COLUMNS * WIDTH, len(lines) * HEIGHT)
    figure, rows = plt.subplots(len(lines), COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for row, (title, panels) in zip(rows, lines, strict=True):
        row[0].text(0, 1.22, title, transform=row[0].transAxes, fontsize=9, weight="bold")
        for axes, panel in zip(row, (*panels, *[None] * COLUMNS), strict=False):
            if panel is None or not draw_panel(axes, panel, runs):
                axes.set_axis_off()
    figure.savefig(picture, dpi=90)


def draw_lineage(output: Path, picture: Path) -> None:
    """Write the drawing of `lit-rlhf lineage DIR --html`, with the page's style."""
    page = render_page(build_tree(output))
    (drawing,) = re.findall("<svg.*</svg>", page, re.DOTALL)
    style = "\n".join(line for line in page.splitlines() if line.startswith("svg "))
    start, end = drawing.split("\n", 1)
    picture.write_text(f"{start}\n<style>{style}</style>\n{end}\n")


if __name__ == "__main__":
    quickstart = Path(*sys.argv[1:2] or [Path("runs") / "quickstart"])  # relative: its paths are in the drawing
    draw_workspace(quickstart, WORKSPACE)
    draw_lineage(quickstart / "ppo-ptx" / "model", LINEAGE)
    for path in (WORKSPACE, LINEAGE):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
