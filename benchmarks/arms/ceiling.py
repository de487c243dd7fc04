"""One rank's share of the machine's ceiling: for each line on stdin, large products.

python benchmarks/arms/ceiling.py THREADS

In bf16, and in fp32 where a CPU is faster in it; the faster of the two is the ceiling.
"""

import sys
import time

import torch

WIDTH, PRODUCTS = 4096, 2


def measure(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor) -> float:
    """GFLOP/s of some products."""
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=result)
    return 2 * WIDTH**3 * PRODUCTS / (time.perf_counter() - began) / 1e9


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    matrices = [torch.randn(WIDTH, WIDTH) for _ in range(3)]
    halves = [matrix.bfloat16() for matrix in matrices]
    for left, right, result in (matrices, halves):
        torch.mm(left, right, out=result)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(max(measure(*matrices), measure(*halves)), flush=True)


if __name__ == "__main__":
    main()
