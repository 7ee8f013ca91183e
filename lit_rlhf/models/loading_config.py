"""How a model folder is loaded, and which adapter is put on it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelLoadingConfig:
    """How weights and tokenizer are loaded; the same for policy, reference, critic and reward model.

    Args:
        pad_token: padding token for a tokenizer without one of its own (GPT-2, Pythia, Llama), or whose padding is its
            end token; added to the vocabulary where it is not in it. Padding must differ from the end token, which is
            an action and is trained.
        dtype: type of the stored weights. Mixed precision belongs to the Trainer (`precision: bf16-mixed`).
        attn_implementation: attention implementation of transformers (`sdpa`, `eager`, `flash_attention_2`).
        quantization: "nf4" keeps the linear layers in 4-bit NormalFloat, their constants quantised again (QLoRA:
            Dettmers et al., 2023), computing in `dtype`. Such weights are not trained: a module needs an adapter.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: compile the transformer blocks for forward passes with gradients (`torch.compile`). Passes without
            them have a new shape every time and run as they are; rollouts have a setting of their own, `compile` of
            `CachedGenerator`.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model. Off: nothing but weights is loaded.
    """

    pad_token: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "sdpa"
    quantization: Literal["nf4"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class LoRA:
    """Low-rank adapters (peft) on a frozen base.

    Args:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout on the adapter's input. PPO needs 0: the first ratio must be 1.
        target_modules: names of the linear layers, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str = field(default="all-linear")
