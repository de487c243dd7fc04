"""Measurements of this rank's device: memory, peak FLOP/s, compile time."""

import re
import resource
import sys
import time
from pathlib import Path

import torch

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "4090": 165.2,
    "3090": 71.0,
}
"""Dense 16-bit tensor-core peaks with fp32 accumulation, from NVIDIA's data sheets."""


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss includes the parent that forked this process
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory_bytes(device: torch.device) -> int:
    """Current memory of this rank: allocated on a GPU, resident on a CPU (0 if not Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # its import is slow, and often not needed
    spent: dict[str, int] = getattr(dynamo, "cumulative_time_spent_ns", {})
    return spent.get("entire_frame_compile", 0) / 1e9


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of this rank's device; `None` for an unknown GPU.

    A CPU's is measured: the fastest 2048 x 1024 x 1024 product in 0.2 s on this rank's threads.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((v for key, v in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)
        return None if known is None else known * 1e12
    left, right = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = 0.0
    end = time.perf_counter() + 0.2  # long enough for one undisturbed product
    while time.perf_counter() < end:
        started = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - started))
    return best
