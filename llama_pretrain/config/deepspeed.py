"""DeepSpeed's settings that belong to no other config group, under its own names."""

from collections.abc import Iterator
from dataclasses import field, fields
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from llama_pretrain.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, schema
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.zero import OffloadDevice, Zero, stages_of, unread_offload_keys

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


@schema
class Aio:
    """Asynchronous reads and writes for offload to `nvme`."""

    block_size: PositiveInt = 1_048_576
    """Bytes of one request."""
    queue_depth: PositiveInt = 8
    """Requests in flight."""
    intra_op_parallelism: PositiveInt = 1
    """Threads a rank."""
    single_submit: bool = False
    """Submit requests one by one."""
    overlap_events: bool = True
    """Submit new requests while others are awaited."""
    use_gds: bool = False
    """GPUDirect Storage."""


@schema
class ActivationCheckpointing:
    """How recomputed activations are kept, with train.gradient_checkpointing=true.

    All off: torch's own checkpointing. One on: DeepSpeed's.
    """

    partition_activations: bool = False
    """Shard the kept activations over tensor-parallel ranks."""
    cpu_checkpointing: bool = False
    """Keep activations in host memory."""
    contiguous_memory_optimization: bool = False
    """Copy kept activations into one buffer (with partition_activations)."""
    number_checkpoints: PositiveInt | None = None
    """Checkpoints that the buffer holds; `null` = the number of layers."""
    synchronize_checkpoint_boundary: bool = False
    """Wait for the device at each checkpoint."""
    profile: bool = False
    """Log the time of each forward and backward through a checkpoint."""


@schema
class TensorBoardMonitor:
    """DeepSpeed's own TensorBoard monitor, beside ours."""

    enabled: bool = False
    """Whether it is on."""
    output_path: str | None = None
    """Where it writes; `null` = tensorboard/ of the run directory."""
    job_name: str = "deepspeed"
    """Its folder in output_path."""


@schema
class CsvMonitor:
    """DeepSpeed's own CSV monitor, beside ours."""

    enabled: bool = False
    """Whether it is on."""
    output_path: str | None = None
    """Where it writes; `null` = csv/ of the run directory."""
    job_name: str = "deepspeed"
    """Its folder in output_path."""


@schema
class WandbMonitor:
    """DeepSpeed's own Weights & Biases monitor."""

    enabled: bool = False
    """Whether it is on; needs the package wandb."""
    project: str = "llama-pretrain"
    """Its project."""
    group: str | None = None
    """Its group."""
    team: str | None = None
    """Its team."""


@schema
class CometMonitor:
    """DeepSpeed's own Comet monitor. The key comes from Comet's own settings, never from here."""

    enabled: bool = False
    """Whether it is on; needs the package comet_ml."""
    samples_log_interval: PositiveInt = 100
    """Rows of training between two submissions."""
    project: str | None = None
    """Its project."""
    workspace: str | None = None
    """Its workspace."""
    experiment_name: str | None = None
    """Its name for the run."""
    experiment_key: str | None = None
    """Its key of an experiment to go on with: a name, no secret."""
    online: bool | None = None
    """Whether it submits at once; `null` = Comet's default."""
    mode: str | None = None
    """`get`, `create` or `get_or_create`."""


@schema
class FlopsProfiler:
    """DeepSpeed's profile of one step by module, in the log of rank 0."""

    enabled: bool = False
    """Whether it is on; turns wall_clock_breakdown on as well."""
    recompute_fwd_factor: Annotated[float, Ge(0)] = 0.0
    """Forward passes that recomputation adds, 1.0 with full checkpointing."""
    profile_step: NonNegativeInt = 5
    """Steps that are done before the one that is profiled."""
    module_depth: Annotated[int, Ge(-1)] = -1
    """Depth of the table; -1 = all."""
    top_modules: PositiveInt = 1
    """Modules named at each depth."""
    detailed: bool = True
    """Whether each module has its line."""
    output_file: str | None = None
    """A file for it; `null` = the log of rank 0."""


