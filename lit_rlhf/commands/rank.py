"""`lit-rlhf rank`: completions scored and ranked by one reward model or by several."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.commands.support.suggestions import Parser
from lit_rlhf.errors import UserError

COLUMNS = ("completions", "responses", "completion", "response")
WIDTH = 72  # of a completion in the table


class CompletionGroup(NamedTuple):
    """One prompt with what is to be ranked."""

    prompt: Any  # text, an instruction or a conversation
    completions: list[str]
    fields: dict[str, Any]  # all columns of the row
    origin: str


def run(command: str, args: list[str]) -> int:
    """Score every row's completions and write the rows with scores and ranks."""
    parser = Parser(
        prog="lit-rlhf rank", description="rows {prompt, completions} in, the same with scores and ranks out"
    )
    add = parser.add_argument
    add("file", nargs="?", default="-", help="JSONL, JSON, CSV or Parquet; - reads JSONL from stdin [-]")
    add("--model", action="append", required=True, metavar="DIR", help="a reward model; several make an ensemble")
    add("--aggregate", default="mean", metavar="NAME", help="mean, minimum or lower_bound [%(default)s]")
    add("--num_std", type=float, default=1.0, metavar="C", help="of lower_bound: mean - C std [%(default)s]")
    add("--template", metavar="NAME", help="how prompts were put into words in training [as they are]")
    add("--out", type=Path, metavar="FILE", help="write there [stdout]")
    add("--table", action="store_true", help="a table to read in place of JSONL")
    add("--batch-size", type=int, default=64, metavar="N", help="completions a forward pass [%(default)s]")
    settings = parser.parse(args)
    check(settings)
    quiet()
    candidates = read(settings.file)
    rows = ranked(candidates, settings)
    text = table(rows) if settings.table else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if settings.out is None:
        sys.stdout.write(text)
        return 0
    from lit_rlhf.commands.support.preflight import write_out

    write_out(text, settings.out)
    return 0


def check(settings: Namespace) -> None:
    """Refuse settings that contradict, before anything is read."""
    from lit_rlhf.functional import AGGREGATIONS

    if settings.aggregate not in AGGREGATIONS:
        raise UserError(f"--aggregate must be one of {', '.join(AGGREGATIONS)}, got {settings.aggregate!r}")
    if settings.num_std < 0:
        raise UserError(f"--num_std must be 0 or more, got {settings.num_std}")
    if settings.batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, got {settings.batch_size}")


def read(file: str, stdin: TextIO | None = None) -> list[CompletionGroup]:
    """Return the rows of a file, or of stdin.

    Raises:
        UserError: no such file, no row, a row without a prompt or without completions; file and line are named.
    """
    from lit_rlhf.data.formats.row_readers import prompt_of, value_of
    from lit_rlhf.data.sources import Row, read_rows

    rows: Sequence[Row] = read_rows(file) if file != "-" else stdin_rows(stdin or sys.stdin)
    candidates = []
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
            value = value_of(row, name, (list, str), "a text or a list of texts")
            texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{row.origin}: the completions must be texts, at least one")
        candidates.append(CompletionGroup(prompt_of(row), texts, row.fields, row.origin))
    return candidates


def stdin_rows(stream: TextIO) -> list[Any]:
    """Return the JSON lines of a stream."""
    from lit_rlhf.data.sources import Row

    rows = []
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as problem:
            raise UserError(f"stdin:{number}: this line does not parse as JSON: {problem.msg}") from None
        if not isinstance(value, dict):
            raise UserError(f"stdin:{number}: a row must be a JSON object with a prompt and completions")
        rows.append(Row(value, f"stdin:{number}"))
    if not rows:
        raise UserError("stdin holds no row: give a file, or JSON lines with a prompt and completions")
    return rows


def ranked(candidates: list[CompletionGroup], settings: Namespace) -> list[dict[str, Any]]:
    """Return the rows with `scores` and `ranks` (0 = best, equal scores tie), and `spread` for an ensemble."""
    import torch

    from lit_rlhf.functional import aggregate_scores

    members = torch.stack([scores_by(path, candidates, settings) for path in settings.model])  # (M, N)
    scores = aggregate_scores(members, settings.aggregate, settings.num_std)
    spread = members.std(0, correction=0)
    rows, start = [], 0
    for each in candidates:
        own = slice(start, start + len(each.completions))
        start = own.stop
        values = scores[own].tolist()
        order = {value: rank for rank, value in enumerate(sorted(set(values), reverse=True))}
        row = {**each.fields, "scores": values, "ranks": [order[value] for value in values]}
        rows.append(row if len(members) == 1 else row | {"spread": spread[own].tolist()})
    return rows


def scores_by(path: str, candidates: list[CompletionGroup], settings: Namespace) -> Any:
    """Return one model's scores of all completions in order, (N,)."""
    import torch

    from lit_rlhf.data.prompt_template import PromptTemplate
    from lit_rlhf.models.loading import load_tokenizer, max_positions
    from lit_rlhf.models.loading_config import ModelLoadingConfig
    from lit_rlhf.models.scalar_model import load_scalar_model
    from lit_rlhf.models.scoring import score_rows

    loading = ModelLoadingConfig()
    tokenizer = load_tokenizer(path, loading)
    model = load_scalar_model(path, tokenizer, loading)
    if model.head_is_new:
        raise UserError(f"--model: {path} is a language model, not a reward model: it has no trained score head")
    template = PromptTemplate(tokenizer, settings.template)
    prompts = template.encode([template.render(each.prompt, each.fields, each.origin) for each in candidates])
    texts = [text for each in candidates for text in each.completions]
    endings = iter(template.encode_replies(texts, [each.prompt for each in candidates for _ in each.completions]))
    limit, rows = max_positions(model.model.config), []
    for each, prompt in zip(candidates, prompts):
        for _ in each.completions:
            completion = next(endings)
            end = [] if completion[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
            rows.append(prompt + completion + end)
            if limit is not None and len(rows[-1]) > limit:
                raise UserError(
                    f"{each.origin}: prompt and completion have {len(rows[-1]):,} tokens, more than the {limit:,} "
                    f"positions of {path}; shorten them"
                )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return score_rows(model.to(device), rows, tokenizer.pad_token_id, settings.batch_size)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for a reader: each prompt, below it its completions from the best on."""
    lines = []
    for row in rows:
        name = next((each for each in COLUMNS if each in row), None)
        value = row[name] if name else [row["chosen"], row["rejected"]]
        texts = value if isinstance(value, list) else [value]
        lines.append(shortened(str(row.get("prompt") or row.get("instruction") or row.get("question") or "")))
        for rank, score, text in sorted(zip(row["ranks"], row["scores"], texts)):
            lines.append(f"  {rank:>3}  {score:>+9.3f}  {shortened(text)}")
    return "\n".join(lines) + "\n"


def shortened(text: str) -> str:
    """Return a text on one line, cut where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"
