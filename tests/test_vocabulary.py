"""One language: the field's terms in American spelling, in code, recipes and docs (tests apart from their names)."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# a private word, and what to write instead
PRIVATE_WORDS = {
    r"mend(?:s|ed|ing)?": "fix, hint",
    r"rooms?": "KV cache, space, limit",
    r"rid(?:es?|ing|den)": "attach, shared backbone",
    r"deal(?:s|t|ing)?": "partition, assign",
    r"(?:lay|lays|laid|laying)(?:_| )?(?:out|down)?": "pack",
    r"layouts?": "packing, packed batch",
    r"set aside": "allocate",
    r"put into words": "render, apply the template",
    r"behind each other": "concatenated",
    r"half turns?": "rotate_half",
    r"told apart": "distinguish",
    r"tall(?:y|ies)": "epoch means",
}
BRITISH = (
    r"\w*(?:centre|colour|behaviour|favour|honour|neighbour|labour|rumour|armour|flavour|humour|vapour|harbour|"
    r"grey|judgement|artefact|catalogue|analogue|programme|licence|defence|offence|sceptic|aluminium|"
    r"fulfil|enrol|instalment|manoeuvre|moult|plough|storey|tyre|whilst|amongst|learnt|spelt|burnt|dreamt|"
    r"modell(?:ed|ing|er)|labell(?:ed|ing)|cancell(?:ed|ing)|travell(?:ed|ing|er)|signall(?:ed|ing)|"
    r"totall(?:ed|ing)|channell(?:ed|ing)|levell(?:ed|ing)|counsell(?:ed|ing|or)|fuell(?:ed|ing))\w*"
)
BRITISH_ISE = (
    r"\w*(?:normal|standard|penal|token|initial|optim|general|special|util|organ|recogn|summar|serial|regular|"
    r"parallel|minim|maxim|synchron|memor|quant|vector|random|emphas|categor|character|visual|final|central|"
    r"apolog|critic|familiar|local|modern|priorit|real|symbol|author|capital|crystal|customis|digit|econom|item|"
    r"material|mobil|monopol|neutral|patron|popular|public|stabil|steril|sympath|terror|victim|custom)"
    r"is(?:e|es|ed|ing|er|ers|ation|ations)\b"
)
ALLOWED = {
    "colour": ("lit_rlhf/synthetic/", "tests/synthetic/"),  # a word of the synthetic world's language
    "colours": ("lit_rlhf/synthetic/", "tests/synthetic/"),
    "summarise": ("lit_rlhf/synthetic/", "tests/synthetic/", "lit_rlhf/evaluation/reports/"),  # a task's name in its data
    "grey": ("lit_rlhf/synthetic/", "tests/synthetic/"),
}


def tracked_files() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    kinds = {".py", ".yaml", ".md", ".jinja", ".toml"}
    files = [ROOT / name for name in names if Path(name).suffix in kinds]
    return [path for path in files if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve()]


def words(pattern: str, text: str) -> list[tuple[int, str]]:
    """Line and word of each match; a word ends at an underscore too, so that identifiers are searched as well."""
    found = re.finditer(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", text, re.IGNORECASE)
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in found]


@pytest.mark.parametrize("pattern", [BRITISH, BRITISH_ISE])
def test_american_spelling(pattern: str) -> None:
    wrong = []
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        for line, word in words(pattern, path.read_text()):
            if not name.startswith(ALLOWED.get(word.lower(), ("/",))):
                wrong.append(f"{name}:{line}: {word}")
    assert wrong == []


@pytest.mark.parametrize("pattern", PRIVATE_WORDS)
def test_no_private_word(pattern: str) -> None:
    wrong = []
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("tests/"):
            wrong += [f"{name}:{line}: {word}" for line, word in words(pattern, path.read_text())]
    assert wrong == [], f"write: {PRIVATE_WORDS[pattern]}"


def test_no_variable_is_called_figures() -> None:
    """Metrics and values are called that; a figure is a picture."""
    wrong = []
    for path in tracked_files():
        if path.suffix == ".py":
            tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
            wrong += [f"{path}:{token.start[0]}" for token in tokens if token.type == tokenize.NAME and "figures" in token.string]
    assert wrong == []


def test_no_class_has_two_homes() -> None:
    homes: dict[str, list[str]] = {}
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("lit_rlhf/", "callbacks/")) and path.suffix == ".py":
            for match in re.finditer(r"^class (\w+)", path.read_text(), re.M):
                homes.setdefault(match[1], []).append(name)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
