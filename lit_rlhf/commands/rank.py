"""`lit-rlhf rank`: score and rank completions with one or more reward models."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("completions", "responses", "completion", "response")
WIDTH = 72  # characters of a completion in the table


class CompletionGroup(NamedTuple):
    """One prompt and the completions to rank."""

    prompt: Any  # text, an instruction or a conversation
    completions: list[str]
    fields: dict[str, Any]  # all columns of the row
    origin: str


def run(command: str, args: list[str]) -> int:
    """Score every row's completions and write the rows with scores and ranks."""
    parser = Parser(prog="lit-rlhf rank", description="add scores and ranks to rows {prompt, completions}")
    add = parser.add_argument
    add("file", nargs="?", default="-", help="JSONL, JSON, CSV or Parquet; - reads JSONL from stdin [-]")
    add("--model", action="append", required=True, metavar="DIR", help="a reward model; repeat it for an ensemble")
    add("--aggregation", default="mean", metavar="NAME", help="mean, min or mean_minus_std [%(default)s]")
    add("--num-std", type=float, default=1.0, metavar="C", help="mean_minus_std is mean - C std [%(default)s]")
    add("--template", metavar="NAME", help="template of the prompts in training [none]")
    add("--out", type=Path, metavar="FILE", help="output file [stdout]")
    add("--table", action="store_true", help="print a table in place of JSONL")
    add("--batch-size", type=int, default=64, metavar="N", help="completions per forward pass [%(default)s]")
    settings = parser.parse(args)
    check_settings(settings)
    install_log_filters()
    from lit_rlhf.lineage.writing import Start

    start = Start.now()
    groups = read_groups(settings.file)
    rows = rank_groups(groups, settings)
    # default=str: a table may hold dates
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    text = format_table(rows) if settings.table else "".join(lines)
    if settings.out is None:
        sys.stdout.write(text)
        return 0
    from lit_rlhf.commands.support.preflight import write_output
    from lit_rlhf.commands.support.sample_lineage import write_sample_lineage

    write_output(text, settings.out)
    models = [("reward model", path) for path in settings.model]
    data = [] if settings.file == "-" else [("completions", settings.file)]
    write_sample_lineage(settings.out, start, command, args, settings, models, data)
    return 0


def check_settings(settings: Namespace) -> None:
    """Refuse invalid settings before anything is read."""
    from lit_rlhf.functional import AGGREGATIONS

    if settings.aggregation not in AGGREGATIONS:
        raise UserError(f"--aggregation must be one of {', '.join(AGGREGATIONS)}, got {settings.aggregation!r}")
    if settings.num_std < 0:
        raise UserError(f"--num-std must be 0 or more, got {settings.num_std}")
    if settings.batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, got {settings.batch_size}")


def read_groups(file: str) -> list[CompletionGroup]:
    """Return the rows of a file, or of stdin; print what in them is not read.

    Raises:
        UserError: there is no such file, no row, or a row without a prompt or completions; names file and line.
    """
    from lit_rlhf.data.formats.record_validation import is_empty
    from lit_rlhf.data.formats.row_readers import add_context, get_prompt, get_value
    from lit_rlhf.data.report import DatasetReport
    from lit_rlhf.data.sources import Row, parse_json_lines, read_rows, read_stdin

    rows: Sequence[Row] = read_rows(file) if file != "-" else list(parse_json_lines(read_stdin()))
    if not rows:
        raise UserError("stdin holds no row: give a file, or JSON lines with a prompt and completions")
    report = DatasetReport(file)
    groups = []
    for row in rows:
        name = next((each for each in COLUMNS if each in row.fields), None)
        if name is None:
            pair = [row.fields.get(each) for each in ("chosen", "rejected")]
            if not all(isinstance(each, str) for each in pair):
                raise UserError(
                    f"{row.origin}: no column of completions ({', '.join(COLUMNS)}, or chosen and rejected)"
                )
            texts: Any = pair
        else:
            value = get_value(row, name, (list, str), "a text or a list of texts")
            texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{row.origin}: the completions must be texts, at least one")
        prompt = get_prompt(row)
        if is_empty(prompt):
            raise UserError(f"{row.origin}: the prompt is empty")
        groups.append(CompletionGroup(add_context(prompt, row, report), texts, row.fields, row.origin))
    for reason, count in report.flagged.items():
        print(f"{count:,} of {len(rows):,} rows: {reason}", file=sys.stderr)
    return groups


