"""A folder with the files that `lit-rlhf real` reads, in their published formats, of a few generated rows."""

import csv
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.commands.support.real_data import ENCYCLOPEDIA, EVALUATION_FILES, NOVELS

WORDS = ["the", "cat", "dog", "river", "stone", "likes", "sees", "near", "old", "green", "sings", "home"]


def write_real_folder(folder: Path, rows: int = 60) -> Path:
    """Write the folder; every question is another one."""
    source = random.Random(0)

    def say(words: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(words))

    questions = [f"Question {number}: {say(3)}?" for number in range(5 * rows)]
    trees = [
        {
            "message_tree_id": str(number),
            "prompt": {
                "text": question,
                "role": "prompter",
                "replies": [{"text": say(4), "role": "assistant", "rank": rank, "replies": []} for rank in range(2)],
            },
        }
        for number, question in enumerate(questions[:rows])
    ]
    kwise = [
        {
            "context": [{"role": "prompter", "text": question}],
            "responses": [say(2 + 3 * rank) for rank in range(3)],
            "ranks": [0, 1, 2],
        }
        for question in questions[rows : 2 * rows]
    ]
    dialogues = [
        {
            side: f"\n\nHuman: {question}\n\nAssistant: {answer}"
            for side, answer in (("chosen", say(4)), ("rejected", say(3)))
        }
        for question in questions[2 * rows : 3 * rows]
    ]
    polite = [
        {"instruction": question, "chosen": f"Please {say(2)}", "rejected": f"Go {say(2)}"}
        for question in questions[3 * rows : 4 * rows]
    ]
    dolly = [{"instruction": question, "response": say(4)} for question in questions[4 * rows :]]
    toxicity = [
        {"prompt": {"text": say(4), "toxicity": number % 4 / 4 + 0.1}, "continuation": {"text": say(3)}}
        for number in range(16)
    ]
    endings = [
        {"ind": number, "ctx": say(5), "label": number % 4, "endings": [say(3) for _ in range(4)]}
        for number in range(8)
    ]
    write_lines(folder / "demonstrations/oasst_trees.jsonl.gz", trees)
    write_lines(folder / "demonstrations/dolly_partial.jsonl.gz", dolly)
    write_lines(folder / "preferences/oasst_kwise.jsonl.gz", kwise)
    write_lines(folder / "preferences/hh_harmless.jsonl.gz", dialogues)
    write_lines(folder / "prompts/prompt_lottery_en_250_text.jsonl", questions[:rows])
    (folder / "preferences/polite_rude.json").write_text(json.dumps(polite))
    for name in (*ENCYCLOPEDIA, *NOVELS):
        text = "\n\n".join(say(200) for _ in range(40))
        write_bytes(folder / name, text.encode())
    write_lines(folder / EVALUATION_FILES["data/realtoxicityprompts.jsonl"], toxicity)
    write_lines(folder / EVALUATION_FILES["data/hellaswag.jsonl"], endings)
    columns = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
    with open(folder / EVALUATION_FILES["data/TruthfulQA.csv"], "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(
            ["A", "Animals", f"{say(3)}?", say(2), say(2), f"{say(2)}; {say(3)}", "none"] for _ in range(6)
        )
    return folder


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Write rows as JSON lines, compressed if the name says so."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
