"""Made-up values for the sections of `lit-rlhf paper`."""

from lit_rlhf.synthetic.paper.estimates import Estimate
from lit_rlhf.synthetic.paper.sections import SECTIONS


def make_values(key: str, shift: float) -> dict[str, Estimate]:
    """Return a value for every name that a section's panels and claims use."""
    section = SECTIONS[key]
    names = [name for panel in section.panels for series in panel.series.values() for name in series]
    names += [name for panel in section.panels for series in panel.positions.values() for name in series]
    names += [name for claim in section.claims for pair in claim.pairs for name in pair]
    unique = list(dict.fromkeys(names))
    values = [0.2 + 0.6 * (index * 7 % len(unique)) / len(unique) + shift for index in range(len(unique))]
    return {name: Estimate(value, value - 0.03, value + 0.03) for name, value in zip(unique, values, strict=True)}
