"""The data of `lit-rlhf real`: no prompt in two parts, lengths, missing files."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lit_rlhf.commands.support.real_data import RealDataSizes, check_data, part_of, write_real_data
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.errors import UserError
from tests.helpers.real_folder import write_real_folder
from tests.helpers.tiny_models import KINDS

ALL = RealDataSizes(
    None, None, None, None, None, 1000, max_prompt_tokens=200, max_completion_tokens=24, max_ranked_tokens=24
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return KINDS["smollm2"][0]


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: [json.loads(line) for line in path.open()] for path in folder.glob("*.jsonl")}


def first_turns(rows: list[dict[str, Any]]) -> set[str]:
    return {row["prompt"][0]["content"] for row in rows}


def test_no_prompt_is_in_two_parts_and_none_that_is_held_out_is_trained_on(source, tokenizer, tmp_path) -> None:
    counts = write_real_data(source, tmp_path, tokenizer, ALL, 0)
    files = read(tmp_path)
    assert {name: len(rows) for name, rows in files.items()} == counts
    trained = ("demonstrations", "rankings", "rankings_gold", "easy_pairs", "prompts")
    held_out = ("rankings_validation", "validation_politeness", "evaluation_prompts")
    training, unseen = ({text for name in names for text in first_turns(files[name])} for names in (trained, held_out))
    assert training and unseen and not training & unseen
    assert not first_turns(files["rankings"]) & first_turns(files["rankings_gold"])
    assert {row["source"] for row in files["rankings"]} == {"OpenAssistant", "HH harmless", "politeness"}
    assert {row["source"] for row in files["easy_pairs"]} == {"politeness"}
    assert max(len(row["completions"]) for row in files["rankings"]) == 3
    assert len(first_turns(files["prompts"])) == len(files["prompts"])
    texts = {name: {row["text"] for row in files[name]} for name in ("pretraining", "text_novels", "text_encyclopedia")}
    assert not texts["pretraining"] & (texts["text_novels"] | texts["text_encyclopedia"])


def test_a_later_turn_does_not_change_the_part_of_a_conversation() -> None:
    first = {"role": "user", "content": "Why is the sky blue?"}
    later = [first, {"role": "assistant", "content": "Light."}, {"role": "user", "content": "And red?"}]
    assert part_of([first]) == part_of(later) == part_of("why is  the sky Blue?")
    parts = [part_of(f"question {number}") for number in range(2000)]
    assert [round(parts.count(part) / 2000, 1) for part in ("proxy", "gold")] == [0.4, 0.4]
    assert 0.12 < parts.count("held out") / 2000 < 0.18


def test_limits_and_lengths_hold_and_the_seed_decides_the_rows(source, tokenizer, tmp_path) -> None:
    sizes = ALL._replace(demonstrations=9, prompts=7, evaluation_prompts=3)
    files = {}
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(files))
        write_real_data(source, folder, tokenizer, sizes, seed)
        files[folder.name] = read(folder)
    assert files["0"] == files["1"] != files["2"]
    assert {name: len(files["0"][name]) for name in ("demonstrations", "prompts", "evaluation_prompts")} == {
        "demonstrations": 9,
        "prompts": 7,
        "evaluation_prompts": 3,
    }
    template = PromptTemplate(tokenizer, "chat")
    for row in files["0"]["demonstrations"]:
        (reply,) = template.encode_replies([row["completion"]], [row["prompt"]])
        assert len(reply) <= 24 and len(template.encode([template.render(row["prompt"])])[0]) <= 200


def test_data_of_which_nothing_fits_is_one_error(source, tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match="no row is left for demonstrations"):
        write_real_data(source, tmp_path, tokenizer, ALL._replace(max_prompt_tokens=3), 0)


def test_a_missing_file_is_named(source: Path, tmp_path: Path) -> None:
    check_data(source)
    with pytest.raises(UserError, match=r"lacks \d+ of \d+ files, first demonstrations/dolly_partial.jsonl.gz"):
        check_data(tmp_path)
