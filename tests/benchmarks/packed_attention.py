"""Packed rows by the variable-length kernel and under a mask: the same logits and gradients, and seconds per pass.

A pass is forward and backward of two layers and the head, on a micro-batch of the PPO benchmark. The error is against
float32 under a mask. Where the kernel is not available, the mask alone is timed.
"""

import statistics
from contextlib import nullcontext
from typing import Any

import torch
import workload
from transformers import LlamaForCausalLM

from lit_rlhf.functional import token_logprobs
from lit_rlhf.packing import PackedBatch, packed_batch, response_logits

LAYERS = 2
choose_kernel = packed_batch.can_use_varlen_kernel


def draw_batch(args: Any, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a micro-batch with this many responses to each prompt; return ids and mask, (B, T) int64."""
    generator = torch.Generator().manual_seed(0)
    count, width = args.micro_batch_size, args.prompt + args.response
    lengths = torch.empty(count).exponential_(3 / args.response, generator=generator).long().clamp(1, args.response)
    ids = torch.randint(2, workload.VOCABULARY, (count, width), generator=generator)
    ids[:, : args.prompt] = ids[::samples, : args.prompt].repeat_interleave(samples, 0)[:count]
    mask = (torch.arange(width) < args.prompt + lengths[:, None]).long()
    return (ids * mask).to(args.device), mask.to(args.device)


def compute(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, and the gradient of the log-probs' sum in one vector, both in float32."""
    model.zero_grad()
    logits = response_logits(model, batch)
    token_logprobs(logits[None], batch.response_tokens[None]).sum().backward()
    return logits.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Compare, time and report."""
    args = workload.build_ppo_parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(workload.build_config(f"{args.size.partition('x')[0]}x{LAYERS}")).to(args.device)
    print("| responses per prompt | attention | tokens | seconds | error of logits | of gradients |")
    print("|---|---|---|---|---|---|")
    seconds: dict[str, float] = {}
    for samples in (1, 4):
        rows = *draw_batch(args, samples), args.response
        packed_batch.can_use_varlen_kernel = lambda *_: False
        expected = compute(model, packed_batch.pack_batch(*rows, model))
        errors = {}
        for name, choose in (("mask", packed_batch.can_use_varlen_kernel), ("kernel", choose_kernel)):
            packed_batch.can_use_varlen_kernel = choose
            mixed = args.precision == "bf16-mixed"
            with torch.autocast(args.device, torch.bfloat16) if mixed else nullcontext():
                batch = packed_batch.pack_batch(*rows, model)
                if name == "kernel" and batch.sequences is None:
                    print(f"| {samples} | kernel | | not available on {args.device} in {args.precision} | | |")
                    continue
                times = []
                for _ in range(args.updates + 1):
                    start = workload.clock(args.device)
                    actual = compute(model, batch)
                    times.append(workload.clock(args.device) - start)
            errors[name] = [float((a - e).norm() / e.norm()) for a, e in zip(actual, expected)]
            seconds[f"{name}, {samples}"] = statistics.median(times[1:])
            print(
                f"| {samples} | {name} | {batch.input_ids.numel()} | {seconds[f'{name}, {samples}']:.4f} "
                f"| {errors[name][0]:.1e} | {errors[name][1]:.1e} |"
            )
        for ours, bound in zip(errors.get("kernel", []), errors["mask"]):
            assert ours < 2 * bound + 1e-5, f"the kernel is off by {ours:.1e}, where rounding is {bound:.1e}"
    workload.report([*seconds.values()], seconds_by_name=seconds)


if __name__ == "__main__":
    main()
