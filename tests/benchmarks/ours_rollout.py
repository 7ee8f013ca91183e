"""Seconds of a rollout by this library's generator: one response a prompt, with the log-probs of its tokens."""

import torch
import work
from transformers import LlamaForCausalLM

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms


def main() -> None:
    """Run."""
    parser = work.ppo_arguments()
    parser.add_argument("--compile", action="store_true", help="compile the step of a token, in the warm-up")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").eval()
    model.to(args.device, torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32)
    work.bias_end(model, args.bias)
    generator = CachedGenerator(compile=args.compile)
    seconds, tokens = [], []
    for update, ids in enumerate(work.prompt_batches(args)):
        ids = ids.to(args.device)
        noise = sampling_uniforms(args.episodes, args.response, 0, update).to(args.device)
        start = work.clock(args.device)
        rollout = generator.generate(
            model, PromptBatch.from_tokens(ids, torch.ones_like(ids)), SamplingParams(args.response), noise
        )
        seconds.append(work.clock(args.device) - start)
        tokens.append(int(rollout.response_mask.sum()))
    work.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
