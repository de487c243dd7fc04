"""DeepSpeed's settings that belong to no other config group, under its own names."""

from collections.abc import Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from llama_pretrain.config.fields import (
    IsPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UsedWhen,
    schema,
)
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


@schema
class Aio:
    """Asynchronous reads and writes of offload to `nvme`."""

    block_size: PositiveInt = 1_048_576
    """Bytes of one request."""
    queue_depth: PositiveInt = 8
    """Requests in flight."""
    intra_op_parallelism: PositiveInt = 1
    """Threads a rank."""
    single_submit: bool = False
    """Submit requests one by one."""
    overlap_events: bool = True
    """Submit new requests while waiting for others."""
    use_gds: bool = False
    """GPUDirect Storage."""


@schema
class ActivationCheckpointing:
    """How checkpointed activations are stored, with train.gradient_checkpointing=true.

    All off: torch's own checkpointing. One on: DeepSpeed's.
    """

    cpu_checkpointing: bool = False
    """Store activations in host memory."""
    synchronize_checkpoint_boundary: bool = False
    """Synchronize the device at each checkpoint."""
    profile: bool = False
    """Log the time of each forward and backward through a checkpoint."""


@schema
class TensorBoardMonitor:
    """DeepSpeed's own TensorBoard monitor, beside ours."""

    enabled: bool = False
    """Whether it is on."""
    output_path: Annotated[str | None, IsPath()] = None
    """Where it writes; `null` = tensorboard/ of the run directory."""
    job_name: str = "deepspeed"
    """Its directory in output_path."""


@schema
class FlopsProfiler:
    """DeepSpeed's profile of one step by module, in the log of rank 0."""

    enabled: bool = False
    """Whether it is on; also turns on wall_clock_breakdown."""
    recompute_fwd_factor: Annotated[float, Ge(0)] = 0.0
    """Forward passes that recomputation adds, 1.0 with full checkpointing."""
    profile_step: NonNegativeInt = 5
    """Number of steps before the one that is profiled."""
    module_depth: Annotated[int, Ge(-1)] = -1
    """Depth of the table; -1 = all."""
    top_modules: PositiveInt = 1
    """Number of modules named at each depth."""
    detailed: bool = True
    """Whether each module has a line."""
    output_file: Annotated[str | None, IsPath()] = None
    """File to write to; `null` = the log of rank 0."""


@schema
class CommsLogger:
    """DeepSpeed's log of every collective, in the logs of ranks."""

    enabled: bool = False
    """Whether it is on."""
    verbose: bool = False
    """Log each operation as it ends."""
    prof_all: bool = True
    """Log all operations."""
    prof_ops: Annotated[list[str], UsedWhen("deepspeed.comms_logger.prof_all", (False,))] = field(
        default_factory=list
    )
    """Operations to log, with prof_all=false."""
    debug: bool = False
    """Log the calling function."""


@schema
class HybridEngine:
    """DeepSpeed's hybrid engine: generation with fused kernels during training. Needs CUDA."""

    enabled: bool = False
    """Whether it is on."""
    max_out_tokens: PositiveInt = 512
    """Maximum length of prompt and generation together, in tokens."""
    inference_tp_size: PositiveInt = 1
    """Ranks that share one model during generation."""
    release_inference_cache: bool = False
    """Free the inference memory after each generation."""
    pin_parameters: bool = True
    """Keep gathered parameters in place during generation."""
    tp_gather_partition_size: PositiveInt = 8
    """Parameters gathered at a time for tensor parallelism."""
    enable_cuda_graph: bool = False
    """Replay generation as a CUDA graph."""


SWITCHED = ("comms_logger", "flops_profiler", "hybrid_engine", "tensorboard")
"""Sections that are emitted, whole, when `enabled`."""


@schema
class DeepSpeed:
    """DeepSpeed's settings that belong to no other group."""

    activation_checkpointing: Annotated[
        ActivationCheckpointing, UsedWhen("train.gradient_checkpointing", (True,))
    ] = field(default_factory=ActivationCheckpointing)
    """How checkpointed activations are stored."""
    aio: Annotated[
        Aio, UsedWhen(("zero.offload_optimizer.device", "zero.offload_param.device"), ("nvme",))
    ] = field(default_factory=Aio)
    """Reads and writes of offload to `nvme`."""
    comms_logger: Annotated[CommsLogger, UsedWhen("deepspeed.comms_logger.enabled", (True,))] = (
        field(default_factory=CommsLogger)
    )
    """DeepSpeed's log of collectives."""
    flops_profiler: Annotated[
        FlopsProfiler, UsedWhen("deepspeed.flops_profiler.enabled", (True,))
    ] = field(default_factory=FlopsProfiler)
    """DeepSpeed's profiler."""
    hybrid_engine: Annotated[HybridEngine, UsedWhen("deepspeed.hybrid_engine.enabled", (True,))] = (
        field(default_factory=HybridEngine)
    )
    """DeepSpeed's hybrid engine."""
    tensorboard: Annotated[
        TensorBoardMonitor, UsedWhen("deepspeed.tensorboard.enabled", (True,))
    ] = field(default_factory=TensorBoardMonitor)
    """DeepSpeed's TensorBoard monitor."""
    steps_per_print: PositiveInt = 100
    """DeepSpeed logs a line every this many steps, to the log of rank 0."""
    wall_clock_breakdown: bool = False
    """Log the time of forward, backward and step; costs synchronizations."""
    memory_breakdown: bool = False
    """Log the memory of the device at each phase."""
    dump_state: bool = False
    """Log the engine's state when it is built."""
    prescale_gradients: bool = False
    """Divide gradients by gradient_predivide_factor before the reduction instead of by the number
    of ranks after it."""
    gradient_predivide_factor: Annotated[
        PositiveFloat, UsedWhen("deepspeed.prescale_gradients", (True,))
    ] = 1.0
    """See prescale_gradients."""
    disable_python_gc: bool = False
    """Run Python's garbage collector only between steps."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Top-level keys of DeepSpeed that have no field here, as DeepSpeed names them."""


def validate_sections(run: "Run") -> Iterator[Problem]:
    """Settings of DeepSpeed's sections that contradict the run."""
    deepspeed, steps = run.deepspeed, run.train.max_steps
    if deepspeed.prescale_gradients and run.zero.stage > 0:
        yield Problem(
            path="deepspeed.prescale_gradients",
            message=f"requires stage 0 (got stage {run.zero.stage})",
            hint="Set zero.stage=0, or remove it",
        )
    profiler = deepspeed.flops_profiler
    if profiler.enabled and steps is not None and profiler.profile_step >= steps:
        yield Problem(
            path="deepspeed.flops_profiler.profile_step",
            message=f"must be less than the run's {steps} steps (got {profiler.profile_step})",
            hint=f"Set it to at most {steps - 1}",
        )
    logger = deepspeed.comms_logger
    if logger.enabled and not logger.prof_all and not logger.prof_ops:
        yield Problem(
            path="deepspeed.comms_logger.prof_ops",
            message="is required with prof_all=false",
            hint="Name operations, or set deepspeed.comms_logger.prof_all=true",
        )
