"""Peak memory of a rank, by part: an estimate from the config alone.

Symbols: P parameters, E those of the largest matrix, W ranks, B sequences of a micro batch, T
tokens, D model width, F feed-forward width, V vocabulary, L layers. Sharding follows the ZeRO paper
(arXiv 1910.02054, section 3), buffers and copies DeepSpeed 0.19's source, and activations the
tensors that autograd saves for transformers' LLaMA layer. docs/plan.md works through an example;
benchmarks/memory.py compares the plan with measured runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from dataclasses import replace as changed
from typing import Any

from llama_pretrain.config.launch import Device
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.plan.activations import (
    NUM_BYTES,
    activation_bytes,
    logits_bytes,
    number_width,
)
from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.plan.model_size import ModelSize, count_parameters
from llama_pretrain.plan.overhead import Demand, framework_bytes, heap_bytes, runtime_bytes

MOMENTS = {
    OptimName.lion: 1,
    OptimName.fused_lion: 1,
    OptimName.cpu_adagrad: 1,
}
"""fp32 values that an optimizer stores a parameter, if not two as Adam. DeepSpeed's CPU Lion also
creates a second moment, and never reads it."""

GPU_ALLOCATOR_SHARE = 0.05
"""Fragmentation of torch's caching allocator: an assumption that has not been measured."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank at its peak, by part."""

    phase: str
    """Phase of the peak: `forward`, `backward` (its start, with all activations), `reduce` (its
    end, with all gradients) or `step`."""
    weights: int = 0
    """Parameters in the precision of the forward pass."""
    master_weights: int = 0
    """fp32 weights that the optimizer updates, if they are a separate copy."""
    gradients: int = 0
    optimizer: int = 0
    """Moments."""
    activations: int = 0
    """What the decoder layers save for the backward pass."""
    logits: int = 0
    """Logits, their log-softmax and its gradient; with the chunked loss those of a chunk, and the
    gradients that are computed with them."""
    gathered: int = 0
    """Parameters that stage 3 has gathered."""
    buffers: int = 0
    """Buckets of the reduction and copies made by the step."""
    checkpoint: int = 0
    """The copy of weights and optimizer state that an asynchronous checkpoint is written from."""
    allocator: int = 0
    """Fragmentation."""
    runtime: int = 0
    """What a running step needs besides tensors."""
    framework: int = 0
    """Libraries."""
    host: int = 0
    """Host memory when the device is a GPU: what is offloaded there, or the fp32 model while it
    is built. On a CPU all memory is the host's, and offloaded parts count as what they are."""
    disk: int = 0
    """Offloaded to `nvme`."""

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the total, by name."""
        others = ("phase", "host", "disk")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}

    @property
    def total(self) -> int:
        """The peak of the rank's device."""
        return sum(self.parts.values())


def estimate_memory(run: ResolvedRun, batch: BatchPlan) -> MemoryPlan:
    """The peak of one rank: the largest of the phases of a step."""
    states = states_memory(run)
    if run.launch.device is Device.cuda:
        phases = [_offload(run, phase, states) for phase in list_phases(run, batch, states)]
        peak = max(phases, key=lambda phase: phase.total)
        live = peak.total - peak.framework
        return changed(peak, allocator=int(live * GPU_ALLOCATOR_SHARE))
    states = changed(states, gradients=states.gradients + _summed_bytes(run, batch))
    phases = list(list_phases(run, batch, states))
    peak = max(phases, key=lambda phase: phase.total)
    if run.launch.malloc_mmap_threshold is not None:  # freed memory is returned at once
        return peak
    live = peak.total - peak.framework - peak.runtime
    heap = heap_bytes(run, _demand(run, batch, phases, states))
    return changed(peak, allocator=max(0, heap - live))


def _demand(
    run: ResolvedRun, batch: BatchPlan, phases: list[MemoryPlan], states: MemoryPlan
) -> Demand:
    """The terms of a step that an allocator does not put into the same place."""
    reduce, step = (next(p for p in phases if p.phase == name) for name in ("reduce", "step"))
    activations = [
        phase.total - states.total - (phase.gradients - states.gradients)
        for phase in phases
        if phase.phase in ("forward", "backward")
    ]
    reduction, after = reduce.total - states.total, step.total - states.total
    if run.zero.stage == 0:  # its copies come in addition to the gradients
        after = reduction + step.buffers - states.buffers
    return Demand(
        states=states.total - states.framework - states.runtime,
        activations=max(activations),
        reduction=reduction,
        step=after,
        micro_batches=batch.gradient_accumulation_steps,
        summed=_summed_bytes(run, batch),
        recomputed=activation_bytes(run, batch)[1] if run.train.gradient_checkpointing else 0,
    )


