"""Time a rollout by this library's generator: one response per prompt, with the log-probabilities of its tokens."""

import torch
import workload
from transformers import LlamaForCausalLM

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.generation import CachedGenerator, cached, kv_cache
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms


def main() -> None:
    """Time the steps and report."""
    parser = workload.build_ppo_parser()
    parser.add_argument("--eager", action="store_true", help="capture no steps in CUDA graphs")
    args = parser.parse_args()
    if args.eager:
        cached.can_capture_steps = kv_cache.can_capture_steps = lambda _: False
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").eval()
    model.to(args.device, torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32)
    workload.bias_end_token(model, args.bias)
    generator = CachedGenerator(compile=args.compile)
    seconds, tokens = [], []
    for update, ids in enumerate(workload.prompt_batches(args)):
        ids = ids.to(args.device)
        uniforms = sampling_uniforms(args.episodes, args.response, 0, update).to(args.device)
        start = workload.clock(args.device)
        rollout = generator.generate(
            model, PromptBatch.from_tokens(ids, torch.ones_like(ids)), SamplingParams(args.response), uniforms
        )
        seconds.append(workload.clock(args.device) - start)
        tokens.append(int(rollout.response_mask.sum()))
    workload.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
