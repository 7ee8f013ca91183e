"""Settings of loading a model, and of its LoRA adapter."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lit_rlhf.errors import UserError


@dataclass
class ModelLoadingConfig:
    """How weights and tokenizer are loaded; one setting for policy, reference, critic and reward model.

    Args:
        pad_token: Padding token for a tokenizer without one (GPT-2, Pythia, Llama), or whose padding token is its end
            token; added to the vocabulary if missing. Padding must differ from the end token, which is an action and is
            trained.
        dtype: Type of the stored weights, or its name. Mixed precision belongs to the Trainer (`precision:
            bf16-mixed`).
        attn_implementation: Attention implementation of transformers (`sdpa`, `eager`, `flash_attention_2`). By
            default `sdpa`, and `eager` for an architecture without it, such as GPT-J.
        quantization: "nf4" stores the linear layers in 4-bit NormalFloat with double quantization (QLoRA: Dettmers et
            al., 2023), computing in `dtype`. Such weights are frozen: the module needs an adapter.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Compile the transformer blocks for forward passes with gradients (`torch.compile`). Passes without
            gradients vary too much in shape and run eagerly; rollouts have `CachedGenerator.compile`.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model. Off: nothing but weights is loaded.
    """

    pad_token: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | torch.dtype = "float32"
    attn_implementation: str | None = None
    quantization: Literal["nf4"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Keep the type by its name, which configurations and checkpoints record.

        Raises:
            UserError: It is a type of torch in which weights are not stored here.
        """
        names: dict[Any, Literal["float32", "bfloat16", "float16"]]
        names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
        if isinstance(self.dtype, torch.dtype):
            if self.dtype not in names:
                raise UserError(f"loading.dtype: {self.dtype} is none of {', '.join(names.values())}")
            self.dtype = names[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the stored weights."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else getattr(torch, self.dtype)


@dataclass
class LoRA:
    """Low-rank adapters (peft) on a frozen base.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the adapter's input. PPO needs 0: the first ratio must be 1.
        target_modules: Names of the linear layers, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str = field(default="all-linear")
