"""Tiny models of six architectures and a word tokenizer, made once; where the real data lies."""

from tests.helpers import environment  # isort: skip  # noqa: F401  (before any library reads it)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from tests.helpers.ranks import leave_process_group

settings.register_profile("lit_rlhf", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("lit_rlhf")

WORDS = [f"w{i}" for i in range(28)]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", ":", *WORDS])}
SIZE = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 128}
CONFIGS = {
    "llama": LlamaConfig(**SIZE, **IDS, intermediate_size=64, num_key_value_heads=2),
    "gpt2": GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    ),
    "qwen2": Qwen2Config(**SIZE, **IDS, intermediate_size=64, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**SIZE, **IDS, intermediate_size=64),
    "opt": OPTConfig(**SIZE, **IDS, ffn_dim=64, word_embed_proj_dim=32),
    "gemma": GemmaConfig(**SIZE, **IDS, intermediate_size=64, num_key_value_heads=2, head_dim=8),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def caches_of_this_session_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written to the user's home, and nothing that an earlier session kept is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(autouse=True)
def seed_of_this_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's `seed_everything` leaves the seed in the environment, where Lightning's ranks would take it up."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)  # a command goes offline where there is no network


@pytest.fixture(autouse=True)
def no_process_group_left_behind() -> Iterator[None]:
    """A run that fails in this process takes its process group with it."""
    yield
    leave_process_group()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word tokenizer with distinct padding, end and unknown tokens."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """A folder of random weights for each architecture."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # sharper than the tiny initialization, so that differences show
                parameter.mul_(3.0) if parameter.dim() > 1 else None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def llama(model_folders: dict[str, str]) -> str:
    """The folder of the tiny Llama."""
    return model_folders["llama"]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not beside this repository (../shared/data)")
    return folder
