"""Seconds of a rollout by transformers' `generate`, sampling from the full distribution, without log-probs."""

import torch
import work
from transformers import LlamaForCausalLM


def main() -> None:
    """Run."""
    args = work.ppo_arguments().parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").eval()
    model.to(args.device, torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32)
    work.bias_end(model, args.bias)
    torch.manual_seed(0)
    seconds, tokens = [], []
    for ids in work.prompt_batches(args):
        ids = ids.to(args.device)
        start = work.clock(args.device)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.response, do_sample=True, top_k=0
        )
        seconds.append(work.clock(args.device) - start)
        response = output[:, ids.shape[1] :]
        ended = (response == work.EOS).long()
        tokens.append(int((ended.cumsum(1) - ended == 0).sum()))
    work.report(seconds[1:], units=tokens[1:])


if __name__ == "__main__":
    main()
