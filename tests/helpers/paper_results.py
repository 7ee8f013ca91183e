"""`make paper-results`: the numbers of `lit-rlhf paper` beside docs/paper.md, and what they say about each claim in it.

`python -m tests.helpers.paper_results [runs/paper]`
"""

import sys
from pathlib import Path
from typing import Any

from lit_rlhf.evaluation.reports.paper_report import OUTCOMES
from lit_rlhf.synthetic.paper.results import MeasuredBySeed, build_report, read_results
from tests.helpers.pages import ROOT, replace_between

PAGE, RESULTS = ROOT / "docs" / "paper.md", ROOT / "docs" / "paper-results.json"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"


def update_page(source: Path, page: Path, results: Path) -> None:
    """Copy the results of a run next to a page, and write what they say into it.

    Raises:
        ValueError: the results are of a tiny run, or the page has no place for them.
    """
    measured, scale = read_results(source)
    if scale != "full":
        raise ValueError(f"{source} is of a {scale} run, which shows no results")
    text = replace_results(page.read_text(), measured)
    results.write_text(source.read_text())
    page.write_text(text)


def replace_results(page: str, measured: MeasuredBySeed) -> str:
    """Return a page with these results between its marks."""
    return replace_between(page, BEGIN, END, render_results(build_report(measured, "full", {})))


def render_results(report: dict[str, Any]) -> str:
    """Return the claims of a report as Markdown."""
    claims = [(section, claim) for section in report["sections"] for claim in section["claims"]]
    counts = {outcome: sum(claim["outcome"] == outcome for _, claim in claims) for outcome in OUTCOMES}
    rows = [
        f"| `{section['key']}` | {claim['text']} | {format_outcome(claim['outcome'])} | {claim['detail']} |\n"
        for section, claim in claims
    ]
    return (
        f"As measured with the seeds {' and '.join(map(str, report['seeds']))}: of {len(claims)} claims "
        f"{counts['agrees']} agree, {counts['disagrees']} do not, and {counts['undecided']} are undecided. The last "
        "column says how many comparisons decided, and shows up to three as differences with their 95 % intervals. "
        "All values are in [paper-results.json](paper-results.json).\n\n"
        "| section | the paper's claim | here | by the numbers |\n|---|---|---|---|\n" + "".join(rows)
    )


def format_outcome(outcome: str) -> str:
    """Return an outcome in words, in bold if it disagrees."""
    return f"**{OUTCOMES[outcome]}**" if outcome == "disagrees" else OUTCOMES[outcome]


if __name__ == "__main__":
    run = Path(*sys.argv[1:2] or [ROOT / "runs" / "paper"])
    if not (run / "results.json").is_file():
        sys.exit(f"error: no {run / 'results.json'}: run lit-rlhf paper --seeds 0,1 first")
    update_page(run / "results.json", PAGE, RESULTS)
    print(f"{RESULTS}: {RESULTS.stat().st_size / 1e3:.0f} kB; {PAGE}")