def _summed_bytes(run: ResolvedRun, batch: BatchPlan) -> int:
    """Buffers, in the model's precision, in which offloaded gradients are accumulated."""
    if batch.gradient_accumulation_steps == 1 or not _offloads(run) or run.zero.stage == 3:
        return 0
    return _shard(count_parameters(run.model).total * number_width(run), run.num_ranks)


def states_memory(run: ResolvedRun) -> MemoryPlan:
    """What is in memory between two steps, on the device and on the host."""
    world_size = run.num_ranks
    zero, optim, precision = run.zero, run.optim.name, run.precision
    size, stage, width = count_parameters(run.model), zero.stage, number_width(run)
    low = precision.bf16_master_weights_and_grads or precision.fp16_master_weights_and_grads
    master_width = 2 if low else 4
    moments = size.total * MOMENTS.get(optim, 2)
    if optim is OptimName.muon:  # only momentum for the matrices of the layers
        moments -= size.decayed - size.embedding - size.head
    # At stage 0 in fp32 the optimizer updates the weights themselves.
    has_master = stage > 0 or width < 4
    gradients = size.total * _accumulation_width(run) if stage == 3 else 0
    buffers = 0
    if _offloads(run):  # DeepSpeed's CPU optimizers have their own fp32 gradients
        gradients += size.total * master_width
        if stage < 3:  # the updated partition, and a gradient being copied to the host
            buffers = _shard(size.total * width, world_size) + 2 * _largest(size) * width
    moment_bytes = moments * (2 if precision.bf16_optimizer_states else 4)
    saved = size.total * master_width + moment_bytes if run.checkpoint.asynchronous else 0
    return MemoryPlan(
        phase="between steps",
        weights=_shard(size.total * width, world_size if stage == 3 else 1),
        master_weights=_shard(size.total * master_width, world_size if stage else 1) * has_master,
        gradients=_shard(gradients, world_size),
        optimizer=_shard(moment_bytes, world_size if stage else 1),
        checkpoint=_shard(saved, world_size),  # at stage 0 each rank writes its share
        buffers=buffers,
        runtime=runtime_bytes(run),
        framework=framework_bytes(run),
    )