def rank_groups(groups: list[CompletionGroup], settings: Namespace) -> list[dict[str, Any]]:
    """Return the rows with `scores` and `ranks` (0 is best, equal scores tie), and `std` for an ensemble."""
    import torch

    from lit_rlhf.functional import aggregate_scores

    members = torch.stack([score_completions(path, groups, settings) for path in settings.model])  # (M, N)
    scores = aggregate_scores(members, settings.aggregation, settings.num_std)
    std = members.std(0, correction=0)  # (N,)
    rows, start = [], 0
    for group in groups:
        part = slice(start, start + len(group.completions))
        start = part.stop
        values = scores[part].tolist()
        rank = {value: rank for rank, value in enumerate(sorted(set(values), reverse=True))}
        row = {**group.fields, "scores": values, "ranks": [rank[value] for value in values]}
        rows.append(row if len(members) == 1 else row | {"std": std[part].tolist()})
    return rows


def score_completions(path: str, groups: list[CompletionGroup], settings: Namespace) -> "Tensor":
    """Return one model's scores of all completions in order, (N,) float."""
    import torch

    from lit_rlhf.data.prompt_template import PromptTemplate
    from lit_rlhf.models.loading import load_tokenizer, max_positions
    from lit_rlhf.models.loading_config import ModelLoadingConfig
    from lit_rlhf.models.scalar_model import load_scalar_model
    from lit_rlhf.models.scoring import score_rows

    loading = ModelLoadingConfig()
    tokenizer = load_tokenizer(path, loading)
    template = PromptTemplate(tokenizer, settings.template)
    prompts = template.encode([template.render(group.prompt, group.fields, group.origin) for group in groups])
    texts = [text for group in groups for text in group.completions]
    completions = iter(template.encode_replies(texts, [group.prompt for group in groups for _ in group.completions]))
    model = load_scalar_model(path, tokenizer, loading)
    if model.head_is_new:
        raise UserError(f"--model: {path} is a language model, not a reward model: it has no trained score head")
    limit, rows = max_positions(model.model.config), []
    for group, prompt in zip(groups, prompts):
        for _ in group.completions:
            completion = next(completions)
            end = [] if completion[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
            rows.append(prompt + completion + end)
            if limit is not None and len(rows[-1]) > limit:
                raise UserError(
                    f"{group.origin}: prompt and completion have {len(rows[-1]):,} tokens, more than the {limit:,} "
                    f"positions of {path}; shorten them"
                )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = score_rows(model.to(device), rows, tokenizer.pad_token_id, settings.batch_size)
    check_finite(scores, path, [group.origin for group in groups for _ in group.completions])
    return scores


def check_finite(scores: "Tensor", path: str, origins: Sequence[str]) -> None:
    """Raise a UserError that names the first row with a score, (N,), that is not a finite number."""
    lost = (~scores.isfinite()).nonzero().flatten().tolist()
    if lost:
        raise UserError(
            f"--model: {len(lost):,} of {len(scores):,} scores of {path} are not finite, first in {origins[lost[0]]}; "
            "nothing can be ranked by them"
        )


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: each prompt, and below it its completions from best to worst."""
    lines = []
    for row in rows:
        name = next((each for each in COLUMNS if each in row), None)
        value = row[name] if name else [row["chosen"], row["rejected"]]
        texts = value if isinstance(value, list) else [value]
        lines.append(shorten(str(row.get("prompt") or row.get("instruction") or row.get("question") or "")))
        for rank, score, text in sorted(zip(row["ranks"], row["scores"], texts)):
            lines.append(f"  {rank:>3}  {score:>+9.3f}  {shorten(text)}")
    return "\n".join(lines) + "\n"


def shorten(text: str) -> str:
    """Return a text on one line of at most `WIDTH` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
