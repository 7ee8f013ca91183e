import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.synthetic.build import SyntheticDataPaths, is_evaluation_prompt
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.knowledge import build_vocabulary
from lit_rlhf.synthetic.tasks import TaskPrompt
from lit_rlhf.synthetic.tokenizer import build_tokenizer

ReadRows = Callable[[Path], list[dict[str, Any]]]

TOKENIZER = build_tokenizer()


def test_all_text_comes_back_and_nothing_is_unknown(world: SyntheticDataPaths, read_rows: ReadRows) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.base_init)
    texts = [row["text"] for path in (world.pretraining, world.pretraining_validation) for row in read_rows(path)]
    for path in (world.demonstrations, world.demonstrations_validation):
        texts += [text for row in read_rows(path) for text in (row["prompt"], row["completion"])]
    texts += json.loads(world.few_shot.read_text())["prefixes"]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert len(tokens) == len(text.split()) + text.count("\n")
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == text


@given(st.lists(st.sampled_from([*build_vocabulary(), "\n"]), max_size=24))
def test_any_words_and_newlines_round_trip(words: list[str]) -> None:
    text = " ".join(words).replace(" \n", "\n").replace("\n ", "\n")
    tokens = TOKENIZER(text)["input_ids"]
    assert tokens == TOKENIZER.convert_tokens_to_ids(["<nl>" if word == "\n" else word for word in words])
    assert TOKENIZER.decode(tokens) == text


def test_special_tokens_are_distinct_and_skipped() -> None:
    special = [TOKENIZER.convert_tokens_to_ids(token) for token in ("<pad>", "<eos>", "<nl>", "<unk>")]
    assert len(set(special)) == 4
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (
        special[0],
        special[1],
        special[3],
    )
    assert TOKENIZER("zebra")["input_ids"] == [special[3]]
    fox = TOKENIZER("the fox\nis")["input_ids"]
    assert TOKENIZER.decode([*fox, special[1], special[0]], skip_special_tokens=True) == "the fox\nis"


def test_the_base_model_is_small_and_knows_its_tokens(world: SyntheticDataPaths) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base_init)
    tokenizer = AutoTokenizer.from_pretrained(world.base_init)
    assert 350_000 < sum(parameter.numel() for parameter in model.parameters()) < 450_000
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.config.max_position_embeddings >= 90 + 32 + 24
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_no_evaluation_prompt_is_in_other_data(world: SyntheticDataPaths, read_rows: ReadRows) -> None:
    evaluation = [row["prompt"] for row in read_rows(world.evaluation_prompts)]
    assert len(set(evaluation)) == len(evaluation) == 128
    assert all(is_evaluation_prompt(prompt) for prompt in evaluation)
    for path in (world.demonstrations, world.demonstrations_validation, world.reward_prompts, world.ppo_prompts):
        assert not set(evaluation) & {row["prompt"] for row in read_rows(path)}


def test_prompt_rows_hold_what_the_judge_needs(world: SyntheticDataPaths, read_rows: ReadRows) -> None:
    for path in (world.reward_prompts, world.ppo_prompts, world.evaluation_prompts):
        for row in read_rows(path):
            assert set(row) == {"prompt", "task", "target"}
            assert judge(TaskPrompt(row["prompt"], row["task"], row["target"]), "maybe .").success == 0.0


def test_a_seed_decides_every_byte(
    world: SyntheticDataPaths, tmp_path: Path, write_small_world: Callable[[Path, int], SyntheticDataPaths]
) -> None:
    state = torch.random.get_rng_state()
    again, other = write_small_world(tmp_path / "again", 0), write_small_world(tmp_path / "other", 1)
    assert torch.equal(state, torch.random.get_rng_state())
    for name in ("pretraining", "demonstrations", "reward_prompts", "ppo_prompts", "evaluation_prompts", "few_shot"):
        assert (
            getattr(world, name).read_bytes() == getattr(again, name).read_bytes() != getattr(other, name).read_bytes()
        )
    weights = [(paths.base_init / "model.safetensors").read_bytes() for paths in (world, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_the_quickstarts_data_is_the_same_in_every_version(world: SyntheticDataPaths) -> None:
    digest = hashlib.sha256()
    for path in sorted([*world.pretraining.parent.glob("*.jsonl"), world.few_shot]):
        digest.update(path.read_bytes())
    # other data has other results: measure those of README.md and docs/quickstart.md again with it
    assert digest.hexdigest() == "47830ae0f62a90824614f814743a7cee7d970d92e29f9299c1698d6cc665dc27"
