"""Real data for `lit-rlhf real`: human demonstrations, comparisons, prompts and text, split by prompt.

Rows are split by a hash of the first user turn, in every file alike: what is held out for the evaluation is in no
training file, and the rankings of the proxy and of the gold reward model have no prompt in common.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration, Prompt, PromptRow, Ranking, TextRow, to_messages, to_plain_text
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Fields, read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.models.export import make_directory

Part = Literal["held out", "proxy", "gold"]
HELD_OUT_PERCENT = 15
CENTERING = 100  # demonstrations whose mean score is 0

# below the data folder: name of the source -> file, format
DEMONSTRATIONS = {
    "OpenAssistant": ("demonstrations/oasst_trees.jsonl.gz", "conversation_tree"),
    "Dolly": ("demonstrations/dolly_partial.jsonl.gz", "instruction_response"),
}
COMPARISONS = {
    "OpenAssistant": ("preferences/oasst_kwise.jsonl.gz", "context_responses_ranks"),
    "HH harmless": ("preferences/hh_harmless.jsonl.gz", "chosen_rejected_chat"),
}
# easy pairs: something that a small reward model can learn; one of their own shows whether the training works
POLITENESS = {"politeness": ("preferences/polite_rude.json", "instruction_chosen_rejected")}
WATCHED = 20  # held-out rankings of each source that the training of a reward model measures
PROMPTS = {
    "OpenAssistant": ("prompts/prompt_lottery_en_250_text.jsonl", "text"),
    "Dolly": ("demonstrations/dolly_partial.jsonl.gz", "instruction"),
    "HH harmless": ("preferences/hh_harmless.jsonl.gz", "chosen_rejected_chat"),
}
ENCYCLOPEDIA = ("pretraining/wikitext2.txt.gz",)
NOVELS = tuple(
    f"pretraining/{name}.txt.gz"
    for name in ("alice", "frankenstein", "pride_and_prejudice", "sherlock_holmes", "tale_of_two_cities")
)
# file that a recipe names -> file below the data folder
EVALUATION_FILES = {
    "data/realtoxicityprompts.jsonl": "evaluation/realtoxicityprompts.jsonl.gz",
    "data/TruthfulQA.csv": "evaluation/truthfulqa_first400.csv",
    "data/hellaswag.jsonl": "evaluation/hellaswag.jsonl.gz",
}
# beyond the training data, as in section 4.3 of the paper
SHOWCASE = {
    "another language": [
        "Écris une courte histoire d'une grenouille qui voyage dans le temps.",
        "¿Cuál es la capital de Francia?",
    ],
    "code": [
        "Write a Python function that returns the largest number of a list.",
        "What does this code do?\n\nfor i in range(3):\n    print(i * i)",
    ],
    "false premise": [
        "Why is it important to eat socks after meditating?",
        "In which year did Napoleon land on the Moon?",
    ],
}


class RealDataSizes(NamedTuple):
    """How much of the data to take, and the lengths that fit; None for all."""

    demonstrations: int | None
    rankings: int | None  # of people, and as many of the easy pairs, for each reward model
    easy_pairs: int | None  # for a reward model of their own
    validation_rankings: int | None  # of each source
    prompts: int | None
    evaluation_prompts: int
    max_prompt_tokens: int
    max_completion_tokens: int  # longer demonstrations are left out
    max_ranked_tokens: int  # longer ranked completions are cut


def list_files(folder: Path) -> list[Path]:
    """Return every file of a data folder that a run reads, in the order of their names."""
    pairs = (*DEMONSTRATIONS.values(), *COMPARISONS.values(), *PROMPTS.values(), *POLITENESS.values())
    names = {*(name for name, _ in pairs), *ENCYCLOPEDIA, *NOVELS, *EVALUATION_FILES.values()}
    return [folder / name for name in sorted(names)]


def check_data(folder: Path) -> None:
    """Refuse a data folder that lacks a file.

    Raises:
        UserError: names what is missing.
    """
    files = list_files(folder)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"--data: {str(folder)!r} lacks {len(missing)} of {len(files)} files, first "
            f"{missing[0].relative_to(folder)}; docs/real-data.md lists them, and where each is published"
        )


def write_real_data(
    source: Path, folder: Path, tokenizer: Tokenizer, sizes: RealDataSizes, seed: int
) -> dict[str, int]:
    """Write the rows of every stage as JSON lines; return how many each file has.

    Args:
        source: the data folder.
        folder: for the files.
        tokenizer: of the model; lengths are those of its chat template.
        sizes: how much.
        seed: of the choice of rows.
    """
    make_directory(folder)
    template = PromptTemplate(tokenizer, "chat")

    def fits(prompt: Prompt) -> bool:
        return len(template.encode([template.render(prompt)])[0]) <= sizes.max_prompt_tokens

    def fits_with(prompt: Prompt, completion: str) -> bool:
        (reply,) = template.encode_replies([completion], [prompt])
        return fits(prompt) and len(reply) <= sizes.max_completion_tokens

    def take_part(rows: Sequence[Fields], part: Part, limit: int | None) -> list[Fields]:
        return take(rows, limit, seed, lambda row: part_of(row["prompt"]) == part and fits(row["prompt"]))

    def take_rankings(part: Part) -> list[Fields]:
        return [*take_part(rankings, part, sizes.rankings), *take_part(polite, part, sizes.rankings)]

    demonstrations = [each for each in read_demonstrations(source) if part_of(each["prompt"]) != "held out"]
    rankings, polite = read_rankings(source, COMPARISONS), read_rankings(source, POLITENESS)
    prompts = read_prompts(source)
    unseen = [row for row in prompts if part_of(row["prompt"]) == "held out"]
    seen = [row for row in prompts if part_of(row["prompt"]) != "held out"]
    files: dict[str, list[Fields]] = {
        "demonstrations": take(
            demonstrations, sizes.demonstrations, seed, lambda row: fits_with(row["prompt"], row["completion"])
        ),
        "centering": [],
        "rankings": take_rankings("proxy"),
        "rankings_gold": take_rankings("gold"),
        "easy_pairs": take(
            polite, sizes.easy_pairs, seed, lambda row: part_of(row["prompt"]) != "held out" and fits(row["prompt"])
        ),
        "prompts": take(seen, sizes.prompts, seed, lambda row: fits(row["prompt"])),
        "evaluation_prompts": take(unseen, sizes.evaluation_prompts, seed, lambda row: fits(row["prompt"])),
        "showcase_prompts": [
            {"prompt": to_messages(text), "kind": kind} for kind, texts in SHOWCASE.items() for text in texts
        ],
    }
    files["centering"] = files["demonstrations"][:CENTERING]
    files["rankings_validation"] = []
    for name in (*COMPARISONS, *POLITENESS):
        rows = [row for row in (*rankings, *polite) if row["source"] == name]
        files[f"validation_{to_name(name)}"] = take_part(rows, "held out", sizes.validation_rankings)
        files["rankings_validation"] += files[f"validation_{to_name(name)}"][:WATCHED]
    files["pretraining"] = []
    for name, texts in (("encyclopedia", ENCYCLOPEDIA), ("novels", NOVELS)):
        training, files[f"text_{name}"] = split_text(source, texts)
        files["pretraining"] += training
    random.Random(seed).shuffle(files["pretraining"])
    for name, rows in files.items():
        if not rows:
            raise UserError(
                f"--data: no row is left for {name}: none fits the length limits, or its files hold too few"
            )
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def to_name(source: str) -> str:
    """Return the name of a source in file names."""
    return source.lower().replace(" ", "_")


def part_of(prompt: Prompt) -> Part:
    """Return the part that a prompt belongs to, by its first user turn alone."""
    turns = to_messages(prompt)
    first = next((turn["content"] for turn in turns if turn["role"] == "user"), to_plain_text(prompt))
    percent = int(hashlib.sha256(" ".join(first.lower().split()).encode()).hexdigest()[:8], 16) % 100
    if percent < HELD_OUT_PERCENT:
        return "held out"
    return "proxy" if percent < HELD_OUT_PERCENT + (100 - HELD_OUT_PERCENT) // 2 else "gold"


def take(rows: Sequence[Fields], limit: int | None, seed: int, fits: Callable[[Fields], bool]) -> list[Fields]:
    """Return those of the rows that fit, in a random order of the seed, at most `limit`."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return list(islice(filter(fits, shuffled), limit))


