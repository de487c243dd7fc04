"""One rank's share of the machine's ceiling: for each line on stdin, large bf16 products.

python benchmarks/arms/ceiling.py THREADS
"""

import sys
import time

import torch

WIDTH, PRODUCTS = 4096, 4


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    left = torch.randn(WIDTH, WIDTH).bfloat16()
    right = torch.randn(WIDTH, WIDTH).bfloat16()
    result = torch.empty_like(left)
    torch.mm(left, right, out=result)
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=result)
        seconds = time.perf_counter() - began
        print(2 * WIDTH**3 * PRODUCTS / seconds / 1e9, flush=True)


if __name__ == "__main__":
    main()