@schema
class CommsLogger:
    """DeepSpeed's log of every collective, in the logs of ranks."""

    enabled: bool = False
    """Whether it is on."""
    verbose: bool = False
    """A line as each ends."""
    prof_all: bool = True
    """Log all operations."""
    prof_ops: list[str] = field(default_factory=list)
    """Operations to log, with prof_all=false."""
    debug: bool = False
    """Name the calling function."""


class TagValidation(str, Enum):
    Ignore = "Ignore"
    Warn = "Warn"
    Fail = "Fail"


@schema
class CheckpointEngine:
    """DeepSpeed's checkpoint section: how its engine writes what our checkpoints hold."""

    tag_validation: TagValidation = TagValidation.Warn
    """What happens where ranks disagree on a checkpoint's name."""
    use_node_local_storage: bool = False
    """Each machine keeps its own ranks' files: for disks that machines don't share."""


@schema
class HybridEngine:
    """DeepSpeed's hybrid engine: generation with fused kernels while training. Needs CUDA."""

    enabled: bool = False
    """Whether it is on."""
    max_out_tokens: PositiveInt = 512
    """Longest prompt and continuation together, in tokens."""
    inference_tp_size: PositiveInt = 1
    """Ranks that share one model while generating."""
    release_inference_cache: bool = False
    """Free the inference memory after each generation."""
    pin_parameters: bool = True
    """Keep gathered parameters in place while generating."""
    tp_gather_partition_size: PositiveInt = 8
    """Parameters gathered at a time for tensor parallelism."""
    enable_cuda_graph: bool = False
    """Replay generation as a CUDA graph."""


@schema
class TensorParallel:
    """DeepSpeed's AutoTP: each layer split over ranks. Planned, not yet trained."""

    autotp_size: PositiveInt = 1
    """Ranks that share one copy of the layers; 1 = off."""
    tp_overlap_comm: bool = False
    """Overlap its all-reduces with computation."""


@schema
class Compile:
    """DeepCompile: DeepSpeed's passes over a compiled graph. Needs CUDA."""

    deepcompile: bool = False
    """Whether it is on."""
    free_activation: bool = False
    """Free activations as soon as the graph allows."""
    free_activation_threshold: PositiveInt = 10_485_760
    """Smallest activation that is freed early, in bytes."""
    offload_activation: bool = False
    """Move activations to the host between forward and backward."""
    offload_activation_pin_memory: bool = True
    """Page-locked host memory for them."""
    offload_opt_states: bool = False
    """Move optimizer state to the host during forward and backward."""
    offload_parameters: bool = False
    """Move parameters to the host between uses."""
    double_buffer: bool = True
    """Two buffers for the reduction of gradients."""
    symmetric_memory: bool = False
    """Symmetric memory for collectives."""
    debug_log: bool = False
    """Log what the passes do."""
    sync_before_reduce: bool = False
    """Wait for the device before a reduction."""
    sync_after_reduce: bool = False
    """Wait for the device after a reduction."""
    sync_before_allgather: bool = False
    """Wait for the device before a gather."""
    sync_after_allgather: bool = False
    """Wait for the device after a gather."""
    keep_int_input_tensors: bool = True
    """Keep the values of integer inputs while compiling."""
    keep_all_input_tensors: bool = False
    """Keep the values of all inputs while compiling."""


