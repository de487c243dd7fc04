"""Memory of a rank beside its tensors: libraries, threads, and what the allocator keeps."""

from llama_pretrain.config.kernels import Allocator, CompiledPart
from llama_pretrain.config.launch import Device
from llama_pretrain.config.resolved import ResolvedRun

MIB = 1 << 20

CUDA_FRAMEWORK_BYTES = 1 << 30
"""The CUDA context and the workspaces of cuBLAS and NCCL, an assumption that has not been measured.
"""

FORKED = (324 * MIB, 76 * MIB)
"""A forked rank on a CPU: resident memory after imports, and what a run adds besides tensors:
threads, generated kernels, gloo, the tokenizer. Pages of libraries' files count as the rank's own
once it touches them, which is after the fork."""
FRESH = (397 * MIB, 50 * MIB)
"""The same of a fresh interpreter, which has touched its libraries when it has imported them (torch
2.13, transformers 5, DeepSpeed 0.19, Python 3.11)."""


def framework_bytes(run: ResolvedRun) -> int:
    """Memory of the libraries before there is a model."""
    if run.launch.device is Device.cuda:
        return CUDA_FRAMEWORK_BYTES
    return (FORKED if _is_forked(run) else FRESH)[0]


def runtime_bytes(run: ResolvedRun) -> int:
    """What a running step adds to the libraries besides tensors."""
    if run.launch.device is Device.cuda:
        return 0
    return (FORKED if _is_forked(run) else FRESH)[1]


def _is_forked(run: ResolvedRun) -> bool:
    """Whether ranks on a CPU are forks of a server with such settings (launch/server.py)."""
    return (
        run.launch.fork
        and run.launch.malloc_mmap_threshold is None
        and run.kernels.allocator is Allocator.keep
        and run.kernels.compile is CompiledPart.none
    )
