"""DeepSpeed's sections, under its own names (0.19): what of it pretraining uses.

A field is emitted under its name into the section that its class stands for (plan/ds_config.py).
Sizes are in elements unless a field says otherwise.
"""

from dataclasses import Field, dataclass, field
from enum import Enum
from typing import Annotated, Any, get_args

from annotated_types import Ge, Interval

from llama_pretrain.config.fields import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    schema,
)


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
