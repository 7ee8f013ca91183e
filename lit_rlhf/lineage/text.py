"""The tree and the compute of its stages as text, within 80 columns."""

from lit_rlhf.lineage.records import LineageRecord
from lit_rlhf.lineage.tree import Node

WIDTH = 80


def format_tree(root: Node) -> str:
    """Return the tree as lines: role and path of each input, and below it when, where and how long it was made."""
    lines = [_shorten(f"{root.role}: ", root.path)]
    lines += [_fit(f"{'│' if root.parents else ' '}  {line}") for line in describe(root)]
    lines += _format_parents(root, "")
    return "\n".join(line.rstrip() for line in lines)


def _format_parents(node: Node, indent: str) -> list[str]:
    lines: list[str] = []
    for each in node.parents:
        is_last = each is node.parents[-1]
        inner = indent + ("   " if is_last else "│  ")
        lines.append(_shorten(f"{indent}{'└' if is_last else '├'}─ {each.role}: ", each.path))
        stem = "│  " if each.parents else "   "
        lines += [_fit(f"{inner}{stem}{line}") for line in describe(each)]
        lines += _format_parents(each, inner)
    return lines


def describe(node: Node) -> list[str]:
    """Return the lines below a node: how it was made, and what no longer matches."""
    lines = []
    if node.repeated:
        lines.append("as above")
    elif node.record is not None:
        lines.append(" · ".join(describe_record(node.record)))
    elif node.rows is not None:
        lines.append(f"{node.rows:,} rows")
    return [*lines, *(f"! {problem}" for problem in node.problems)]


def describe_record(record: LineageRecord) -> list[str]:
    """Return what is said of a record in one line."""
    made, compute, environment = record.role, record.compute, record.environment
    commit = environment.commit[:7] + ("+changes" if environment.dirty else "")
    parts = [made, compute.ended[:10], format_seconds(compute.wall_seconds), commit, " ".join(record.configs)]
    return [part for part in parts if part]


def stages(root: Node) -> list[Node]:
    """Return the stages of the procedure that took compute, the earliest first, each once."""
    found = {node.path: node for node in root.walk() if node.record is not None and not node.repeated}
    order = [node for node in found.values() if node.record is not None]
    return sorted(order, key=lambda node: node.record.compute.ended if node.record else "")


def format_compute(root: Node) -> str:
    """Return the compute of each stage and their sum, in petaflop/s-days as in the paper's section 5."""
    rows = [("stage", "petaflop/s-days", "tokens", "wall", "device", "where")]
    total_days, total_seconds, is_partial = 0.0, 0.0, False
    for node in stages(root):
        assert node.record is not None
        compute, days = node.record.compute, node.record.compute.petaflop_days
        is_partial |= days is None and node.record.role not in ("samples", "evaluation")
        total_days, total_seconds = total_days + (days or 0.0), total_seconds + (compute.device_seconds or 0.0)
        tokens = "" if compute.tokens is None else f"{compute.tokens:,}"
        times = format_seconds(compute.wall_seconds), format_seconds(compute.device_seconds)
        rows.append((node.record.role, "" if days is None else f"{days:.3g}", tokens, *times, node.path))
    rows.append(("sum", f"{total_days:.3g}", "", "", format_seconds(total_seconds), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for first, *numbers, where in rows:
        cells = [f"{first:<{widths[0]}}", *(f"{each:>{width}}" for each, width in zip(numbers, widths[1:]))]
        lines.append(_shorten("  ".join(cells) + "  ", where).rstrip())
    notes = ["a stage without a number was not counted"] if is_partial else []
    return "\n".join([*lines, *notes])


def format_seconds(seconds: float | None) -> str:
    """Return a duration: "52 s", "3.4 min", "2.1 h"."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _shorten(before: str, path: str) -> str:
    """Return a line whose path is shortened in front to fit."""
    space = max(WIDTH - len(before), 8)
    return _fit(before + (path if len(path) <= space else f"…{path[1 - space :]}"))


def _fit(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
