"""A trained reward model as a reward."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.flops import count_forward_flops_per_token
from lit_rlhf.models.given import TokenizerSource, check_applies_to, model_name, resolve_tokenizer
from lit_rlhf.models.loading import check_same_token_ids, load_config, load_stored_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource, load_scalar_model, resolve_scalar_model
from lit_rlhf.packing.packed_batch import PackedBatch, length_bucketed_chunks, pack_batch
from lit_rlhf.progress import report_progress
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rollout.experience import Episodes

REMEDY = "use one trained from the same family, or SequenceClassifierReward, which scores text (docs/rewards.md)"


class RewardModelScorer(Reward):
    """A trained reward model; the score is read at the last token of the response.

    Args:
        model: folder of a reward model whose tokenizer gives every token of the policy's the same id; or a reward model
            that was loaded or trained already, which is used as it is, in eval mode.
        require_centered: refuse a model without centering constants (App. C.2: demonstrations score 0 on average).
        loading: how to load it.
        batch_size: episodes per forward pass.
        tokenizer: its tokenizer, or the folder of one; by default that of the folder that `model` was loaded from.
    """

    uses_token_ids_only = True

    def __init__(
        self,
        model: ScalarSource | Path,
        require_centered: bool = True,
        loading: ModelLoadingConfig | None = None,
        batch_size: int = 64,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        self.source: ScalarSource = resolve_scalar_model(model, "reward")
        self.path, self.require_centered, self.batch_size = model_name(self.source), require_centered, batch_size
        self.loading = loading or ModelLoadingConfig()
        check_applies_to(self.source, self.loading)
        self.tokenizer = resolve_tokenizer(tokenizer, self.source)
        self.model: ScalarModel

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Load the model, frozen."""
        own = load_stored_tokenizer(self.tokenizer, self.loading)  # its padding is never used
        check_same_token_ids(tokenizer, own, f"reward: {self.path!r}", REMEDY)
        source = self.source.model if isinstance(self.source, ScalarModel) else self.source
        if self.require_centered and not hasattr(load_config(source, self.loading), "score_shift"):
            raise UserError(
                f"reward: {self.path!r} has no centering constants (score_shift in its config.json): train it with the "
                "callback CenterScores, or set model.reward.init_args.require_centered to false"
            )
        self.model = load_scalar_model(self.source, tokenizer, self.loading).to(device).eval()
        if isinstance(self.source, str):
            self.model.requires_grad_(False)

    @property
    def offloadable(self) -> bool:
        """See `Reward.offloadable`: weights in 4 bits stay where they were quantized."""
        return self.loading.quantization is None

    def to(self, device: torch.device) -> None:
        """See `Reward.to`."""
        self.model.to(device)

    @torch.no_grad()
    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        return score_by_length(self.score_packed, self.model.model, episodes, self.batch_size)

    def score_packed(self, batch: PackedBatch) -> Tensor:
        """Return the score at the last token of each episode, (b,) float32."""
        return self.model(
            batch.input_ids, batch.attention_mask, batch.position_ids, batch.last_token_index, batch.sequences
        )

    def critic_init_path(self) -> ScalarSource:
        """See `Reward.critic_init_path`: the reward model itself."""
        return self.source

    def model_paths(self) -> list[str | nn.Module]:
        """See `Reward.model_paths`."""
        return [self.source]

    def flops_per_token(self) -> int:
        """See `Reward.flops_per_token`."""
        return count_forward_flops_per_token(self.model)


def score_by_length(
    score: Callable[[PackedBatch], Tensor], model: PreTrainedModel, episodes: Episodes, batch_size: int
) -> Tensor:
    """Score all episodes in packed chunks of similar length, (B,) float32.

    Args:
        score: scores a chunk, (b,).
        model: computes it, which decides how a chunk can be packed.
        episodes: B episodes.
        batch_size: episodes per chunk.
    """
    ids, mask = episodes.input_ids, episodes.attention_mask
    scores, done = torch.empty(len(ids), device=ids.device), 0
    for chunk, columns, width in length_bucketed_chunks(ids, mask, ids.shape[1] - episodes.prompt_width, batch_size):
        scores[chunk] = score(pack_batch(ids[chunk][:, columns], mask[chunk][:, columns], width, model)).float()
        done += len(chunk)
        report_progress("score", done, len(ids))
    return scores
