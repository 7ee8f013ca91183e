"""`make real-results`: the numbers of `lit-rlhf real` in docs/real-data.md and README.md, over several seeds.

`python -m tests.helpers.real_results [runs/smollm2-135m runs/second]`; the numbers of other seeds stay as they are.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.commands.support.real_scales import CPU
from lit_rlhf.evaluation.reports.real_report import (
    COLUMNS,
    STAGE_TITLES,
    Column,
    compute_changes,
    format_cell,
    get_cell,
)
from lit_rlhf.synthetic.paper.estimates import Estimate, pool_seeds
from tests.helpers.pages import ROOT, replace_between

RESULTS = ROOT / "docs" / "real-results.json"
PAGE = ROOT / "docs" / "real-data.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"
README_BEGIN, README_END = "<!-- real-table -->\n", "<!-- /real-table -->\n"
README_COLUMNS = ("preferred to SFT", "gold", "KL", "toxicity", "loss, encyclopedia")
CHANGED = ("gold", "proxy", "toxicity", "asked to be respectful", "HellaSwag", "loss, encyclopedia", "loss, novels")
KEPT = ("seed", "scale", "rows", "precision", "curves", "stages", "seconds_total", "peak_memory_gib", "versions")
MODELS = ("base", "SFT", "PPO", "PPO-ptx")  # in this order, then best-of-n: the files are sorted by name
STAGES = tuple(CPU.seconds)
ACCURACY = Column("accuracy", "", "", 3)

Report = dict[str, Any]


def keep_numbers(report: Report) -> Report:
    """Return the part of a report that the pages show: no text of the data, no sample.

    Raises:
        ValueError: the report is not of a full-length run.
    """
    if report["scale"] == "tiny":
        raise ValueError("a tiny run shows no results")
    metrics = {
        column.suite: {
            other.metric: report["evaluation"]["suites"][column.suite]["metrics"][other.metric]
            for other in COLUMNS
            if other.suite == column.suite
        }
        for column in COLUMNS
    }
    reward_models = {
        stage: {
            source: {key: found[key] for key in ("accuracy", "calibration_error", "pairs", "rankings")}
            for source, found in sources.items()
        }
        for stage, sources in order(report["reward_models"], STAGES).items()
    }
    evaluation = {
        "models": dict.fromkeys(order(report["evaluation"]["models"], MODELS)),
        "suites": {suite: {"metrics": values} for suite, values in metrics.items()},
    }
    kept = {key: report[key] for key in KEPT} | {"stages": order(report["stages"], STAGES)}
    return kept | {"reward_models": reward_models, "evaluation": evaluation}


def order(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the values in the order of the names, and others behind them."""
    ranks = {name: rank for rank, name in enumerate(names)}
    return {name: values[name] for name in sorted(values, key=lambda name: ranks.get(name, len(ranks)))}