def _offload(run: ResolvedRun, phase: MemoryPlan, states: MemoryPlan) -> MemoryPlan:
    """A phase on a GPU, with offloaded parts moved to `host` or `disk`."""
    zero, size = run.zero, count_parameters(run.model)
    beside = {OffloadDevice.cpu: 0, OffloadDevice.nvme: 0}
    left: dict[str, Any] = {}
    if _offloads(run):
        moved = {
            part: int(getattr(states, part) * zero.offload_optimizer.ratio)
            for part in ("master_weights", "optimizer")
        }
        low = _accumulation_width(run) * (zero.stage // 3)  # kept on the device by stage 3
        moved["gradients"] = states.gradients * 4 // (4 + low)
        if zero.stage < 3:
            moved["buffers"] = states.buffers - _largest(size) * number_width(run)
        left |= {part: getattr(phase, part) - moved[part] for part in moved}
        beside[zero.offload_optimizer.device] += sum(moved.values())
    if zero.offload_param.device is not OffloadDevice.none:
        left["weights"] = 0
        beside[zero.offload_param.device] += states.weights
    # Below stage 3 each rank first builds the whole model in fp32 on the host.
    built = size.total * 4 if zero.stage < 3 else 0
    host = max(beside[OffloadDevice.cpu] + states.checkpoint, built)
    left["checkpoint"] = 0
    return changed(phase, host=host, disk=beside[OffloadDevice.nvme], **left)


def _offloads(run: ResolvedRun) -> bool:
    return run.zero.offload_optimizer.device is not OffloadDevice.none


def _largest(size: ModelSize) -> int:
    """Elements of the largest matrix."""
    return max(size.embedding, size.head)


def list_phases(run: ResolvedRun, batch: BatchPlan, states: MemoryPlan) -> Iterator[MemoryPlan]:
    """What is in memory in each phase of a step, offloaded parts included."""
    size = count_parameters(run.model)
    activations, layer = activation_bytes(run, batch)
    logits, gradient = logits_bytes(run, batch)
    gathered = _gathered_bytes(run, size)
    largest = _largest(size) * number_width(run)
    held = _held_gradients(run, batch, size)
    ready = states.gradients + held
    forward = changed(
        states,
        phase="forward",
        activations=activations,
        logits=logits,
        gathered=gathered,
        gradients=ready,
        # The head is gathered through a buffer of its size before logits exist.
        buffers=states.buffers + (max(0, largest - logits) if gathered else 0),
    )
    yield forward
    ring = states.buffers
    if run.launch.device is Device.cuda:  # torch.empty is backed by memory at once on a GPU
        ring += _bucket_bytes(run, size)
    # Its start: the gradient of the logits exists, those of the weights do not yet.
    yield changed(forward, phase="backward", logits=gradient, buffers=ring)
    # After the head: with recomputation one layer has all its activations again.
    yield changed(
        forward, phase="backward", activations=activations + layer, logits=0, buffers=ring
    )
    gradients, copies = _reduced_bytes(run, batch, size)
    yield changed(
        states,
        phase="reduce",
        gathered=gathered,
        gradients=states.gradients + gradients,
        buffers=states.buffers + copies,
    )
    gradients, copies = _step_bytes(run, size)
    yield changed(
        states,
        phase="step",
        gradients=states.gradients + gradients,
        buffers=states.buffers + copies,
    )


def _accumulation_width(run: ResolvedRun) -> int:
    chosen = run.precision.grad_accum_dtype
    return number_width(run) if chosen is None else NUM_BYTES[chosen.value]


def _shard(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _gathered_bytes(run: ResolvedRun, size: ModelSize) -> int:
    """Parameters that stage 3 has gathered: as many as it may, and at least a layer and a matrix.

    The input embedding is released while the head is in use, and the other way round.
    """
    zero = run.zero
    fetched = run.num_ranks > 1 or (
        run.launch.device is Device.cuda and zero.offload_param.device is not OffloadDevice.none
    )
    if zero.stage < 3 or not fetched:
        return 0
    least = size.layers // run.model.num_hidden_layers + _largest(size)
    most = max(zero.stage3_max_live_parameters, least) + zero.stage3_prefetch_bucket_size
    idle = min(size.embedding, size.head)
    return min(size.total - idle, most) * number_width(run)


def _bucket_bytes(run: ResolvedRun, size: ModelSize) -> int:
    """The reduction's buffers: whole ones on a GPU, only the pages written on a CPU."""
    zero = run.zero
    bucket = zero.reduce_bucket_size
    if run.launch.device is Device.cpu or zero.stage == 0:
        bucket = min(size.total, bucket)
    overlaps = zero.stage == 3 if zero.overlap_comm is None else zero.overlap_comm
    doubled = overlaps and zero.stage in (1, 2)
    return bucket * number_width(run) * (2 if doubled else 1)


def _held_gradients(run: ResolvedRun, batch: BatchPlan, size: ModelSize) -> int:
    """Gradients of earlier micro batches of the step, in addition to `states_memory`."""
    zero = run.zero
    if batch.gradient_accumulation_steps == 1 or zero.stage == 3:
        return 0
    if zero.stage == 2:
        if _offloads(run):
            return 0
        return _shard(size.total * _accumulation_width(run), run.num_ranks)
    return size.total * _accumulation_width(run)


def _reduced_bytes(run: ResolvedRun, batch: BatchPlan, size: ModelSize) -> tuple[int, int]:
    """Gradients and their copies at the end of the backward pass."""
    zero, width = run.zero, number_width(run)
    whole, bucket = size.total * width, _bucket_bytes(run, size)
    if zero.stage == 0:
        return whole, bucket
    largest = _largest(size) * width
    if zero.stage == 3:  # the largest gradient, and an fp32 copy of it that is reduced
        return largest, bucket + _largest(size) * 4
    held = _held_gradients(run, batch, size)
    elements = zero.reduce_bucket_size
    if size.total <= elements:  # nothing is reduced or freed before the end
        live = whole if zero.stage == 1 else held + whole
    else:
        part = _shard(size.total * _accumulation_width(run), run.num_ranks)
        live = max(held, part) + max(largest, elements * width)
    return live, bucket


def _step_bytes(run: ResolvedRun, size: ModelSize) -> tuple[int, int]:
    """Gradients that the optimizer reads, and the copies that DeepSpeed makes of them."""
    zero, total, world_size = run.zero, size.total, run.num_ranks
    accumulated = _accumulation_width(run)
    if zero.stage == 0:
        return total * number_width(run), total * 4 if number_width(run) < 4 else 0
    flat = total * (accumulated + (4 if accumulated < 4 else 0))
    if _offloads(run):
        return 0, 0
    if zero.stage == 3:
        part = min(-(-total // world_size), zero.sub_group_size)
        return 0, part * flat // total + _adam_temporaries(run, size)
    copies = _shard(flat, world_size) + _adam_temporaries(run, size)
    return _shard(total * accumulated, world_size), copies


def _adam_temporaries(run: ResolvedRun, size: ModelSize) -> int:
    """What Muon's AdamW, which is plain PyTorch, computes for the embedding and the head in fp32.

    Both corrected moments, the root and the denominator.
    """
    if run.optim.name is not OptimName.muon:
        return 0
    return 4 * _shard((size.embedding + size.head) * 4, run.num_ranks)
