"""What a LightningModule or callback says about the models that it uses, for the lineage of the run."""

from lit_rlhf.models.loading_config import ModelLoadingConfig


class Traceable:
    """Optional base of a LightningModule or callback: the models it starts from, and the operations per token.

    Attributes:
        lineage_role: what its exported model is.
    """

    lineage_role: str = "model"

    def input_models(self) -> dict[str, str]:
        """Return the models that it uses: role to folder, checkpoint file or hub name."""
        return {}

    def input_loading(self) -> ModelLoadingConfig:
        """Return how they are loaded."""
        return ModelLoadingConfig()

    def flops_per_token(self) -> int:
        """Return the operations per token of a training batch (in PPO: of an episode); 0: not known.

        Called after the models are loaded.
        """
        return 0

    def extra_tokens_per_step(self) -> int:
        """Return the tokens, over all ranks, on which it trains in each optimizer step besides those of its batches."""
        return 0
