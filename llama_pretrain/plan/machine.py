"""The hardware of this machine, detected without importing torch."""

import ctypes
import ctypes.util
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts about a machine that a plan depends on."""

    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    """Host memory."""
    num_gpus: int
    """GPUs that the installed torch can use: 0 for a CPU build of torch."""
    gpu_name: str | None
    gpu_memory_bytes: int | None
    gpu_capability: tuple[int, int] | None
    """CUDA compute capability of the first GPU."""
    cpu_bf16: bool
    """Whether the CPU multiplies bf16 natively."""
    cpu_intel: bool
    """Whether it is Intel's, for which MKL is optimized."""
    cpu_fast_bf16: bool
    """Whether products in bf16 are faster on it than in fp32."""
    has_compiler: bool
    """Whether DeepSpeed's operators can be compiled: a C++ compiler and ninja."""
    has_libaio: bool


def detect_machine() -> Machine:
    """Detect this machine's hardware."""
    gpus = _query_gpus()
    processor = _describe_processor()
    intel = "GenuineIntel" in processor
    fast = r"\bamx_bf16\b" if intel else r"\b(avx512_bf16|amx_bf16|bf16)\b"
    return Machine(
        cores=_count_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        num_gpus=len(gpus),
        gpu_name=gpus[0][0] if gpus else None,
        gpu_memory_bytes=gpus[0][1] if gpus else None,
        gpu_capability=gpus[0][2] if gpus else None,
        cpu_bf16=re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", processor) is not None,
        cpu_intel=intel,
        # Intel's AVX512-BF16 without AMX has half the speed of its fp32 (docs/performance.md).
        cpu_fast_bf16=re.search(fast, processor) is not None,
        has_compiler=_has_compiler(),
        has_libaio=ctypes.util.find_library("aio") is not None,
    )


def count_gpus() -> int:
    """GPUs that the installed torch can use, in a millisecond if there are none."""
    return len(_query_gpus())


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # fewer in a container or under Slurm
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version_file = Path(spec.origin).with_name("version.py")
    match = re.search(r"^cuda\b.*= *'[\d.]+'", version_file.read_text(), re.M)
    return match is not None


def _query_gpus() -> list[tuple[str, int, tuple[int, int]]]:
    """Name, memory in bytes and compute capability of each GPU, from the CUDA driver."""
    if not _torch_has_cuda():
        return []
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    gpus = []
    for index in range(count.value):
        device, name, total = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, 100, device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # ..._CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ..._CAPABILITY_MINOR
        gpus.append((name.value.decode(), total.value, (major.value, minor.value)))
    return gpus


def _describe_processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _has_compiler() -> bool:
    """torch compiles with $CXX or c++; ninja may be next to the interpreter, not on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    needed = (os.environ.get("CXX", "c++"), "ninja")
    return all(shutil.which(program, path=path) is not None for program in needed)
