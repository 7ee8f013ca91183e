"""The numbers of a run, what they say about the paper's claims, and the table of that in docs/paper.md."""

from math import hypot
from pathlib import Path

import pytest

from lit_rlhf.synthetic.paper.estimates import Estimate, PaperClaim, pool_seeds
from lit_rlhf.synthetic.paper.results import DIGITS, MeasuredBySeed, read_results, write_results
from lit_rlhf.synthetic.paper.sections import SECTIONS
from tests.helpers.paper_results import BEGIN, END, PAGE, RESULTS, format_outcome, replace_results, update_page
from tests.helpers.paper_values import make_values

# section -> beginnings of the claims that the page has to answer
MAIN_CLAIMS = {
    "fig1": ("At each size: base below few-shot below SFT below PPO", "The smallest PPO-ptx is above the largest base"),
    "fig3": ("On instructions, held-out labelers are within 5 points",),
    "fig5": ("Both mixtures are rated below SFT, PPO and PPO-ptx",),
    "fig6": ("With the QA prompt, PPO is more often true and informative",),
    "fig7": ("With the respectful prefix, PPO-ptx is less toxic",),
    "bias": ("Without a prefix, PPO-ptx is not less biased",),
    "tax": ("PPO-ptx is above PPO on most tasks",),
    "fig8": ("PPO-ptx follows instructions in the second language more than the base model",),
    "sweeps": ("With γ, the best β is inside the sweep", "The best γ is inside the sweep"),
    "reward-model": (
        "Held-out labelers are predicted less well",
        "The accuracy on held-out labelers is at most 5 points",
    ),
    "preferences": ("On the mean over groups, a policy of one's own is preferred more",),
}
is_committed = pytest.mark.skipif(not RESULTS.is_file(), reason="no docs/paper-results.json: make paper-results")


@pytest.fixture(scope="module")
def made_up() -> MeasuredBySeed:
    return {seed: {key: make_values(key, 0.011 * seed) for key in SECTIONS} for seed in (0, 1)}


@pytest.fixture
def folder(made_up: MeasuredBySeed, tmp_path: Path) -> Path:
    write_results(made_up, "full", tmp_path / "results.json")
    (tmp_path / "paper.md").write_text(f"# Before\n\n{BEGIN}old\n{END}\nAfter.\n")
    return tmp_path


@pytest.fixture(params=["made up", pytest.param("committed", marks=is_committed)])
def page(request: pytest.FixtureRequest, folder: Path) -> tuple[str, MeasuredBySeed]:
    """A page and the results next to it."""
    if request.param == "committed":
        return PAGE.read_text(), read_results(RESULTS)[0]
    update_page(folder / "results.json", folder / "paper.md", folder / "paper-results.json")
    return (folder / "paper.md").read_text(), read_results(folder / "paper-results.json")[0]


def test_results_are_read_as_they_were_written(made_up: MeasuredBySeed, folder: Path) -> None:
    measured, scale = read_results(folder / "results.json")
    assert scale == "full" and list(measured) == [0, 1]
    for seed, sections in made_up.items():
        for key, values in sections.items():
            for name, estimate in values.items():
                assert measured[seed][key][name] == pytest.approx(estimate, rel=10.0 ** (1 - DIGITS))
    assert max(map(len, (folder / "results.json").read_text().splitlines())) < 130


def test_a_page_gets_its_results_and_keeps_the_rest(folder: Path) -> None:
    update_page(folder / "results.json", folder / "paper.md", folder / "paper-results.json")
    text = (folder / "paper.md").read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}As measured") and text.endswith(f"{END}\nAfter.\n")
    assert replace_results(text, read_results(folder / "paper-results.json")[0]) == text
    assert (folder / "paper-results.json").read_text() == (folder / "results.json").read_text()


@pytest.mark.parametrize(
    ("scale", "text", "message"), [("tiny", BEGIN + END, "tiny run"), ("full", "x", "has no <!--")]
)
def test_a_tiny_run_or_a_page_without_a_place_changes_nothing(
    scale: str, text: str, message: str, made_up: MeasuredBySeed, tmp_path: Path
) -> None:
    write_results(made_up, scale, tmp_path / "results.json")
    (tmp_path / "paper.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        update_page(tmp_path / "results.json", tmp_path / "paper.md", tmp_path / "paper-results.json")
    assert (tmp_path / "paper.md").read_text() == text and not (tmp_path / "paper-results.json").exists()


def test_the_page_says_what_the_results_say(page: tuple[str, MeasuredBySeed]) -> None:
    text, measured = page
    assert replace_results(text, measured) == text
    assert len(measured) >= 2, "one seed is no result"


def test_the_verdict_on_every_main_claim_follows_from_the_intervals(page: tuple[str, MeasuredBySeed]) -> None:
    text, measured = page
    for key, beginnings in MAIN_CLAIMS.items():
        values = {
            name: pool_seeds([sections[key][name] for sections in measured.values()])
            for name in next(iter(measured.values()))[key]
        }
        for beginning in beginnings:
            (claim,) = (each for each in SECTIONS[key].claims if each.text.startswith(beginning))
            (row,) = (line for line in text.splitlines() if line.startswith(f"| `{key}` | {claim.text} |"))
            assert row.split(" | ")[2] == format_outcome(judge(claim, values)), row


def judge(claim: PaperClaim, values: dict[str, Estimate]) -> str:
    """Return the outcome of a claim by its definition in docs/paper.md, from the intervals of the values alone."""
    outcomes = []
    for name, other in claim.pairs:
        a, b = values[name], values[other]
        difference = a.value - b.value
        low, high = (
            difference - hypot(a.value - a.low, b.high - b.value),
            difference + hypot(a.high - a.value, b.value - b.low),
        )
        match claim.kind:
            case "mostly":
                outcomes.append("agrees" if difference > 0 else "disagrees" if difference < 0 else "equal")
            case "within":
                inside = max(abs(low), abs(high)) <= claim.tolerance
                outside = low > claim.tolerance or high < -claim.tolerance
                outcomes.append("agrees" if inside else "disagrees" if outside else "undecided")
            case _:
                least = -claim.tolerance if claim.kind == "not below" else 0.0
                outcomes.append("agrees" if low > least else "disagrees" if high < least else "undecided")
    if claim.kind == "mostly":
        if set(outcomes) == {"equal"}:
            return "undecided"
        return "agrees" if outcomes.count("agrees") > outcomes.count("disagrees") else "disagrees"
    return next((each for each in ("disagrees", "undecided") if each in outcomes), "agrees")
