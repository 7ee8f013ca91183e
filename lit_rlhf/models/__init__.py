"""Transformers in, transformers out: language models, the scalar head, adapters, export."""

from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig

__all__ = ["LoRA", "ModelLoadingConfig"]