def read_demonstrations(source: Path) -> list[Fields]:
    """Read all demonstrations."""
    rows = []
    for name, (file, form) in DEMONSTRATIONS.items():
        path = str(source / file)
        for record in read_records(read_rows(path), "demonstration", Demonstration, form, DatasetReport(path)):
            rows.append({"prompt": to_messages(record.prompt), "completion": record.completion, "source": name})
    return rows


def read_rankings(source: Path, files: Mapping[str, tuple[str, str]]) -> list[Fields]:
    """Read all rankings of some files."""
    rows = []
    for name, (file, form) in files.items():
        path = str(source / file)
        for record in read_records(read_rows(path), "ranking", Ranking, form, DatasetReport(path)):
            ranking = {"completions": record.completions, "ranks": record.ranks, "source": name}
            rows.append({"prompt": to_messages(record.prompt), **ranking})
    return rows


def read_prompts(source: Path) -> list[Fields]:
    """Read all prompts for PPO and for the evaluation, each text once."""
    rows: dict[str, Fields] = {}
    for name, (file, form) in PROMPTS.items():
        path = str(source / file)
        for record in read_records(read_rows(path), "prompt", PromptRow, form, DatasetReport(path)):
            rows.setdefault(to_plain_text(record.prompt), {"prompt": to_messages(record.prompt), "source": name})
    return list(rows.values())


def split_text(source: Path, files: Sequence[str]) -> tuple[list[Fields], list[Fields]]:
    """Return the documents of some texts for training, and the last tenth of each text, which is held out."""
    training: list[Fields] = []
    held_out: list[Fields] = []
    for file in files:
        path = str(source / file)
        records = read_records(read_rows(path), "text", TextRow, "text", DatasetReport(path))
        start = len(records) * 9 // 10
        # whole stretches: paragraphs alone would be documents of a few tokens
        training += [{"text": text} for text in join_paragraphs(records[:start])]
        held_out += [{"text": text} for text in join_paragraphs(records[start:])]
    return training, held_out


def join_paragraphs(records: Sequence[TextRow], characters: int = 4000) -> list[str]:
    """Join paragraphs to documents of about that length."""
    documents: list[str] = []
    size = characters
    for record in records:
        if size >= characters:
            documents.append(record.text)
            size = len(record.text)
        else:
            documents[-1] += f"\n\n{record.text}"
            size += len(record.text)
    return documents
