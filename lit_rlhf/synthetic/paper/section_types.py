"""What a section of the report is made of, and the parts that many share: panels over model size, pairs of kinds."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from lit_rlhf.synthetic.paper.estimates import PaperClaim
from lit_rlhf.synthetic.paper.measurements import KINDS, SIZES, Context, Measured, get_stage

SMALLEST = SIZES[0]
TUNED_KINDS = tuple(kind for kind in KINDS if kind != "base")


class Panel(NamedTuple):
    """A chart and the table below it: one line per series, over a common axis.

    Attributes:
        title: of both.
        unit: of the values.
        x: labels of the axis.
        series: key of a kind of model -> names of its values, one per label of `x`.
        paper: the paper's values in the same places, where it has them.
        positions: the names of the values at which each series lies on a numeric axis, in place of `x`.
        axis: what such an axis measures.
    """

    title: str
    unit: str
    x: Sequence[str]
    series: Mapping[str, Sequence[str]]
    paper: Mapping[str, Sequence[float]] = {}
    positions: Mapping[str, Sequence[str]] = {}
    axis: str = ""


class Section(NamedTuple):
    """A figure or table of the paper and its measurement.

    Attributes:
        key: its name in `--only`.
        title: on the page.
        paper: what the paper shows, in our words.
        world: what is measured here.
        stages: whose models the measurement needs.
        measure: measures one seed.
        panels: charts with tables.
        claims: what the paper says about the numbers.
    """

    key: str
    title: str
    paper: str
    world: str
    stages: Sequence[str]
    measure: Callable[[Context], Measured]
    panels: Sequence[Panel]
    claims: Sequence[PaperClaim]


def by_size(title: str, unit: str, name: str, kinds: Sequence[str], **paper: Sequence[float]) -> Panel:
    """Return a panel over model size; `name` has {size} and {kind}."""
    series = {kind: [name.format(size=size, kind=kind) for size in SIZES] for kind in kinds}
    return Panel(title, unit, SIZES, series, paper)


def chains(kinds: Sequence[str], name: str = "{size}/{kind}") -> list[tuple[str, str]]:
    """Return pairs (better, worse) of neighbors in an order of kinds, worst first, at every size."""
    return [
        (name.format(size=size, kind=better), name.format(size=size, kind=worse))
        for size in SIZES
        for worse, better in pairwise(kinds)
    ]


def at_sizes(first: str, second: str) -> list[tuple[str, str]]:
    """Return pairs of values at every size; both names have {size}."""
    return [(first.format(size=size), second.format(size=size)) for size in SIZES]


def list_stages(kinds: Sequence[str], sizes: Sequence[str] = SIZES) -> list[str]:
    """Return the stages that train these kinds of models, each once."""
    return list(dict.fromkeys(get_stage(kind, size) for size in sizes for kind in kinds))
