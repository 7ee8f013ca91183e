"""Time a bare PyTorch training step on full rows without padding: the lower bound of supervised fine-tuning."""

import torch
import workload
from transformers import LlamaForCausalLM


def main() -> None:
    """Time the steps and report."""
    args = workload.build_parser().parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").train().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(args.updates + 1):
        ids = torch.randint(2, workload.VOCABULARY, (args.rows, workload.SFT_LENGTH), generator=generator).to(
            args.device
        )
        start = workload.clock(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16-mixed"):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(workload.clock(args.device) - start)
    workload.report(seconds[1:], units=[args.rows * workload.SFT_LENGTH] * args.updates)


if __name__ == "__main__":
    main()
