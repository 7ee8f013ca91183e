"""Time the lower bound of a rollout: prefill, and prepacked matrix products and attention of each decode step.

The batch shapes of a rollout of this library are recorded, then only these operations are run on the same shapes.
"""

from unittest import mock

import torch
import workload
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaForCausalLM

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.llama_decoder import LlamaDecodeBatch, LlamaDecoder, _round_up
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms


def record_shapes(model: LlamaForCausalLM, ids: Tensor, uniforms: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Return rows and columns of each decode step of a rollout, and its number of tokens."""
    shapes: list[tuple[int, int]] = []
    step = LlamaDecodeBatch.step

    def spy(self: LlamaDecodeBatch, tokens: Tensor) -> Tensor:
        logits = step(self, tokens)
        shapes.append((_round_up(len(tokens)), self.cache_position))
        return logits

    with mock.patch.object(LlamaDecodeBatch, "step", spy):
        rollout = CachedGenerator().generate(
            model, PromptBatch.from_tokens(ids, torch.ones_like(ids)), SamplingParams(uniforms.shape[1]), uniforms
        )
    return shapes, int(rollout.response_mask.sum())


@torch.inference_mode()
def time_bound(model: LlamaForCausalLM, ids: Tensor, length: int, shapes: list[tuple[int, int]]) -> float:
    """Return the seconds of prefill, products and attention alone."""
    heads, size = model.config.num_attention_heads, model.config.head_dim
    decoder = LlamaDecoder(model)
    batch = decoder.start(ids, torch.ones_like(ids), 1, length)
    assert isinstance(batch, LlamaDecodeBatch)
    start = workload.clock()
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
    return workload.clock() - start


def main() -> None:
    """Time the steps and report."""
    args = workload.build_ppo_parser().parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").eval()
    workload.bias_end_token(model, args.bias)
    seconds, tokens = [], []
    for update, ids in enumerate(workload.prompt_batches(args)):
        shapes, num_tokens = record_shapes(model, ids, sampling_uniforms(args.episodes, args.response, 0, update))
        seconds.append(time_bound(model, ids, args.response, shapes))
        tokens.append(num_tokens)
    workload.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