@schema
class DeepSpeed:
    """DeepSpeed's settings that belong to no other group."""

    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
    )
    """How recomputed activations are kept."""
    aio: Aio = field(default_factory=Aio)
    """Reads and writes of offload to `nvme`."""
    checkpoint: CheckpointEngine = field(default_factory=CheckpointEngine)
    """DeepSpeed's checkpoint engine."""
    comet: CometMonitor = field(default_factory=CometMonitor)
    """DeepSpeed's Comet monitor."""
    comms_logger: CommsLogger = field(default_factory=CommsLogger)
    """DeepSpeed's log of collectives."""
    compile: Compile = field(default_factory=Compile)
    """DeepCompile."""
    csv_monitor: CsvMonitor = field(default_factory=CsvMonitor)
    """DeepSpeed's CSV monitor."""
    flops_profiler: FlopsProfiler = field(default_factory=FlopsProfiler)
    """DeepSpeed's profiler."""
    hybrid_engine: HybridEngine = field(default_factory=HybridEngine)
    """DeepSpeed's hybrid engine."""
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    """DeepSpeed's AutoTP."""
    tensorboard: TensorBoardMonitor = field(default_factory=TensorBoardMonitor)
    """DeepSpeed's TensorBoard monitor."""
    wandb: WandbMonitor = field(default_factory=WandbMonitor)
    """DeepSpeed's Weights & Biases monitor."""
    sequence_parallel_size: PositiveInt = 1
    """Ranks that share one row (Ulysses, arXiv 2309.14509); 1 = off. Planned, not yet trained."""
    steps_per_print: PositiveInt = 100
    """DeepSpeed logs its own line each so many steps, to the log of rank 0."""
    wall_clock_breakdown: bool = False
    """Log the time of forward, backward and step; costs synchronisations."""
    memory_breakdown: bool = False
    """Log the memory of the device at each phase."""
    dump_state: bool = False
    """Log the engine's state when it is built."""
    prescale_gradients: bool = False
    """Divide gradients by gradient_predivide_factor before the reduction instead of by the number
    of ranks after it."""
    gradient_predivide_factor: PositiveFloat = 1.0
    """See prescale_gradients."""
    disable_python_gc: bool = False
    """Collect Python's garbage between steps alone."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level keys of DeepSpeed that have no field here, as DeepSpeed names them."""


SWITCHES = {
    "comet": "enabled",
    "comms_logger": "enabled",
    "compile": "deepcompile",
    "csv_monitor": "enabled",
    "flops_profiler": "enabled",
    "hybrid_engine": "enabled",
    "tensor_parallel": "autotp_size",
    "tensorboard": "enabled",
    "wandb": "enabled",
}
"""Sections that are emitted when this field of theirs is changed."""


COMPILE_SWITCHES = {
    "free_activation": "free_activation_threshold",
    "offload_activation": "offload_activation_pin_memory",
}
"""Settings of DeepCompile that another of its settings makes it read."""


def validate_sections(run: "Run") -> Iterator[Problem]:
    deepspeed = run.deepspeed
    kept = deepspeed.activation_checkpointing
    path = "deepspeed.activation_checkpointing"
    if kept != ActivationCheckpointing() and not run.train.gradient_checkpointing:
        yield Problem(
            path=path,
            message="is read with train.gradient_checkpointing=true alone",
            hint="add train.gradient_checkpointing=true, or leave it out",
        )
    if kept.partition_activations and deepspeed.tensor_parallel.autotp_size == 1:
        yield Problem(
            path=f"{path}.partition_activations",
            message="shards over tensor-parallel ranks, and there are none",
            hint="set it to false",
        )
    if kept.contiguous_memory_optimization and not kept.partition_activations:
        yield Problem(
            path=f"{path}.contiguous_memory_optimization",
            message="needs partition_activations",
            hint="set it to false",
        )
    if kept.number_checkpoints is not None and not kept.contiguous_memory_optimization:
        yield Problem(
            path=f"{path}.number_checkpoints",
            message="is the size of the buffer of contiguous_memory_optimization, which is off"
            f" (got {kept.number_checkpoints})",
            hint="leave it out",
        )
    if deepspeed.gradient_predivide_factor != 1 and not deepspeed.prescale_gradients:
        yield Problem(
            path="deepspeed.gradient_predivide_factor",
            message="is used with deepspeed.prescale_gradients=true alone"
            f" (got {deepspeed.gradient_predivide_factor})",
            hint="add deepspeed.prescale_gradients=true, or leave it out",
        )
    if deepspeed.prescale_gradients and run.zero.stage > 0:
        yield Problem(
            path="deepspeed.prescale_gradients",
            message=f"is used at stage 0 alone (got stage {run.zero.stage})",
            hint="set zero.stage=0, or leave it out",
        )
    profiler, steps = deepspeed.flops_profiler, run.train.max_steps
    if profiler.enabled and steps is not None and profiler.profile_step >= steps:
        yield Problem(
            path="deepspeed.flops_profiler.profile_step",
            message=f"no step comes after so many: the run has {steps}"
            f" (got {profiler.profile_step})",
            hint=f"set it to {steps - 1} at most",
        )
    moved = [
        name
        for name in ("offload_activation", "offload_opt_states", "offload_parameters")
        if getattr(deepspeed.compile, name)
    ]
    if len(moved) > 1:
        yield Problem(
            path=f"deepspeed.compile.{moved[1]}",
            message=f"excludes {moved[0]}",
            hint="set it to false",
        )
    if deepspeed.compile.deepcompile and run.zero.stage == 0:
        yield Problem(
            path="deepspeed.compile.deepcompile",
            message="has no passes for stage 0, where DeepSpeed leaves it out",
            hint="set zero.stage=1, or leave it out",
        )
    logger = deepspeed.comms_logger
    if logger.enabled and logger.prof_all is bool(logger.prof_ops):
        yield Problem(
            path="deepspeed.comms_logger.prof_ops",
            message=f"is not used with prof_all=true (got {logger.prof_ops})"
            if logger.prof_all
            else "names no operation, and prof_all is false",
            hint=f"set deepspeed.comms_logger.prof_all={str(not logger.prof_all).lower()}",
        )
    if run.precision.seq_parallel_communication_data_type and deepspeed.sequence_parallel_size == 1:
        yield Problem(
            path="precision.seq_parallel_communication_data_type",
            message="is used with deepspeed.sequence_parallel_size above 1 alone"
            f" (got {run.precision.seq_parallel_communication_data_type.value})",
            hint="leave it out",
        )


