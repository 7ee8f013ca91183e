"""Transformers in, transformers out: language models, the scalar head, adapters, export."""

from lit_rlhf.models.options import LoRA, ModelOptions

__all__ = ["LoRA", "ModelOptions"]
