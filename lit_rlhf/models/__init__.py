"""Loading, adapting and exporting transformers models; the scalar head of reward models and critics."""

from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig

__all__ = ["LoRA", "ModelLoadingConfig"]
