"""Tiny models of six architectures and a word tokenizer, made once; where the real data lies."""

from tests.helpers import environment  # isort: skip  # noqa: F401  (before any library reads it)

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
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

from lit_rlhf.commands.support.log_filters import restored_log_filters
from tests.helpers.ranks import leave_process_group
from tests.helpers.word_tokenizer import VOCABULARY, word_tokenizer

settings.register_profile("lit_rlhf", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("lit_rlhf")

TESTS = Path(__file__).parent
# files that take over 10 s on two cores, as measured; `make test-fast` leaves them out
SLOW_FILES = (
    "callbacks/test_center_scores.py",
    "callbacks/test_ema.py",
    "callbacks/test_pretraining_mix.py",
    "cli/test_callback_settings.py",
    "cli/test_fit.py",
    "cli/test_killed.py",
    "cli/test_labelers.py",
    "cli/test_library_errors.py",
    "cli/test_lineage.py",
    "cli/test_monitors.py",
    "cli/test_overlays.py",
    "cli/test_peft_folders.py",
    "cli/test_plan.py",
    "cli/test_progress_bar.py",
    "cli/test_real.py",
    "cli/test_recipe_rules.py",
    "cli/test_recipes.py",
    "cli/test_resume.py",
    "cli/test_run_folder.py",
    "cli/test_stopping.py",
    "cli/test_sweep.py",
    "cli/test_trainer_flags.py",
    "cli/test_wandb_login.py",
    "cli/test_wandb_runs.py",
    "contract/test_vllm.py",
    "evaluation/judges/test_missing_verdicts.py",
    "evaluation/reports/test_quickstart_report.py",
    "evaluation/suites/test_benchmarks.py",
    "evaluation/suites/test_truthfulness.py",
    "evaluation/test_early_checks.py",
    "evaluation/test_evaluate.py",
    "generation/test_cached.py",
    "generation/test_vllm.py",
    "labeling/test_browser.py",
    "labeling/test_feedback_loop.py",
    "labeling/test_killed_server.py",
    "labeling/test_playground.py",
    "models/test_export.py",
    "models/test_pretrained.py",
    "modules/test_adapter_checkpoints.py",
    "modules/test_exact_resume.py",
    "modules/test_lightning_habits.py",
    "modules/test_packed_sft.py",
    "modules/test_ppo.py",
    "modules/test_ppo_with_vllm.py",
    "modules/test_resume.py",
    "modules/test_shared_backbone_ppo.py",
    "modules/test_tensor_parallel.py",
    "modules/test_two_ranks.py",
    "packing/test_architectures.py",
    "packing/test_packed_batch.py",
    "real/test_preferences.py",
    "real/test_real_runs.py",
    "real/test_smollm2.py",
    "synthetic/test_labelers.py",
    "synthetic/test_quickstart_pipeline.py",
    "synthetic/test_quickstart_sweep.py",
    "test_bad_input.py",
    "test_docs.py",
    "test_extending.py",
    "test_fuzz.py",
    "test_http.py",
    "test_launching.py",
    "test_python_page.py",
    "test_readme.py",
    "test_recipes.py",
    "test_site.py",
    "test_wheel.py",
)

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    for item in items:
        if item.path.relative_to(TESTS).as_posix() in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture(autouse=True)
def no_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shipped recipes log to W&B, which takes a second per run; a test of it sets another mode (`wandb_offline`)."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_SILENT", raising=False)  # set by a command that goes offline
    yield
    monkeypatch.undo()  # of a test that replaces the functions below
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # Lightning's logger would go on with an open run, in that run's folder
        sys.modules["wandb"].teardown()  # it reads its variables once


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B writes its files."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(autouse=True)
def log_filters_of_this_test_alone() -> Iterator[None]:
    """A command's own call of `install_log_filters` ends with the test: records of another one would be missing."""
    with restored_log_filters():
        yield


@pytest.fixture(autouse=True)
def imports_of_this_test_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's file that a test imports is forgotten, with its folder: another test has one of the same name."""
    path, names, folder = list(sys.path), set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - names:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def no_process_group_left_behind() -> Iterator[None]:
    """A run that fails in this process takes its process group with it."""
    yield
    leave_process_group()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word tokenizer with distinct padding, end and unknown tokens."""
    return word_tokenizer()


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
