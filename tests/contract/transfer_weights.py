"""A trainer that has vLLM beside it: it sends a policy to a server twice, and prints what came of it.

`python -m tests.contract.transfer_weights nccl URL FOLDER`, with the Python of the environment that `make peers-vllm`
makes and, after its own, our packages.
"""

import json
import sys
from typing import Any

import torch

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, IPCTransfer, NCCLTransfer, SamplingParams, VLLMGenerator
from lit_rlhf.generation.sampling import sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from tests.contract.cpu_transfer import install

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
GREEDY = SamplingParams(10, temperature=0.0)


def main(backend: str, url: str, folder: str) -> None:
    """Run it."""
    install()
    loading = ModelLoadingConfig()
    policy: Any = load_causal_lm(folder, load_tokenizer(folder, loading), loading).eval()
    add_lora(policy, LoRA(rank=4, alpha=8))
    vllm = VLLMGenerator(None, url, transfer=NCCLTransfer() if backend == "nccl" else IPCTransfer(), timeout=60.0)
    noise = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        arguments = PromptBatch.from_tokens(*pad_left(PROMPTS, 0)), GREEDY, sampling_uniforms(3, 10, 3)
        theirs, ours = (generator.generate(policy, *arguments) for generator in (vllm, CachedGenerator()))
        error = float((theirs.logprobs - ours.logprobs).abs().max())
        found.append({"ids": theirs.response_ids.tolist(), "ours": ours.response_ids.tolist(), "error": error})
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.3 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=noise))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
