"""The config group `zero`: DeepSpeed's zero_optimization section, under its own names."""

from collections.abc import Iterator
from dataclasses import Field, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from llama_pretrain.config.fields import (
    IsPath,
    NonNegativeInt,
    PositiveInt,
    UsedWhen,
    default_of,
    marks_of,
    plain_value,
    schema,
)
from llama_pretrain.config.optim import HOST_OPTIMIZERS, MUON, OptimName
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run

ONE_TWO = UsedWhen("zero.stage", (1, 2))
SHARDED = UsedWhen("zero.stage", (1, 2, 3))
THREE = UsedWhen("zero.stage", (3,))
OFFLOADED = UsedWhen(".device", ("cpu", "nvme"))
ON_DISK = UsedWhen(".device", ("nvme",))


def stages_of(item: "Field[Any]") -> tuple[int, ...]:
    """The ZeRO stages that read a field of `Zero`; empty if the field has no such mark."""
    return next((mark.values for mark in marks_of(item) if mark.setting == "zero.stage"), ())


class OffloadDevice(str, Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@schema
class OffloadOptimizer:
    """Optimizer state outside the accelerator."""

    device: OffloadDevice = OffloadDevice.none
    """`none`, `cpu`, or `nvme` (stage 3 only)."""
    nvme_path: Annotated[str | None, ON_DISK, IsPath()] = None
    """Directory on a local disk, for `nvme`."""
    pin_memory: Annotated[bool, OFFLOADED] = False
    """Page-locked host memory: faster copies, cannot be swapped."""
    buffer_count: Annotated[PositiveInt, ON_DISK] = 4
    """Buffers for `nvme`; at least the optimizer's states a parameter plus one."""
    pipeline_read: Annotated[bool, ON_DISK] = False
    """`nvme`: read the next tile while the current one is computed."""
    pipeline_write: Annotated[bool, ON_DISK] = False
    """`nvme`: write the previous tile while the current one is computed."""
    fast_init: Annotated[bool, ON_DISK] = False
    """`nvme`: allocate the state without writing zeros first."""
    ratio: Annotated[float, Interval(gt=0, le=1), OFFLOADED, THREE] = 1.0
    """Share of the parameters whose state is offloaded (stage 3)."""
    super_offload: bool = False
    """SuperOffload, for superchips such as GH200 (stage 3, `cpu`)."""
    cpuadam_cores_perc: Annotated[
        float, Interval(gt=0, le=1), UsedWhen(".super_offload", (True,))
    ] = 0.8
    """Share of the cores that SuperOffload's CPUAdam takes."""


@schema
class OffloadParam:
    """Parameters outside the accelerator (stage 3)."""

    device: OffloadDevice = OffloadDevice.none
    """`none`, `cpu` or `nvme`."""
    nvme_path: Annotated[str | None, ON_DISK, IsPath()] = None
    """Directory on a local disk, for `nvme`."""
    pin_memory: Annotated[bool, OFFLOADED] = False
    """Page-locked host memory: faster copies, cannot be swapped."""
    buffer_count: Annotated[PositiveInt, ON_DISK] = 5
    """Buffers for `nvme`."""
    buffer_size: Annotated[PositiveInt, ON_DISK] = 100_000_000
    """Size of a buffer in elements; at least the largest parameter's."""
    max_in_cpu: Annotated[NonNegativeInt, ON_DISK] = 1_000_000_000
    """Elements kept in host memory with `nvme`."""


@schema
class Zero:
    """DeepSpeed's zero_optimization section, under its own names. Sizes are in elements."""

    stage: Annotated[int, Interval(ge=0, le=3)] = 1
    """0: nothing is sharded; 1: optimizer state; 2: + gradients; 3: + parameters."""
    offload_optimizer: OffloadOptimizer = field(default_factory=OffloadOptimizer)
    """Optimizer state outside the accelerator (stages 1 to 3)."""
    offload_param: OffloadParam = field(default_factory=OffloadParam)
    """Parameters outside the accelerator (stage 3)."""
    overlap_comm: Annotated[bool | None, SHARDED] = None
    """Reduce gradients while the backward pass runs; `null` = DeepSpeed's choice for the stage."""
    contiguous_gradients: Annotated[bool, SHARDED] = True
    """Copy gradients into one buffer as they are computed, to avoid fragmentation."""
    reduce_scatter: Annotated[bool | None, SHARDED] = None
    """Average gradients by reduce-scatter instead of all-reduce; `null` = yes, except for Muon
    at stage 3, which needs whole gradients."""
    reduce_bucket_size: Annotated[PositiveInt | None, SHARDED] = None
    """Elements reduced at a time; `null` = hidden_size^2 at stage 3, else 5e8."""
    use_multi_rank_bucket_allreduce: Annotated[bool, ONE_TWO] = True
    """One all-reduce for the buckets of several ranks instead of one reduction each."""
    allgather_partitions: Annotated[bool, ONE_TWO] = True
    """Gather updated parameters by all-gather instead of broadcasts."""
    allgather_bucket_size: Annotated[PositiveInt, ONE_TWO] = 500_000_000
    """Elements gathered at a time."""
    round_robin_gradients: Annotated[bool, ONE_TWO] = False
    """Spread the copying of gradients to the host over ranks (with offload)."""
    parameter_alignment: Annotated[bool, ONE_TWO] = False
    """Pad flat buffers so that each parameter starts at a multiple of 16 bytes."""
    ignore_unused_parameters: Annotated[bool, ONE_TWO] = True
    """Whether a parameter without a gradient is accepted."""
    sub_group_size: Annotated[PositiveInt, THREE] = 1_000_000_000
    """Elements that the optimizer updates at a time."""
    stage3_prefetch_bucket_size: Annotated[NonNegativeInt | None, THREE] = None
    """Elements prefetched; `null` = 0.9 * hidden_size^2."""
    stage3_param_persistence_threshold: Annotated[NonNegativeInt | None, THREE] = None
    """Parameters with fewer elements stay gathered on every rank; `null` = 10 * hidden_size."""
    stage3_model_persistence_threshold: Annotated[NonNegativeInt | None, THREE] = None
    """Elements that may stay gathered in all; `null` = no limit."""
    stage3_max_live_parameters: Annotated[NonNegativeInt, THREE] = 1_000_000_000
    """Gathered elements allowed at a time."""
    stage3_max_reuse_distance: Annotated[NonNegativeInt, THREE] = 1_000_000_000
    """A parameter used again within this many elements is not released."""
    stage3_module_granularity_threshold: Annotated[NonNegativeInt, THREE] = 0
    """Modules with fewer parameters a submodule are fetched as one; 0 = none."""
    stage3_use_all_reduce_for_fetch_params: Annotated[bool, THREE] = False
    """Fetch parameters by all-reduce: less slicing on the host."""
    stage3_allgather_sequential: Annotated[bool, THREE] = False
    """Fetch parameters one by one without a flat buffer: less memory."""
    stage3_gather_16bit_weights_on_model_save: Annotated[bool, THREE] = False
    """For DeepSpeed's own save_16bit_model; our export does its own gathering."""
    memory_efficient_linear: Annotated[bool, THREE] = True
    """DeepSpeed's linear layer, which keeps no gathered weight for the backward pass."""
    zero_hpz_partition_size: Annotated[PositiveInt | None, THREE] = 1
    """ZeRO++ (arXiv 2306.10209): ranks that share a second copy of the weights; 1 = off, `null` =
    all ranks of a node."""
    zero_quantized_weights: Annotated[bool, THREE] = False
    """ZeRO++: gather weights in 8 bits."""
    zero_quantized_nontrainable_weights: Annotated[bool, THREE] = False
    """ZeRO++: keep weights that are not trained in 8 bits."""
    zero_quantized_gradients: Annotated[bool, THREE] = False
    """ZeRO++: reduce gradients in 4 bits."""
    save_muon_momentum_buffer_in_memory: Annotated[bool, THREE, MUON] = False
    """Keep Muon's momentum in memory when other state is offloaded to `nvme`."""
    log_trace_cache_warnings: Annotated[bool, THREE] = False
    """Log when the recorded order of modules is invalidated."""
    enable_sanity_checks: Annotated[bool, THREE] = False
    """DeepSpeed's internal checks, for debugging."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of zero_optimization that have no field here, as DeepSpeed names them."""


def keys_read(offload: OffloadOptimizer | OffloadParam) -> dict[str, Any]:
    """The fields of an offload section that DeepSpeed reads with this device, as plain values."""
    values = {item.name: plain_value(getattr(offload, item.name)) for item in fields(offload)}
    return {
        item.name: values[item.name]
        for item in fields(offload)
        if all(
            values[str(mark.setting)[1:]] in mark.values
            for mark in marks_of(item)
            if str(mark.setting).startswith(".")
        )
    }


def validate_zero(run: "Run") -> Iterator[Problem]:
    """What DeepSpeed refuses, or would ignore silently, at a stage."""
    zero, muon = run.zero, run.optim.name is OptimName.muon
    yield from _validate_offload(run)
    for item in fields(Zero):
        plus = item.name.startswith(("zero_hpz", "zero_quantized"))
        if plus and zero.stage < 3 and getattr(zero, item.name) != default_of(item):
            yield Problem(
                path=f"zero.{item.name}",
                message=f"ZeRO++ requires stage 3 (got stage {zero.stage})",
                hint="Set zero.stage=3",
            )
    if zero.zero_quantized_nontrainable_weights:
        yield Problem(
            path="zero.zero_quantized_nontrainable_weights",
            message="has no effect: every weight is trained (got true)",
            hint="Remove it",
        )
    if zero.zero_quantized_gradients and zero.reduce_scatter is False and not muon:
        yield Problem(
            path="zero.reduce_scatter",
            message="is required by zero.zero_quantized_gradients (got false)",
            hint="Remove it",
        )
    if not zero.allgather_partitions:
        yield Problem(
            path="zero.allgather_partitions",
            message="is no longer read by DeepSpeed 0.19.8, which always gathers (got false)",
            hint="Remove it",
        )
    if zero.allgather_bucket_size % 2:
        yield Problem(
            path="zero.allgather_bucket_size",
            message=f"must be even (got {zero.allgather_bucket_size})",
            hint=f"Set it to {zero.allgather_bucket_size + 1}",
        )
    offloaded = zero.offload_optimizer.device is not OffloadDevice.none
    if not zero.contiguous_gradients and offloaded and zero.stage in (1, 2):
        yield Problem(
            path="zero.contiguous_gradients",
            message="is not supported with offload, where DeepSpeed always copies gradients into"
            " one buffer (got false)",
            hint="Remove it",
        )
    if zero.zero_quantized_weights and run.precision.torch_autocast.enabled:
        yield Problem(
            path="zero.zero_quantized_weights",
            message="is not supported with precision.torch_autocast (got true)",
            hint="Set it to false, or add precision=bf16",
        )


def _validate_offload(run: "Run") -> Iterator[Problem]:
    zero, optim = run.zero, run.optim.name
    for name in ("offload_optimizer", "offload_param"):
        section = getattr(zero, name)
        on_disk = section.device is OffloadDevice.nvme
        least = 3 if name == "offload_param" or on_disk else 1
        if section.device is not OffloadDevice.none and zero.stage < least:
            yield Problem(
                path=f"zero.{name}.device",
                message=f"{section.device.value} requires stage {least}"
                f"{'' if least == 3 else ' or higher'} (got stage {zero.stage})",
                hint=f"Set zero.stage={max(2, least)}",
            )
        if on_disk and section.nvme_path is None and run.task is not Task.plan:
            yield Problem(
                path=f"zero.{name}.nvme_path",
                message="is required with device=nvme",
                hint=f"Add zero.{name}.nvme_path=DIR, on a local disk",
            )
    section = zero.offload_optimizer
    if section.device is not OffloadDevice.none and optim not in HOST_OPTIMIZERS:
        yield Problem(
            path="zero.offload_optimizer.device",
            message=f"{section.device.value} requires optim=cpu_adam, cpu_lion or cpu_adagrad"
            f" (got optim={optim.value})",
            hint="Add optim=cpu_adam, or set zero.offload_optimizer.device=none",
        )
    if section.super_offload and (zero.stage != 3 or section.device is not OffloadDevice.cpu):
        yield Problem(
            path="zero.offload_optimizer.super_offload",
            message="requires stage 3 and device=cpu"
            f" (got stage {zero.stage}, {section.device.value})",
            hint="Set zero.stage=3 and zero.offload_optimizer.device=cpu",
        )
    host = HOST_OPTIMIZERS.get(optim)
    for key, on in (("ratio", section.ratio < 1), ("super_offload", section.super_offload)):
        if on and zero.stage == 3 and host not in (None, "cpu_adam"):
            yield Problem(
                path=f"zero.offload_optimizer.{key}",
                message=f"is only supported with CPUAdam (got optim={optim.value})",
                hint="Add optim=cpu_adam, or remove it",
            )
