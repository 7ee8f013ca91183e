"""Time a rollout by vLLM in one process, with the log-probabilities of its tokens, as far as that can be compared.

A bias on the end token's logit gives responses of the same lengths. Loading is not timed.
"""

import torch
import workload
from vllm import LLM, SamplingParams


def main() -> None:
    """Time the steps and report."""
    args = workload.build_ppo_parser().parse_args()
    engine = LLM(
        str(args.folder / f"policy-{args.size}"),
        dtype="bfloat16" if args.precision == "bf16-mixed" else "float32",
        max_model_len=args.prompt + args.response,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = SamplingParams(
        max_tokens=args.response, logprobs=0, logit_bias={workload.EOS: args.bias}, detokenize=False
    )
    seconds, tokens = [], []
    for ids in workload.prompt_batches(args):
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        start = workload.clock("cuda" if torch.cuda.is_available() else "cpu")
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds.append(workload.clock("cuda" if torch.cuda.is_available() else "cpu") - start)
        tokens.append(sum(len(output.outputs[0].token_ids) for output in outputs))
    workload.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
