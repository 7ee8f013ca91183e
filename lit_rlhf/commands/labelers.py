"""`lit-rlhf labelers`: agreement between labelers, and how reward models generalize to held-out labelers."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_rlhf.commands.support.argument_parser import Parser, read_action
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

ACTIONS = {
    "agreement": "agreement with 95% intervals and Krippendorff's alpha, of rankings with a column 'labeler'",
    "folds": "one reward model per held-out group of labelers and seed: accuracy on training and held-out labelers",
}


def run(command: str, args: list[str]) -> int:
    """Run one of the actions."""
    usage = "agreement PATH | folds -c RECIPE [--key=value ...]"
    action, rest = read_action("lit-rlhf labelers", usage, ACTIONS, args), args[1:]
    if action is None:
        return 0
    return run_agreement(rest) if action == "agreement" else run_all_folds(rest)


def run_agreement(args: list[str]) -> int:
    """Print the agreement table, and write it as JSON to `--out`."""
    parser = Parser(prog="lit-rlhf labelers agreement", description=ACTIONS["agreement"])
    parser.add_argument("path", help="rankings: any source of ComparisonDataModule")
    parser.add_argument("--format", default="auto", metavar="NAME", help="format of the rows [%(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the values there, as JSON")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="OVERLAY", help="log there too, such as logger/wandb"
    )
    settings = parser.parse(args)
    install_log_filters()
    from lit_rlhf.commands.support.report_runs import make_loggers, read_loggers
    from lit_rlhf.data.formats.registry import read_records
    from lit_rlhf.data.records import Ranking
    from lit_rlhf.data.report import DatasetReport
    from lit_rlhf.data.sources import read_rows
    from lit_rlhf.evaluation.labelers.agreement import build_agreement_report

    loggers = make_loggers(read_loggers(settings.config), Path.cwd())  # refused before anything is written
    dataset = DatasetReport(settings.path)
    report = build_agreement_report(
        read_records(read_rows(settings.path), "ranking", Ranking, settings.format, dataset)
    )
    print(dataset.format_table())
    print(f"\n{format_agreement(report)}")
    if settings.out is not None:
        write_json(report, settings.out)
    log_agreement(report, loggers)
    return 0


def log_agreement(report: dict[str, Any], loggers: "list[Logger]") -> None:
    """Log the agreement of each labeler and of all pairs."""
    from lit_rlhf.commands.support.report_runs import open_run
    from lit_rlhf.loggers import log_table

    parts = {**report["labelers"], "all pairs": {"rankings": report["rankings"], **report["all"]}}
    columns = ("rankings", "share", "low", "high", "comparisons", "ties", "prompts")
    rows = [{"labeler": name, **{column: part[column] for column in columns}} for name, part in parts.items()]
    with open_run(loggers, Path.cwd(), "labelers", [], [], {"alpha": report["alpha"]}):
        log_table(loggers, "labelers/agreement", rows)


def format_agreement(report: dict[str, Any]) -> str:
    """Return the table: each labeler against the others, then all pairs."""
    from lit_rlhf.evaluation.reports.quickstart_report import align_columns

    rows = [["labeler", "rankings", "agreement", "95 % interval", "comparisons", "ties", "prompts"]]
    parts = {**report["labelers"], "all pairs": {"rankings": report["rankings"], **report["all"]}}
    for name, part in parts.items():
        share = "–" if part["share"] is None else f"{100 * part['share']:.1f} %"
        interval = "–" if part["share"] is None else f"{100 * part['low']:.1f} to {100 * part['high']:.1f}"
        rows.append([name, *(f"{part['rankings']:,}", share, interval)])
        rows[-1] += [f"{part[key]:,}" for key in ("comparisons", "ties", "prompts")]
    alpha = "undefined" if report["alpha"] is None else f"{report['alpha']:.3f}"
    return f"{align_columns(rows)}\n\nKrippendorff's alpha (ordinal; better, tie, worse): {alpha}"


def run_all_folds(args: list[str]) -> int:
    """Train and test every fold with every seed; print the table and write folds.json."""
    parser = Parser(
        prog="lit-rlhf labelers folds",
        description=f"{ACTIONS['folds']}. All other options are those of lit-rlhf fit: -c RECIPE, --key=value",
    )
    add = parser.add_argument
    add("--groups", type=int, default=5, metavar="N", help="groups of labelers, of similar data size [%(default)s]")
    add("--group-column", metavar="NAME", help="column with each row's group, in place of --groups")
    add("--seeds", type=int, default=3, metavar="N", help="models per fold [%(default)s]")
    add("--unseen", type=float, default=0.1, metavar="F", help="fraction of prompts kept out of training [%(default)s]")
    add("--out", type=Path, default=Path("runs/labelers"), metavar="DIR", help="folder of folds.json [%(default)s]")
    add("--overwrite", action="store_true", help="replace the folds that the folder holds")
    settings, rest = parser.parse_known_args(args)
    check_settings(settings)
    install_log_filters()
    from lit_rlhf.commands.support.labeler_folds import run_folds

    result = run_folds(settings, rest)
    print(f"\n{format_folds(result)}")
    write_json(result, settings.out / "folds.json")
    return 0


def check_settings(settings: argparse.Namespace) -> None:
    """Refuse invalid settings."""
    if settings.seeds < 1:
        raise UserError(f"--seeds must be 1 or more, got {settings.seeds}")
    if not 0 < settings.unseen < 1:
        raise UserError(f"--unseen must lie between 0 and 1, got {settings.unseen}")


def format_folds(result: dict[str, Any]) -> str:
    """Return one line per fold, the mean over its seeds, and mean ± standard error over all."""
    from statistics import fmean

    from lit_rlhf.evaluation.reports.quickstart_report import align_columns

    rows = [["group held out", "labelers", "training labelers", "held-out labelers", "pairs"]]
    for group, labelers in result["groups"].items():
        own = [run for run in result["runs"] if run["group"] == group]
        shares = [f"{100 * fmean(run[f'{kind}_labelers'] for run in own):.1f} %" for kind in ("training", "heldout")]
        rows.append([group, str(len(labelers)), *shares, f"{own[0]['heldout_pairs']:,}"])
    summary = result["summary"]
    rows.append(
        [
            "all",
            str(sum(map(len, result["groups"].values()))),
            *(format_mean(summary[f"{kind}_labelers"]) for kind in ("training", "heldout")),
            f"{sum(run['heldout_pairs'] for run in result['runs'] if run['seed'] == 0):,}",
        ]
    )
    runs = f"{len(result['groups'])} folds × {result['settings']['seeds']} seeds"
    return (
        f"{align_columns(rows)}\n\nmean ± standard error over {runs}; difference {format_mean(summary['difference'])}. "
        "The paper (section 4.1): 72.4 ± 0.4 and 69.6 ± 0.9 %."
    )


def format_mean(part: dict[str, float | None]) -> str:
    """Return "72.4 ± 0.4 %"."""
    assert part["mean"] is not None
    error = "" if part["standard_error"] is None else f" ± {100 * part['standard_error']:.1f}"
    return f"{100 * part['mean']:.1f}{error} %"


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write indented JSON and print the path."""
    from lit_rlhf.commands.support.preflight import write_output

    write_output(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)
    print(f"written: {path}")
