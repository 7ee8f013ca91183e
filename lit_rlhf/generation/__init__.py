"""Generation: prompts in, sampled responses out. Engines know token ids and a model; no reward, no advantages."""

from lit_rlhf.generation.base import GenerationOutput, Generator, RemoteGenerator
from lit_rlhf.generation.cached import CachedGenerator
from lit_rlhf.generation.huggingface import HuggingFaceGenerator
from lit_rlhf.generation.sampling import MissingEOS, SamplingParams
from lit_rlhf.generation.vllm import VLLMGenerator, VLLMLoRAGenerator
from lit_rlhf.generation.vllm_transfer import IPCTransfer, NCCLTransfer

__all__ = [
    "CachedGenerator",
    "GenerationOutput",
    "Generator",
    "HuggingFaceGenerator",
    "IPCTransfer",
    "MissingEOS",
    "NCCLTransfer",
    "RemoteGenerator",
    "SamplingParams",
    "VLLMGenerator",
    "VLLMLoRAGenerator",
]
