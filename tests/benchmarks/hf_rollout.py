"""Time a rollout by transformers' `generate`, sampling from the full distribution, without log-probabilities."""

import torch
import workload
from transformers import LlamaForCausalLM


def main() -> None:
    """Time the steps and report."""
    args = workload.build_ppo_parser().parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").eval()
    model.to(args.device, torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32)
    workload.bias_end_token(model, args.bias)
    torch.manual_seed(0)
    seconds, tokens = [], []
    for ids in workload.prompt_batches(args):
        ids = ids.to(args.device)
        start = workload.clock(args.device)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.response, do_sample=True, top_k=0
        )
        seconds.append(workload.clock(args.device) - start)
        response = output[:, ids.shape[1] :]
        is_end = (response == workload.EOS).long()
        tokens.append(int((is_end.cumsum(1) - is_end == 0).sum()))
    workload.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
