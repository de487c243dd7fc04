"""Memory of a rank beside its tensors: libraries, threads, and what the allocator keeps."""

from dataclasses import dataclass

from llama_pretrain.config.kernels import Allocator, CompiledPart
from llama_pretrain.config.launch import Device
from llama_pretrain.config.precision import PrecisionName
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

SMALL_BLOCKS = 40 * MIB
"""Temporary tensors and holes between them that no term of the plan counts."""
ACTIVATION_SHARE = 0.12
"""Stage 0: holes between activations of different sizes."""
MOVING_SHARE = 1.4
"""Stages 1 and 2: pages that buckets and gradients leave behind, as a share of the reduction."""
ONE_RANK_MOVING_SHARE = 0.8
"""The same without other ranks, whose gradients take buffers too."""
GLIBC_KEEPS = 96 * MIB
"""The most that glibc keeps by default: 64 MiB at the end of the heap, and a freed block of at most
32 MiB, since larger ones are returned (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)."""
STAGE_3_FACTORS = (1.37, 1.61, 0.52, 2.3)
"""Stage 3: resident memory as multiples of states, activations, reduction, and the tensors that are
recomputed for a layer."""
STAGE_3_GATHERED = 0.37
"""What copies of parameters that are gathered from other ranks add to the first three where freed
memory is kept: with 58M parameters, memory grew by one embedding matrix after another until the
17th step."""
STAGE_3_BLOCKS = 32 * MIB
"""What gathering takes besides, on several ranks."""
STAGE_3_PASS = 0.12
"""What each micro batch of a step after the first adds to the first three, up to the fourth; it was
seen in fp32, whose temporary tensors are twice as large, and not in bf16."""


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


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Bytes of tensors of a CPU rank over a step, as its allocator sees them."""

    states: int
    """What is there between two steps."""
    activations: int
    """The most that a forward pass and the start of its backward pass add."""
    reduction: int
    """Gradients at the end of a backward pass, and the bucket that they are reduced in."""
    step: int
    """Gradients in the optimizer's step, and the copies that it makes."""
    micro_batches: int
    """Micro batches of a step."""
    summed: int
    """Of the states: buffers in which offloaded gradients are accumulated."""
    recomputed: int
    """Activations of one layer, if they are recomputed; else 0."""


def heap_bytes(run: ResolvedRun, demand: Demand) -> int:
    """Resident memory of a CPU's tensors at their peak, with what the allocator keeps.

    Gradients are allocated while activations are freed, and split the space that these leave, so
    that the flat copies of the reduction and of the step do not fit into it. The terms therefore
    add up, although the tensors never exist together. At stages 1 and 2 each reduction allocates a
    bucket of `reduce_bucket_size`, writes a part of it, and frees it; at another place than before,
    it leaves written pages behind. At stage 3 gradients have a place of their own, but parameters
    are allocated and freed again and again. The shares were fitted to measured runs (docs/plan.md).
    """
    stage, kept = run.zero.stage, run.kernels.allocator is Allocator.keep
    if stage == 3:
        sizes = (demand.states, demand.activations, demand.reduction, demand.recomputed)
        share = STAGE_3_GATHERED if kept and run.num_ranks > 1 else 0.0
        if run.precision.name is PrecisionName.fp32:
            share += STAGE_3_PASS * min(demand.micro_batches - 1, 3)
        resident = sum(size * factor for size, factor in zip(sizes, STAGE_3_FACTORS, strict=True))
        blocks = STAGE_3_BLOCKS if run.num_ranks > 1 else 0
        return int(resident + share * sum(sizes[:3])) + blocks
    tensors = demand.states + demand.activations + max(demand.reduction, demand.step) + SMALL_BLOCKS
    if stage == 0:
        return tensors + int(demand.activations * ACTIVATION_SHARE)
    tensors += demand.summed  # written between gradients that are freed: as much is torn
    moved = int(demand.reduction * (MOVING_SHARE if run.num_ranks > 1 else ONE_RANK_MOVING_SHARE))
    return tensors + (moved if kept else min(moved + SMALL_BLOCKS // 2, GLIBC_KEEPS))
