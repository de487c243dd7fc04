"""The config group `zero`: DeepSpeed's zero_optimization section, under its own names."""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, get_args

from annotated_types import Interval

from llama_pretrain.config.fields import NonNegativeInt, PositiveInt, schema
from llama_pretrain.config.optim import HOST_OPTIMIZERS, OptimName
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


@dataclass(frozen=True)
class Stages:
    """Marks a field of zero_optimization that only some stages read."""

    stages: tuple[int, ...]


ONE_TWO = Stages((1, 2))


SHARDED = Stages((1, 2, 3))


THREE = Stages((3,))


def stages_of(item: "Field[Any]") -> tuple[int, ...]:
    """The stages that read a field of Zero; none for what is no plain setting."""
    marks = [mark for mark in get_args(item.type) if isinstance(mark, Stages)]
    return marks[0].stages if marks else ()


class OffloadDevice(str, Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@schema
class OffloadOptimizer:
    """Optimizer state outside the accelerator."""

    device: OffloadDevice = OffloadDevice.none
    """`none`, `cpu`, or `nvme` (stage 3 only)."""
    nvme_path: str | None = None
    """Folder on a local disk, for `nvme`."""
    pin_memory: bool = False
    """Page-locked host memory: faster copies, cannot be swapped."""
    buffer_count: PositiveInt = 4
    """Buffers for `nvme`; at least the optimizer's states a parameter plus one."""
    pipeline_read: bool = False
    """`nvme`: read the next tile while this one is computed."""
    pipeline_write: bool = False
    """`nvme`: write the previous tile while this one is computed."""
    fast_init: bool = False
    """`nvme`: allocate the state without writing zeros first."""
    ratio: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of the parameters whose state is offloaded (stage 3)."""
    super_offload: bool = False
    """SuperOffload, for superchips such as GH200 (stage 3, `cpu`)."""
    cpuadam_cores_perc: Annotated[float, Interval(gt=0, le=1)] = 0.8
    """Share of the cores that SuperOffload's CPUAdam takes."""


@schema
class OffloadParam:
    """Parameters outside the accelerator (stage 3)."""

    device: OffloadDevice = OffloadDevice.none
    """`none`, `cpu` or `nvme`."""
    nvme_path: str | None = None
    """Folder on a local disk, for `nvme`."""
    pin_memory: bool = False
    """Page-locked host memory: faster copies, cannot be swapped."""
    buffer_count: PositiveInt = 5
    """Buffers for `nvme`."""
    buffer_size: PositiveInt = 100_000_000
    """Size of a buffer in elements; at least the largest parameter's."""
    max_in_cpu: NonNegativeInt = 1_000_000_000
    """Elements kept in host memory with `nvme`."""


DISK_KEYS = (
    "nvme_path",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
)


def unread_offload_keys(offload: OffloadOptimizer | OffloadParam) -> dict[str, str]:
    """Fields that DeepSpeed ignores with these others, and what would make it read them."""
    unread = {}
    if offload.device is not OffloadDevice.nvme:
        unread = {key: "device=nvme" for key in DISK_KEYS if hasattr(offload, key)}
    if offload.device is OffloadDevice.none:
        unread["pin_memory"] = "device=cpu"
    if isinstance(offload, OffloadOptimizer):
        if offload.device is OffloadDevice.none:
            unread["ratio"] = "device=cpu"
        if not offload.super_offload:
            unread["cpuadam_cores_perc"] = "super_offload"
    return unread


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
    """Copy gradients into one buffer as they are made, against fragmentation."""
    reduce_scatter: Annotated[bool | None, SHARDED] = None
    """Average gradients by reduce-scatter instead of all-reduce; `null` = yes, but for Muon at
    stage 3, which needs whole gradients."""
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
    """Whether a parameter without a gradient is no error."""
    sub_group_size: Annotated[PositiveInt, THREE] = 1_000_000_000
    """Elements that the optimizer updates at a time."""
    stage3_prefetch_bucket_size: Annotated[NonNegativeInt | None, THREE] = None
    """Elements fetched ahead of their use; `null` = 0.9 * hidden_size^2."""
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
    """Fetch parameters one after another without a flat buffer: less memory."""
    stage3_gather_16bit_weights_on_model_save: Annotated[bool, THREE] = False
    """For DeepSpeed's own save_16bit_model; our export gathers by itself."""
    memory_efficient_linear: Annotated[bool, THREE] = True
    """DeepSpeed's linear layer, which keeps no gathered weight for the backward pass."""
    zero_hpz_partition_size: Annotated[PositiveInt | None, THREE] = 1
    """ZeRO++ (arXiv 2306.10209): ranks that share a second copy of the weights; 1 = off, `null` =
    all ranks of a machine."""
    zero_quantized_weights: Annotated[bool, THREE] = False
    """ZeRO++: gather weights in 8 bits."""
    zero_quantized_nontrainable_weights: Annotated[bool, THREE] = False
    """ZeRO++: keep weights that aren't trained in 8 bits."""
    zero_quantized_gradients: Annotated[bool, THREE] = False
    """ZeRO++: reduce gradients in 4 bits."""
    save_muon_momentum_buffer_in_memory: Annotated[bool, THREE] = False
    """Keep Muon's momentum in memory where other state goes to `nvme`."""
    log_trace_cache_warnings: Annotated[bool, THREE] = False
    """Log when the recorded order of modules is invalidated."""
    enable_sanity_checks: Annotated[bool, THREE] = False
    """DeepSpeed's internal checks, for debugging."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of zero_optimization that have no field here, as DeepSpeed names them."""


def validate_offload(run: "Run") -> Iterator[Problem]:
    zero = run.zero
    for name in ("offload_optimizer", "offload_param"):
        section = getattr(zero, name)
        on_disk = section.device is OffloadDevice.nvme
        least = 3 if name == "offload_param" or on_disk else 1
        if section.device is not OffloadDevice.none and zero.stage < least:
            yield Problem(
                path=f"zero.{name}.device",
                message=f"{section.device.value} needs zero.stage={least}"
                f"{'' if least == 3 else ' or higher'} (got stage {zero.stage})",
                hint=f"set zero.stage={max(2, least)}",
            )
        if on_disk and section.nvme_path is None and run.task is not Task.plan:
            yield Problem(
                path=f"zero.{name}.nvme_path",
                message="nvme needs a folder on a local disk",
                hint=f"add zero.{name}.nvme_path=DIR",
            )
    section = zero.offload_optimizer
    if section.device is not OffloadDevice.none and run.optim.name not in HOST_OPTIMIZERS:
        yield Problem(
            path="zero.offload_optimizer.device",
            message=f"{section.device.value} needs optim=cpu_adam, cpu_lion or cpu_adagrad"
            f" (got optim={run.optim.name.value})",
            hint="add optim=cpu_adam, or set zero.offload_optimizer.device=none",
        )
    if section.ratio < 1 and zero.stage != 3 and section.device is not OffloadDevice.none:
        yield Problem(
            path="zero.offload_optimizer.ratio",
            message=f"a part is offloaded at stage 3 alone (got {section.ratio})",
            hint="set zero.stage=3, or leave it out",
        )
    if section.super_offload and (zero.stage != 3 or section.device is not OffloadDevice.cpu):
        yield Problem(
            path="zero.offload_optimizer.super_offload",
            message="SuperOffload needs zero.stage=3 and zero.offload_optimizer.device=cpu"
            f" (got stage {zero.stage}, {section.device.value})",
            hint="set zero.stage=3 and zero.offload_optimizer.device=cpu",
        )
    host = HOST_OPTIMIZERS.get(run.optim.name)
    for key, on in (("ratio", section.ratio < 1), ("super_offload", section.super_offload)):
        if on and zero.stage == 3 and host not in (None, "cpu_adam"):
            yield Problem(
                path=f"zero.offload_optimizer.{key}",
                message="DeepSpeed has it for its CPUAdam alone"
                f" (got optim={run.optim.name.value})",
                hint="add optim=cpu_adam, or leave it out",
            )


def validate_zero(run: "Run") -> Iterator[Problem]:
    zero = run.zero
    for name, off in (
        ("zero_hpz_partition_size", 1),
        ("zero_quantized_weights", False),
        ("zero_quantized_gradients", False),
    ):
        if zero.stage < 3 and getattr(zero, name) != off:
            yield Problem(
                path=f"zero.{name}",
                message=f"ZeRO++ needs zero.stage=3 (got stage {zero.stage})",
                hint="set zero.stage=3",
            )
    if zero.zero_quantized_nontrainable_weights:
        yield Problem(
            path="zero.zero_quantized_nontrainable_weights",
            message="here every weight is trained (got true)",
            hint="leave it out",
        )
    muon = run.optim.name is OptimName.muon  # which has neither, and says so
    if zero.zero_quantized_gradients and zero.reduce_scatter is False and not muon:
        yield Problem(
            path="zero.reduce_scatter",
            message="zero.zero_quantized_gradients needs it (got false)",
            hint="leave it out",
        )
    if not zero.allgather_partitions:
        yield Problem(
            path="zero.allgather_partitions",
            message="DeepSpeed 0.19.8 gathers in any case and reads it no more (got false)",
            hint="leave it out",
        )
    if zero.allgather_bucket_size % 2:
        yield Problem(
            path="zero.allgather_bucket_size",
            message=f"should be even (got {zero.allgather_bucket_size})",
            hint=f"set it to {zero.allgather_bucket_size + 1}",
        )
    offloaded = zero.offload_optimizer.device is not OffloadDevice.none
    if not zero.contiguous_gradients and offloaded and zero.stage in (1, 2):
        yield Problem(
            path="zero.contiguous_gradients",
            message="with offload DeepSpeed copies gradients into one buffer always (got false)",
            hint="leave it out",
        )
    if zero.zero_quantized_weights and run.precision.torch_autocast.enabled:
        yield Problem(
            path="zero.zero_quantized_weights",
            message="is refused by DeepSpeed together with precision.torch_autocast (got true)",
            hint="set it to false, or add precision=bf16",
        )
    kept = zero.save_muon_momentum_buffer_in_memory
    if kept and zero.stage == 3 and not muon:
        yield Problem(
            path="zero.save_muon_momentum_buffer_in_memory",
            message=f"is used with optim=muon alone (got optim={run.optim.name.value})",
            hint="add optim=muon, or leave it out",
        )
