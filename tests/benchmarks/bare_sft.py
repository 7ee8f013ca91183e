"""Seconds of a bare PyTorch training step on full rows without padding: what is left when nothing else is done."""

import torch
import work
from transformers import LlamaForCausalLM


def main() -> None:
    """Run."""
    args = work.arguments().parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder / f"policy-{args.size}").train().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    draw = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(args.updates + 1):
        ids = torch.randint(2, work.VOCABULARY, (work.SFT_ROWS, work.SFT_LENGTH), generator=draw).to(args.device)
        start = work.clock(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16-mixed"):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(work.clock(args.device) - start)
    work.report(seconds[1:], units=[work.SFT_ROWS * work.SFT_LENGTH] * args.updates)


if __name__ == "__main__":
    main()
