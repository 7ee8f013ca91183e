"""Time bare matrix products: the machine's peak, which bounds everything else."""

import torch
import workload


def main() -> None:
    """Time matrix products and report their floating-point operations."""
    args = workload.build_parser().parse_args()
    torch.set_num_threads(args.threads)
    size = 1024 if args.device == "cpu" else 8192
    dtype = torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32
    left, right = (torch.randn(size, size, device=args.device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(args.updates + 2):
        start = workload.clock(args.device)
        for _ in range(5):
            left @ right
        seconds.append(workload.clock(args.device) - start)
    workload.report(seconds[2:], flops=5 * 2 * size**3)


if __name__ == "__main__":
    main()
