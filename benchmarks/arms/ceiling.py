"""The node's ceiling: GFLOP/s of large products in all ranks at the same time.

    torchrun ... benchmarks/arms/ceiling.py

In bf16 or in fp32, whichever is faster. A much slower type is only tried on small matrices: large
ones would take minutes on a CPU without bf16 instructions.
"""

import os
import time

import torch
import torch.distributed as dist

ON_GPU = torch.cuda.is_available()
WIDTH, PRODUCTS = (8192, 20) if ON_GPU else (4096, 2)
TRIAL_WIDTH = 512


def now() -> float:
    """The clock, once all queued work is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(dtype: torch.dtype, *, width: int) -> float:
    """GFLOP/s of all ranks together."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if ON_GPU else None
    left, right, result = (torch.randn(width, width, device=device).to(dtype) for _ in range(3))
    torch.mm(left, right, out=result)  # warms up
    dist.barrier()
    began = now()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=result)
    rate = torch.tensor(2 * width**3 * PRODUCTS / (now() - began) / 1e9)
    dist.all_reduce(rate)
    return float(rate)


dist.init_process_group("gloo")
torch.set_num_threads(1)
if ON_GPU:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
trials = {dtype: measure(dtype, width=TRIAL_WIDTH) for dtype in (torch.float32, torch.bfloat16)}
fast = [dtype for dtype, rate in trials.items() if rate > max(trials.values()) / 4]
best = max(measure(dtype, width=WIDTH) for dtype in fast)
if dist.get_rank() == 0:
    print(best)
dist.destroy_process_group()
