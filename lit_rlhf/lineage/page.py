"""The tree as one self-contained page: a drawing, from the data on the left to the output on the right, and tables."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_rlhf.lineage.text import describe_record, format_compute, format_seconds
from lit_rlhf.lineage.tree import Node

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, LANE, MARGIN = 230, 62, 70, 18, 12, 12
MAX_TEXT = 32  # characters of a line in a box


@dataclass
class Box:
    """A node of the drawing: everything at one path, whatever its roles."""

    node: Node
    column: int  # 0 is the output; further inputs are further left
    parents: list[str]  # paths
    problems: list[str]
    x: int = 0
    y: int = 0


def render_page(root: Node) -> str:
    """Return the page of a tree."""
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("lineage.html.jinja")
    boxes = place_boxes(root)
    records = [box.node.record for box in boxes.values() if box.node.record is not None]
    return template.render(
        title=f"{root.role}: {root.path}",
        drawing=draw(boxes),
        compute=format_compute(root),
        problems=list(dict.fromkeys(problem for box in boxes.values() for problem in box.problems)),
        stages=[
            {
                "role": record.role,
                "lines": describe_record(record),
                "command": record.command,
                "seed": record.seed,
                "devices": record.environment.devices,
                "packages": record.environment.packages,
                "url": record.wandb.url if record.wandb is not None else "",
            }
            for record in records
        ],
    )


def place_boxes(root: Node) -> dict[str, Box]:
    """Return the boxes by path, placed such that every edge leads from left to right."""
    boxes: dict[str, Box] = {}

    def add(node: Node, column: int) -> None:
        box = boxes.setdefault(node.path, Box(node, column, [], []))
        box.column = max(box.column, column)
        box.problems += node.problems
        for each in node.parents:
            if each.path not in box.parents:
                box.parents.append(each.path)
            add(each, column + 1)

    add(root, 0)
    # a node that stands twice has its inputs at its first place alone, whose column the second may exceed
    for _ in boxes:
        for box in boxes.values():
            for path in box.parents:
                boxes[path].column = max(boxes[path].column, box.column + 1)
    columns = max(box.column for box in boxes.values())
    rows = [0] * (columns + 1)
    for box in sorted(boxes.values(), key=lambda box: box.node.is_data):
        box.x = MARGIN + (columns - box.column) * (BOX_WIDTH + GAP_X)
        box.y = MARGIN + rows[box.column] * (BOX_HEIGHT + GAP_Y)
        rows[box.column] += 1
    return boxes


def draw(boxes: dict[str, Box]) -> str:
    """Return the boxes and their edges as SVG."""
    bottom = max(box.y for box in boxes.values()) + BOX_HEIGHT
    edges = [(boxes[path], box) for box in boxes.values() for path in box.parents]
    lines = [draw_edge(source, target) for source, target in edges if source.column == target.column + 1]
    lane = bottom + GAP_Y  # where the next edge that would pass behind boxes runs below them
    for source, target in edges:
        if source.column != target.column + 1:
            lines.append(draw_edge(source, target, lane))
            lane += LANE
    width = max(box.x for box in boxes.values()) + BOX_WIDTH + MARGIN
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{lane + MARGIN}" role="img">', *lines]
    for box in boxes.values():
        parts += draw_box(box)
    return "\n".join([*parts, "</svg>"])


def draw_edge(source: Box, target: Box, lane: int | None = None) -> str:
    """Return an edge from the right side of one box to the left side of another, by way of a lane below the boxes."""
    x, y, to_x, to_y = source.x + BOX_WIDTH, source.y + BOX_HEIGHT // 2, target.x, target.y + BOX_HEIGHT // 2
    bend = GAP_X // 2
    if lane is None:
        return f'<path class="edge" d="M{x} {y} C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}"/>'
    down = f"C{x + bend} {y} {x + bend} {lane} {x + GAP_X} {lane}"
    up = f"C{to_x - bend} {lane} {to_x - bend} {to_y} {to_x} {to_y}"
    return f'<path class="edge" d="M{x} {y} {down} H{to_x - GAP_X} {up}"/>'


def draw_box(box: Box) -> list[str]:
    """Return one box: its role, its path and how it was made."""
    node, record = box.node, box.node.record
    kind = "changed" if box.problems else "data" if node.is_data else "model"
    below = f"{node.rows:,} rows" if node.rows is not None else ""
    if record is not None:
        days = record.compute.petaflop_days
        cost = "" if days is None else f"{days:.2g} PF/s-days"
        below = " · ".join(filter(None, (format_seconds(record.compute.wall_seconds), cost, below)))
    role = node.role if record is None or node.is_data else record.role
    lines = [(role, "role"), (_shorten(node.path), "path"), (below, "note")]
    texts = [
        f'<text class="{style}" x="{box.x + 10}" y="{box.y + 20 + 17 * number}">{escape(text)}</text>'
        for number, (text, style) in enumerate(lines)
    ]
    title = escape("\n".join([node.path, *box.problems]))
    frame = f'<rect x="{box.x}" y="{box.y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
    return [f'<g class="{kind}"><title>{title}</title>', frame, *texts, "</g>"]


def _shorten(path: str) -> str:
    return path if len(path) <= MAX_TEXT else f"…{path[1 - MAX_TEXT :]}"
