"""Measure a section, and build the report: `python -m lit_rlhf.synthetic.paper.results FOLDER SECTION --seed 0`."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.paths import written_whole
from lit_rlhf.synthetic.paper.estimates import Estimate, pool_seeds
from lit_rlhf.synthetic.paper.measurements import Context, Measured
from lit_rlhf.synthetic.paper.section_types import Panel, Section
from lit_rlhf.synthetic.paper.sections import LABELS, SECTIONS

DIGITS = 5  # significant ones of a number in results.json
MeasuredBySeed = Mapping[int, Mapping[str, Measured]]  # seed -> section -> values


def measure_section(folder: Path, key: str, seed: int) -> None:
    """Measure a section with the models of one seed and write `measured/KEY.json`."""
    measured = SECTIONS[key].measure(Context(folder, seed))
    target = folder / "measured" / f"{key}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(measured, indent=0) + "\n")


def read_measured(folder: Path, key: str) -> Measured:
    """Read a section that was measured with one seed."""
    values = json.loads((folder / "measured" / f"{key}.json").read_text())
    return {name: Estimate(*estimate) for name, estimate in values.items()}


def write_results(measured: MeasuredBySeed, scale: str, path: Path) -> None:
    """Write all values of all seeds: `section: name: [[value, low, high] of each seed]`, one name per line.

    Args:
        measured: seed -> section -> values; the same sections for every seed.
        scale: "full" or "tiny".
        path: of the JSON file.
    """
    sections = []
    for key, names in next(iter(measured.values())).items():
        rows = []
        for name in names:
            estimates = [[float(f"{each:.{DIGITS}g}") for each in values[key][name]] for values in measured.values()]
            rows.append(f"{json.dumps(name)}: {json.dumps(estimates)}")
        sections.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
    head = f'{{"scale": {json.dumps(scale)}, "seeds": {json.dumps(list(measured))}, "sections": {{\n'
    with written_whole(path) as part:
        part.write_text(head + ",\n".join(sections) + "\n}}\n")


def read_results(path: Path) -> tuple[dict[int, dict[str, Measured]], str]:
    """Return the values and the scale that `write_results` wrote."""
    results = json.loads(path.read_text())
    measured = {
        seed: {
            key: {name: Estimate(*estimates[index]) for name, estimates in names.items()}
            for key, names in results["sections"].items()
        }
        for index, seed in enumerate(results["seeds"])
    }
    return measured, results["scale"]


def build_report(measured: MeasuredBySeed, scale: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the report: its sections with their panels and findings.

    Args:
        measured: seed -> section -> values; the same sections for every seed.
        scale: "full" or "tiny".
        versions: of packages.
    """
    keys = next(iter(measured.values()))
    sections = [report_section(SECTIONS[key], {seed: values[key] for seed, values in measured.items()}) for key in keys]
    return {"seeds": list(measured), "scale": scale, "versions": dict(versions), "sections": sections}


def report_section(section: Section, measured: Mapping[int, Measured]) -> dict[str, Any]:
    """Return a section with values pooled over seeds."""
    by_seed = list(measured.values())
    values = {name: pool_seeds([each[name] for each in by_seed]) for name in by_seed[0]}
    findings = [(claim, claim.check(values)) for claim in section.claims]
    return {
        "key": section.key,
        "title": section.title,
        "paper": section.paper,
        "world": section.world,
        "panels": [report_panel(panel, values, by_seed) for panel in section.panels],
        "claims": [
            {"text": claim.text, "outcome": finding.outcome, "detail": finding.detail} for claim, finding in findings
        ],
    }


def report_panel(panel: Panel, values: Measured, by_seed: list[Measured]) -> dict[str, Any]:
    """Return a panel: of each series the values, those of every seed, and the paper's."""
    return {
        "title": panel.title,
        "unit": panel.unit,
        "x": list(panel.x),
        "axis": panel.axis,
        "series": [
            {
                "kind": kind,
                "label": LABELS[kind],
                "values": [list(values[name]) for name in names],
                "seeds": [[each[name].value for each in by_seed] for name in names],
                "paper": list(panel.paper.get(kind, ())),
                "positions": [values[name].value for name in panel.positions.get(kind, ())],
            }
            for kind, names in panel.series.items()
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="measure a section of the paper's report")
    parser.add_argument("folder", type=Path)
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    measure_section(arguments.folder, arguments.section, arguments.seed)