def validate_unused(run: "Run") -> Iterator[Problem]:
    """Settings that were changed and that nothing would read."""
    for path, value, reader in _unused(run):
        yield Problem(
            path=path, message=f"is used by {reader} alone (got {value})", hint="leave it out"
        )


def _unused(run: "Run") -> Iterator[tuple[str, Any, str]]:
    zero, default = run.zero, Zero()
    for item in fields(Zero):
        if item.name.startswith("zero_"):  # ZeRO++ has words of its own
            continue
        stages, value = stages_of(item), getattr(zero, item.name)
        if stages and zero.stage not in stages and value != getattr(default, item.name):
            names = ", ".join(str(stage) for stage in stages)
            yield f"zero.{item.name}", value, f"stage{'s' * (len(stages) > 1)} {names}"
    on_disk = OffloadDevice.nvme in (zero.offload_optimizer.device, zero.offload_param.device)
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name)
        for key, reader in sorted(unread_offload_keys(offload).items()):
            value = getattr(offload, key)
            # Options such as zero=stage3_nvme set these two, whatever device is set beside them.
            left = key == "pin_memory" or (key == "nvme_path" and on_disk)
            if value != getattr(type(offload)(), key) and not left:
                yield f"zero.{name}.{key}", value, f"zero.{name}.{reader}"
    for item in () if on_disk else fields(Aio):
        value = getattr(run.deepspeed.aio, item.name)
        if value != item.default:
            yield f"deepspeed.aio.{item.name}", value, "offload to nvme"
    for name, switch in SWITCHES.items():
        section = getattr(run.deepspeed, name)
        off = type(section)()
        if getattr(section, switch) == getattr(off, switch):
            for item in fields(section):
                value = getattr(section, item.name)
                if value != getattr(off, item.name):
                    path = f"deepspeed.{name}"
                    yield f"{path}.{item.name}", value, f"{path}.{switch}"
    compiled = run.deepspeed.compile
    for switch, key in COMPILE_SWITCHES.items():
        value = getattr(compiled, key)
        off = compiled.deepcompile and not getattr(compiled, switch)
        if off and value != getattr(Compile(), key):
            yield f"deepspeed.compile.{key}", value, f"deepspeed.compile.{switch}"
