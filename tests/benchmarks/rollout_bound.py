"""Seconds of what a rollout cannot do without: the pass over the prompts, packed products and attention of each token.

The rows of a rollout of this library are recorded, and then nothing but these is done for as many rows and columns.
"""

from unittest import mock

import torch
import work
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaForCausalLM

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.llama_decoder import LlamaDecodeBatch, LlamaDecoder, _round_up
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms


def recorded(model: LlamaForCausalLM, ids: Tensor, noise: Tensor) -> tuple[list[tuple[int, int]], int]:
    """The rows and columns of each step of a rollout, and its tokens."""
    shapes: list[tuple[int, int]] = []
    step = LlamaDecodeBatch.step

    def spy(self: LlamaDecodeBatch, tokens: Tensor) -> Tensor:
        logits = step(self, tokens)
        shapes.append((_round_up(len(tokens)), self.cache_position))
        return logits

    with mock.patch.object(LlamaDecodeBatch, "step", spy):
        rollout = CachedGenerator().generate(
            model, PromptBatch.from_tokens(ids, torch.ones_like(ids)), SamplingParams(noise.shape[1]), noise
        )
    return shapes, int(rollout.response_mask.sum())


@torch.inference_mode()
def bound(model: LlamaForCausalLM, ids: Tensor, length: int, shapes: list[tuple[int, int]]) -> float:
    """Seconds of it."""
    heads, size = model.config.num_attention_heads, model.config.head_dim
    decoder = LlamaDecoder(model)
    batch = decoder.start(ids, torch.ones_like(ids), 1, length)
    assert isinstance(batch, LlamaDecodeBatch)
    start = work.clock()
    batch.prefill()
    for count, columns in shapes:
        x, query = torch.ones(count, 1, model.config.hidden_size), torch.ones(count, heads, 1, size)
        bias, wide = torch.zeros(count, 1, 1, columns), torch.ones(count, 1, model.config.intermediate_size)
        for layer, states in zip(decoder.decode.layers, batch.kv_cache):
            keys, values = states[:count, :, :columns].chunk(2, 1)
            layer.qkv_proj(x)
            scaled_dot_product_attention(query, keys, values, bias)
            layer.o_proj(x)
            layer.mlp.gate_up_proj(x)  # type: ignore[attr-defined]
            layer.mlp.down_proj(wide)  # type: ignore[attr-defined]
        linear(x, model.lm_head.weight)
    return work.clock() - start


def main() -> None:
    """Run."""
    args = work.ppo_arguments().parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").eval()
    work.bias_end(model, args.bias)
    seconds, tokens = [], []
    for update, ids in enumerate(work.prompt_batches(args)):
        shapes, drawn = recorded(model, ids, sampling_uniforms(args.episodes, args.response, 0, update))
        seconds.append(bound(model, ids, args.response, shapes))
        tokens.append(drawn)
    work.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
