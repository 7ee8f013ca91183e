"""`lit-rlhf plan`: its estimates against what training really allocates."""

import re
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig

from lit_rlhf.cli import main
from lit_rlhf.commands.plan import parse_gpu_memory
from lit_rlhf.commands.recipes import is_evaluation, is_overlay, shipped_recipes
from lit_rlhf.errors import UserError
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.memory_estimate import (
    PassShape,
    activation_memory,
    build_meta_model,
    kv_cache_bytes,
    parameter_memory,
)
from tests.helpers.hub_cache import in_hub_cache
from tests.helpers.pages import ROOT
from tests.helpers.peak_memory import measure_peak_memory, needs_proc
from tests.helpers.small_runs import write_rows

ROWS, WIDTH = 3, 24
PHASES = ("update, backward begins", "update, critic's pass", "update, backward done", "generation", "scoring")


def saved_by_autograd(model: Any, half: bool) -> int:
    """Bytes that a real pass saves besides weights and logits."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    sizes: dict[int, Any] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 28, (ROWS, WIDTH))
    mask = torch.ones(ROWS, WIDTH, dtype=torch.int64)
    mask[0, -4:] = 0
    targets = mask.bool() & (torch.arange(WIDTH) > 0)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        causal_lm_loss(model, ids, targets, mask)
    logits = ROWS * WIDTH * model.config.vocab_size * (2 if half or model.dtype == torch.bfloat16 else 4)
    return sum(storage.nbytes() for storage in sizes.values()) - logits


@pytest.mark.parametrize(
    ("shape", "settings", "half"),
    [
        ("llama", {}, False),
        ("llama", {}, True),
        ("gpt2", {}, False),
        ("gpt_neox", {"loading": ModelLoadingConfig(gradient_checkpointing=True)}, False),
        ("llama", {"adapter": LoRA(rank=4)}, False),
        ("llama", {"loading": ModelLoadingConfig(dtype="bfloat16")}, False),
        ("llama", {"adapter": LoRA(rank=4), "loading": ModelLoadingConfig(dtype="bfloat16")}, False),
    ],
)
def test_activations_are_those_that_autograd_saves(shape, settings, half, model_folders):
    loading, adapter = settings.get("loading", ModelLoadingConfig()), settings.get("adapter")
    plain = replace(loading, gradient_checkpointing=False)
    model = load_causal_lm(model_folders[shape], load_tokenizer(model_folders[shape], loading), plain)
    if adapter:
        add_lora(model, adapter)
    kept = saved_by_autograd(model, half)
    if loading.gradient_checkpointing:  # one of the two blocks is there again when it is computed again
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        inputs = saved_by_autograd(model, half)
        assert inputs < 0.4 * kept
        kept = inputs + (kept - inputs) // 2
    planned = activation_memory(model.config, loading, adapter, False, PassShape(ROWS, WIDTH, WIDTH, half))
    assert planned.activations == pytest.approx(kept, rel=0.15)
    assert planned.logits == 2 * ROWS * WIDTH * 32 * (2 if half or loading.dtype == "bfloat16" else 4)


WIDE = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Lion8bit],
    ids=lambda optimizer: optimizer.__name__,
)
def test_weights_gradients_and_optimizer_state_are_those_of_a_step(optimizer):
    model = AutoModelForCausalLM.from_config(WIDE)
    stepped = optimizer(model.parameters(), lr=1e-3)
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    stepped.step()
    state = sum(
        value.nbytes
        for each in stepped.state.values()
        for name, value in each.items()
        if torch.is_tensor(value) and name not in ("step", "qmap1", "qmap2")  # one for all weights
    )
    name = f"{optimizer.__module__.split('.')[0]}.optim.{optimizer.__name__}"
    planned = parameter_memory(
        build_meta_model(WIDE, ModelLoadingConfig(), None, False), ModelLoadingConfig(), name, []
    )
    assert planned.parameters == planned.trainable == sum(p.numel() for p in model.parameters())
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert planned.weights == pytest.approx(planned.gradients, rel=0.01)  # and the constants of the rotary embedding
    assert planned.optimizer == pytest.approx(state, rel=0.02)


SHAPE = {"vocab_size": 8192, "num_hidden_layers": 3, "num_attention_heads": 8, "pad_token_id": 0, "eos_token_id": 1}
BIG = LlamaConfig(**SHAPE, hidden_size=512, intermediate_size=1536)
SMALL = LlamaConfig(**SHAPE, hidden_size=16, intermediate_size=16)


def two_minibatches(config: LlamaConfig) -> None:
    """Of two micro-batches each."""
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(3, 8192, (4, 96))
    mask = torch.ones_like(ids)
    targets = mask.bool() & (torch.arange(96) > 0)
    for _ in range(2):
        for _ in range(2):
            total, count = causal_lm_loss(model, ids, targets, mask)
            (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()


@needs_proc
def test_the_peak_is_that_of_a_real_run(tmp_path, capsys):
    BIG.save_pretrained(tmp_path / "model")
    sizes = ["--data.micro_batch_size=4", "--data.max_prompt_length=48", "--data.max_completion_length=48"]
    recipe = ["-c", "small/sft", f"--model.model={tmp_path / 'model'}", *sizes]
    assert main(["plan", *recipe, "--trainer.accumulate_grad_batches=2"]) == 0
    planned = float(capsys.readouterr().out.split("peak: ")[1].split()[0]) * 1e9
    two_minibatches(SMALL)
    measured = measure_peak_memory(lambda: two_minibatches(BIG), tmp_path)
    assert planned == pytest.approx(measured, rel=0.15), (planned / 1e6, measured / 1e6)


def test_gradients_meet_activations_only_where_an_earlier_pass_left_them(tmp_path, capsys):
    """A GPU showed as much: docs/hardware.md."""
    BIG.save_pretrained(tmp_path / "model")

    def gradients(recipe: str, *more: str) -> dict[str, bool]:
        assert main(["plan", "-c", recipe, f"--model.model={tmp_path / 'model'}", *more]) == 0
        phases = capsys.readouterr().out.split("\n\n")
        return {each.split(", GB")[0]: "gradients  " in each for each in phases if "optimizer state" in each}

    separate = {"training step, backward begins": False, "training step, backward done": True}
    assert gradients("small/sft") == separate
    together = {"training step": True}
    assert gradients("small/sft", "--trainer.accumulate_grad_batches=2") == together
    assert gradients("quickstart/sft") == together, "the pretraining mix goes before"
    assert gradients("small/sft", "-c", "strategy/ddp", "--trainer.devices=2") == dict.fromkeys(separate, True), (
        "the buckets of DDP"
    )


def test_activations_of_policy_and_critic_are_never_added(tmp_path, capsys):
    """tests/modules/test_critic_pass.py shows that a run does not hold both."""
    BIG.save_pretrained(tmp_path / "model")

    def phases_of(*more: str) -> dict[str, dict[str, float]]:
        assert main(["plan", "-c", "small/ppo", f"--model.model={tmp_path / 'model'}", *more]) == 0
        pages = [each.splitlines() for each in capsys.readouterr().out.split("\n\n") if ", GB per device\n" in each]
        rows = {lines[0].split(", GB")[0]: [line.rsplit(maxsplit=1) for line in lines[1:]] for lines in pages}
        return {phase: {name.strip(): float(value) for name, value in each} for phase, each in rows.items()}

    alone = "--trainer.accumulate_grad_batches=1"
    phases, without = phases_of(alone), phases_of(alone, "--model.advantages=lit_rlhf.rollout.RLOOAdvantage")
    begins, critic, done = (phases[f"update, {name}"] for name in ("backward begins", "critic's pass", "backward done"))
    assert begins["activations"] == without["update, backward begins"]["activations"] > 0.1
    assert critic["activations"] == pytest.approx(begins["activations"], rel=0.02), "the same blocks"
    assert "gradients" not in begins and "logits and their gradient" not in critic
    weights = phases["update, backward begins"]["weights"]
    assert critic["gradients"] == pytest.approx(without["update, backward done"]["gradients"])
    assert done["gradients"] == weights
    several = phases_of("--trainer.accumulate_grad_batches=2")
    assert list(several)[:3] == ["update", "update, critic's pass", "generation"]
    assert several["update, critic's pass"]["gradients"] == weights


def test_the_command_names_phases_and_says_whether_it_fits_a_gpu(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data.jsonl", [])
    recipe = ["-c", "llama-8b-fsdp/ppo-ptx", f"--model.model={llama}", "--data.max_prompt_length=64"]
    assert main(["plan", *recipe, "--model.sampling.max_new_tokens=64", "--gpu", "h100-80gb"]) == 0
    page = capsys.readouterr().out
    assert "h100-80gb: fits" in page and "runs/llama-8b-fsdp/reward/model does not exist yet" in page
    for part in ("policy gathered", "KV cache", "reference", "optimizer state", "gathered weights"):
        assert part in page
    assert main(["plan", *recipe, "--model.sampling.max_new_tokens=64", "--gpu=0.5gb"]) == 0
    assert "0.5gb: does not fit" in capsys.readouterr().out
    assert main(["plan", "-c", "quickstart/sft", f"--model.model={llama}", "--gpu", "h100-80"]) == 2
    assert "did you mean 'h100-80gb'" in capsys.readouterr().err


PYTHIA_14M = GPTNeoXConfig(
    vocab_size=50304, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


# the shapes on the hub of the models that the recipes start from
HUB = {
    "EleutherAI/pythia-14m": PYTHIA_14M,
    "EleutherAI/pythia-410m": GPTNeoXConfig(
        vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "meta-llama/Llama-3.2-3B": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "cerebras/Cerebras-GPT-1.3B": GPT2Config(
        vocab_size=50257, n_embd=2048, n_inner=8192, n_layer=24, n_head=16, n_positions=2048
    ),
    "EleutherAI/gpt-j-6b": GPTJConfig(
        vocab_size=50400, n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, n_positions=2048
    ),
}


def test_every_ppo_recipe_fits_the_gpu_that_its_head_names_and_the_page_has_its_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "recipes.md").read_text()
    planned, missing = dict(re.findall(r"^\| `([\w./-]+)` \| ([\d.]+) \|$", page, re.MULTILINE)), []
    with ExitStack() as hub:
        for name, config in HUB.items():
            hub.enter_context(in_hub_cache(name, config))
        for name, path in shipped_recipes().items():
            memory = re.search(r"^# Hardware: .*GPUs? of (\d+) GB", path.read_text(), re.MULTILINE)
            if memory is None or not re.search("/(ppo|grpo|rloo)", name) or is_overlay(name) or is_evaluation(name):
                continue
            assert main(["plan", "-c", name, "--gpu", f"{memory[1]}gb"]) == 0
            out = capsys.readouterr().out
            assert f"{memory[1]}gb: fits" in out, f"{name}\n{out}"
            peak = float(re.search(r"peak: ([\d.]+) GB", out)[1])
            if planned.pop(name, "") != f"{peak:.1f}":
                missing.append(f"| `{name}` | {peak:.1f} |")
    assert not missing and not planned, "\n".join(["docs/recipes.md, Memory:", *missing, *planned])


def test_generation_has_the_rows_that_the_generator_decodes_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def read_cache(*more: str) -> float:
        sizes = ("--model.sampling.max_new_tokens=1024", "--model.ppo.rollout_batch_size=4096")
        assert main(["plan", "-c", "small/ppo", *sizes, *more]) == 0
        (size,) = re.findall(r"KV cache +([\d.]+)", capsys.readouterr().out) or ["0"]
        return float(size)

    with in_hub_cache("EleutherAI/pythia-14m", PYTHIA_14M):
        half = ("--model.generator=CachedGenerator", "--model.generator.batch_size=128")
        assert read_cache() == pytest.approx(2 * read_cache(*half), abs=0.02) != 0
        assert read_cache("-c", "generator/vllm") == 0


@pytest.mark.parametrize(
    ("recipe", "stage", "hub", "config"),
    [
        (["small/ppo", "-c", "adapter/lora"], "small/sft", "EleutherAI/pythia-14m", PYTHIA_14M),
        (["llama-8b-fsdp/ppo-ptx"], "llama-8b-fsdp/sft", "meta-llama/Llama-3.1-8B", LLAMA_8B),
    ],
)
def test_before_any_stage_has_run_the_shape_is_that_of_the_hub_model(
    recipe, stage, hub, config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with in_hub_cache(hub, config):
        assert main(["plan", "-c", *recipe]) == 0
        followed = capsys.readouterr().out
        reward = f"--model.reward.init_args.model={hub}"
        assert main(["plan", "-c", *recipe, f"--model.model={hub}", reward]) == 0
        named = capsys.readouterr().out
    reward_stage = stage.replace("sft", "reward")
    notes = [line for line in followed.splitlines() if line.startswith("assumed: ")]
    assert notes == [
        f"assumed: runs/{stage}/model does not exist yet: of the shape of {hub}, by {stage}",
        f"assumed: runs/{reward_stage}/model does not exist yet: of the shape of {hub}, by {reward_stage}, {stage}",
    ]
    assert [line for line in followed.splitlines() if line not in notes] == named.splitlines()
    assert main(["plan", "-c", *recipe]) == 2
    error = capsys.readouterr().err
    assert f"{stage} would make it from {hub!r}" in error and "--model.model= takes" in error


def test_the_shape_may_be_that_of_a_config_or_of_a_run_that_has_begun(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").write_text(f"model: {{init_args: {{model: {llama}}}}}")

    def plan(model: str) -> list[str]:
        assert main(["plan", "-c", "small/sft", f"--model.model={model}"]) == 0
        return capsys.readouterr().out.splitlines()

    named = plan(llama)
    assert plan(f"{llama}/config.json") == named
    begun = plan("runs/mine/model")
    assert [line for line in begun if "does not exist yet" not in line] == named != begun
    assert main(["plan", "-c", "small/sft", "--model.model=runs/other/model"]) == 2
    assert "there is no folder 'runs/other/model'" in capsys.readouterr().err
    (tmp_path / "runs/mine/config.yaml").write_text("")  # cut off
    assert main(["plan", "-c", "small/sft", "--model.model=runs/mine/model"]) == 2
    assert "there is no folder 'runs/mine/model'" in capsys.readouterr().err


def test_frozen_models_in_host_memory_count_in_scoring_alone(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ["-c", "quickstart/ppo", f"--model.model={llama}"]

    def phases(*more: str) -> dict[str, bool]:
        assert main(["plan", *recipe, *more]) == 0
        parts = capsys.readouterr().out.split("GB per device")
        return {name: "reference" in part and "reward model" in part for name, part in zip(PHASES, parts[1:])}

    assert phases() == dict.fromkeys(PHASES, True)
    offloaded = dict.fromkeys(PHASES, False) | {"scoring": True}
    assert phases("-c", "compute/offload-frozen") == offloaded
    shared = phases("-c", "compute/offload-frozen", "-c", "adapter/qlora")
    assert shared == dict.fromkeys(PHASES, False), "no reference of its own"


def test_sizes_by_name_and_by_number():
    assert parse_gpu_memory("A100-40GB") == 40e9 and parse_gpu_memory("24gb") == 24e9
    with pytest.raises(UserError, match="no GPU 'k80'"):
        parse_gpu_memory("k80")


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (
            ("4090", "RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "rtx-4090-24gb", "24GB", "24 gb", "24", "24.0"),
            24e9,
        ),
        (("5090", "32"), 32e9),
        (("h100", "H100 80GB", "80"), 80e9),
        (("1000GB",), 1000e9),
        (("24GiB",), 24 * 2**30),
    ],
)
def test_a_model_number_is_a_name_and_not_a_size(names: tuple[str, ...], size: float) -> None:
    assert [parse_gpu_memory(name) for name in names] == [size] * len(names)


@pytest.mark.parametrize("name", ["4080", "3090", "1000", "0", "0GB", "-5", "nan", "inf", "", "24TB", "a100"])
def test_a_number_that_is_neither_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--gpu: "):
        parse_gpu_memory(name)


def test_the_cache_of_a_grouped_query_model():
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    assert kv_cache_bytes(config, rows=1, width=1, bytes_per_element=2) == 131_072  # 128 KiB a token, as of Llama 3 8B
