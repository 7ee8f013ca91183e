"""Matrix products alone, as fast as this machine makes them: the bound of everything else."""

import torch
import work


def main() -> None:
    """Report the operations of a product and the seconds of each."""
    args = work.arguments().parse_args()
    torch.set_num_threads(args.threads)
    size = 1024 if args.device == "cpu" else 8192
    kind = torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32
    left, right = (torch.randn(size, size, device=args.device).to(kind) for _ in range(2))
    seconds = []
    for _ in range(args.updates + 2):
        start = work.clock(args.device)
        for _ in range(5):
            left @ right
        seconds.append(work.clock(args.device) - start)
    work.report(seconds[2:], flops=5 * 2 * size**3)


if __name__ == "__main__":
    main()
