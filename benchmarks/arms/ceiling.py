"""One rank's share of the machine's ceiling: for each line on stdin, large products.

python benchmarks/arms/ceiling.py THREADS

In bf16 or in fp32: the faster is the ceiling. A type that is far slower is not tried at length:
a CPU without instructions for bf16 would take minutes.
"""

import sys
import time

import torch

ON_GPU = torch.cuda.is_available()
WIDTH, PRODUCTS = (8192, 20) if ON_GPU else (4096, 2)
TRIAL_WIDTH = 512


def three(dtype: torch.dtype, *, width: int) -> list[torch.Tensor]:
    """Two factors, and room for their product."""
    device = "cuda" if ON_GPU else "cpu"
    return [torch.randn(width, width, device=device).to(dtype) for _ in range(3)]


def now() -> float:
    """The clock, when all that was asked for is computed."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> float:
    """GFLOP/s of some products."""
    began = now()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=result)
    return 2 * len(left) ** 3 * PRODUCTS / (now() - began) / 1e9


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    trials = {}
    for dtype in (torch.float32, torch.bfloat16):
        small = three(dtype, width=TRIAL_WIDTH)
        torch.mm(small[0], small[1], out=small[2])
        trials[dtype] = measure(*small)
    fast = [dtype for dtype, rate in trials.items() if rate > max(trials.values()) / 4]
    large = [three(dtype, width=WIDTH) for dtype in fast]
    for left, right, result in large:
        torch.mm(left, right, out=result)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(max(measure(*matrices) for matrices in large), flush=True)


if __name__ == "__main__":
    main()