def pool_cells(cells: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return value and interval of the mean over seeds; None where one of them was not measured."""
    known = [cell for cell in cells if cell is not None]
    if not known or len(known) < len(cells):
        return None
    if any(cell["low"] is None for cell in known):
        return {"value": sum(cell["value"] for cell in known) / len(known), "low": None, "high": None}
    return pool_seeds([Estimate(cell["value"], cell["low"], cell["high"]) for cell in known])._asdict()


def get_change(report: Report, column: Column, model: str) -> dict[str, Any] | None:
    """Return the change of a metric against the SFT model, with its interval; None where it was not measured."""
    cell = get_cell(report, column, model)
    if cell is None or "change" not in cell:
        return None
    return {"value": cell["change"], "low": cell["change_low"], "high": cell["change_high"]}


def render_models(reports: Sequence[Report], titles: Sequence[str] = ()) -> str:
    """Return the table of the models, a row each: means over the seeds; of all columns, or of those titles."""
    columns = [column for column in COLUMNS if not titles or column.title in titles]
    lines = [["", *(column.title for column in columns)], ["---"] * (1 + len(columns))]
    for model in reports[0]["evaluation"]["models"]:
        cells = [pool_cells([get_cell(report, column, model) for report in reports]) for column in columns]
        lines.append([model, *(format_cell(cell, column) for cell, column in zip(cells, columns, strict=True))])
    return render_table(lines)


def render_differences(reports: Sequence[Report]) -> str:
    """Return the table of changes against the SFT model, row by row of the data: means over the seeds."""
    columns = [column for column in COLUMNS if column.title in CHANGED]
    lines = [["against SFT", *(column.title for column in columns)], ["---"] * (1 + len(columns))]
    for model in reports[0]["evaluation"]["models"]:
        if model != "SFT":
            cells = [pool_cells([get_change(report, column, model) for report in reports]) for column in columns]
            lines.append([model, *(format_cell(cell, column) for cell, column in zip(cells, columns, strict=True))])
    return render_table(lines)


def render_reward_models(reports: Sequence[Report]) -> str:
    """Return the table of the reward models on held-out rankings, one row for each source and seed."""
    lines = [["reward model", "held-out rankings of", "seed", "accuracy", "calibration error", "pairs"], ["---"] * 6]
    for stage, source in dict.fromkeys(
        (stage, source) for report in reports for stage, found in report["reward_models"].items() for source in found
    ):
        for report in reports:
            if found := report["reward_models"].get(stage, {}).get(source):
                accuracy, error = format_cell(found["accuracy"], ACCURACY), f"{found['calibration_error']:.3f}"
                name = STAGE_TITLES[stage].partition(" ")[0]
                lines.append([name, source, str(report["seed"]), accuracy, error, str(found["pairs"])])
    return render_table(lines)


def render_changes(reports: Sequence[Report]) -> str:
    """Return the table of what PPO changed: at the iteration of the best gold score, and at the last one."""
    lines = [
        ["", "seed", "best gold at iteration", "its KL", "gold", "proxy", "last: KL", "gold", "proxy", "in deviations"],
        ["---"] * 10,
    ]
    for report in reports:
        for stage, best in compute_changes(report).items():
            curves = {name: dict(map(tuple, points)) for name, points in report["curves"][stage].items()}
            gold, proxy = curves["reward/gold"], curves["reward/proxy"]
            first, last = min(gold), max(gold)
            spread = curves["reward/score_std"][first]
            change = proxy[last] - proxy[first]
            numbers = f"{best['kl']:.2f}", f"{best['gold']:+.2f}", f"{best['proxy']:+.2f}"
            at_end = f"{curves['reward/kl'][last]:.2f}", f"{gold[last] - gold[first]:+.2f}", f"{change:+.2f}"
            when = f"{best['iteration'] + 1:.0f} of {last + 1:.0f}"
            lines.append([STAGE_TITLES[stage], str(report["seed"]), when, *numbers, *at_end, f"{change / spread:+.2f}"])
    return render_table(lines)


def render_costs(reports: Sequence[Report]) -> str:
    """Return the table of minutes, by stage and seed."""
    stages = [stage for stage in STAGES if any(stage in report["stages"] for report in reports)]
    lines = [["seed", *stages, "in all", "peak memory, GiB"], ["---"] * (len(stages) + 3)]
    for report in reports:
        minutes = [f"{report['stages'][stage] / 60:.1f}" if stage in report["stages"] else "–" for stage in stages]
        total = [f"{report['seconds_total'] / 60:.0f}", f"{report['peak_memory_gib']:.1f}"]
        lines.append([str(report["seed"]), *minutes, *total])
    return render_table(lines)


def describe_runs(reports: Sequence[Report]) -> str:
    """Return a sentence on seeds, machine and precision, for above the tables."""
    seeds = ", ".join(str(report["seed"]) for report in reports)
    machines = dict.fromkeys(
        f"{report['versions']['threads']} thread(s) of an {report['versions']['processor']}, "
        f"{report['precision']['precision']}, torch {report['versions']['torch']}"
        for report in reports
    )
    return f"Means over the seeds {seeds}. {'; '.join(machines)}. Intervals are 95 % over prompts.\n"


def render_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render_results(reports: Sequence[Report]) -> str:
    """Return all tables."""
    parts = (describe_runs, render_models, render_differences, render_reward_models, render_changes, render_costs)
    return "\n".join(render_part(reports) for render_part in parts)


def replace_results(page: str, reports: Sequence[Report]) -> str:
    """Return a page with these results between its marks."""
    return replace_between(page, BEGIN, END, render_results(reports))


def replace_readme_table(page: str, reports: Sequence[Report]) -> str:
    """Return the README with the short table of these results."""
    return replace_between(page, README_BEGIN, README_END, render_models(reports, README_COLUMNS))


def main(folders: Sequence[str]) -> None:
    """Write the results next to the page, and into it."""
    paths = [Path(folder) / "report.json" for folder in folders]
    for path in paths:
        if not path.is_file():
            sys.exit(f"error: no {path}: run lit-rlhf real --out {path.parent} first")
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    measured = [keep_numbers(json.loads(path.read_text())) for path in paths]
    by_seed = {report["seed"]: report for report in [*stored, *measured]}
    reports = [by_seed[seed] for seed in sorted(by_seed)]
    RESULTS.write_text(json.dumps(reports, indent=1) + "\n")
    PAGE.write_text(replace_results(PAGE.read_text(), reports))
    README.write_text(replace_readme_table(README.read_text(), reports))
    print(f"{RESULTS}: {RESULTS.stat().st_size / 1e3:.0f} kB; {PAGE}; {README}")


if __name__ == "__main__":
    main(sys.argv[1:] or [str(ROOT / "runs" / name) for name in ("smollm2-135m", "second")])
