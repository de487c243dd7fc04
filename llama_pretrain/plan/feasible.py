"""What this machine cannot do of what a config requests, with a way out for each."""

import importlib.util
import math
from collections.abc import Iterator

from llama_pretrain.config.kernels import CompiledPart
from llama_pretrain.config.launch import Device, Launcher
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.precision import AutocastDtype, PrecisionName
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.plan.kernels import validate_kernels
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.nodes import validate_nodes

COMPILED_ON_CPU = (
    OptimName.cpu_adam,
    OptimName.cpu_lion,
    OptimName.cpu_adagrad,
    OptimName.fused_adam,
)
"""Optimizers whose kernel is compiled on a CPU."""

CUDA_ONLY = (OptimName.fused_lion, OptimName.lamb)
"""Optimizers that have no kernel for a CPU."""


def validate_machine(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    """Problems of a run on this machine."""
    yield from _validate_processes(run, machine)
    yield from _validate_precision(run, machine)
    yield from _validate_optimizer(run, machine)
    yield from _validate_nvme(run, machine)
    yield from _validate_cuda_features(run)
    if run.monitor.wandb and importlib.util.find_spec("wandb") is None:
        yield Problem(
            path="monitor.wandb",
            message="requires the package wandb, which is not installed",
            hint="Run pip install 'llama-pretrain[wandb]', or set monitor.wandb=false",
        )
    yield from validate_kernels(run, machine)


def _validate_processes(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    launch, gpus = run.launch, machine.num_gpus
    yield from validate_nodes(run.launch)
    if launch.nodes > 1 and launch.name is Launcher.local:
        yield Problem(
            path="launch.nodes",
            message="launch=local starts ranks on this machine only; ssh, slurm and torchrun reach"
            f" others (got {launch.nodes})",
            hint="Add task=plan, or set launch.nodes=1",
        )
    elif launch.nodes > 1 and run.task not in (Task.pretrain, Task.probe, Task.plan):
        yield Problem(
            path="launch.nodes",
            message=f"task={run.task.value} runs on one node (got {launch.nodes})",
            hint="Add launch=local launch.nodes=1",
        )
    yield from _validate_min_nodes(run)
    if launch.device is Device.cuda and launch.num_processes > gpus:
        hint = f"Set launch.num_processes={gpus}" if gpus else ""
        if not gpus and run.task is not Task.plan:
            hint = "Set launch.device=cpu, or task=plan to plan for another machine"
        yield Problem(
            path="launch.num_processes",
            message=f"requires as many GPUs, but torch sees {gpus} here"
            f" (got {launch.num_processes})",
            hint=hint,
        )


def _validate_min_nodes(run: ResolvedRun) -> Iterator[Problem]:
    """Whether a run can go on with every number of nodes that `launch.min_nodes` allows."""
    launch, size = run.launch, run.batch.global_batch_size
    if launch.min_nodes is None or size is None:
        return
    path = "launch.min_nodes"
    if launch.min_nodes > launch.nodes:
        message = f"must be at most the number of nodes, {launch.nodes} (got {launch.min_nodes})"
        yield Problem(path=path, message=message)
    elif not launch.max_restarts:
        message = f"has no effect without restarts (got {launch.min_nodes})"
        yield Problem(path=path, message=message, hint="Add launch.max_restarts=3")
    counts = range(launch.min_nodes, launch.nodes + 1)
    sharing = launch.sequence_parallel_size
    if uneven := [count for count in counts if count * launch.num_processes % sharing]:
        ranks = f"{uneven[0]} x {launch.num_processes} ranks"
        message = f"{ranks}, with which the run would go on after a loss, form no groups of"
        message += f" launch.sequence_parallel_size={sharing} (got {launch.min_nodes})"
        yield Problem(path=path, message=message)
        return
    groups = {count: count * launch.num_processes // sharing for count in counts}
    odd = [count for count, number in groups.items() if size % number]
    if odd:
        unit = math.lcm(*groups.values())
        sizes = [number * unit for number in (size // unit, size // unit + 1) if number]
        worlds = f"{odd[0]} x {launch.num_processes} ranks"
        most = next(count for count in counts if count > odd[-1] or count == launch.nodes)
        yield Problem(
            path=path,
            message=f"the global batch of {size} is no multiple of {worlds}, with which the run"
            f" would go on after a loss (got {launch.min_nodes})",
            hint=f"Set batch.global_batch_size={' or '.join(map(str, sizes))}, or {path}={most}",
        )


def _validate_precision(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    on_cpu, precision = run.launch.device is Device.cpu, run.precision
    if on_cpu and precision.name is PrecisionName.fp16:
        yield Problem(
            path="precision",
            message="fp16 is not supported by DeepSpeed on a CPU",
            hint="Add precision=bf16 or precision=fp32",
        )
    old_gpu = machine.gpu_capability is not None and machine.gpu_capability < (8, 0)
    autocast = precision.torch_autocast
    casts = autocast.enabled and autocast.dtype is AutocastDtype.bfloat16
    if not on_cpu and old_gpu and (precision.name is PrecisionName.bf16 or casts):
        yield Problem(
            path="precision",
            message=f"bf16 is not supported by {machine.gpu_name}"
            f"{'' if precision.name is PrecisionName.bf16 else ' (got bf16 in autocast)'}",
            hint="Add precision=fp16",
        )


def _validate_optimizer(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    """Where the optimizer's kernel runs, and whether it can be compiled."""
    on_cpu, name = run.launch.device is Device.cpu, run.optim.name
    offloaded = run.zero.offload_optimizer.device is not OffloadDevice.none
    compiled = name in COMPILED_ON_CPU and (on_cpu or name is not OptimName.fused_adam)
    if compiled and not machine.has_compiler:
        other = "set zero.offload_optimizer.device=none" if offloaded else "add optim=torch_adamw"
        yield Problem(
            path="optim.name",
            message=f"{name.value} is compiled at its first use, but there is no C++ compiler with"
            " ninja here",
            hint=f"Install g++ and ninja, or {other}",
        )
    if not on_cpu and name.value.startswith("cpu_") and not offloaded:
        yield Problem(
            path="optim.name",
            message=f"{name.value} updates state in host memory, but this run's is on the GPU",
            hint="Add zero=stage2_offload, or optim=adamw",
        )
    if on_cpu and name in CUDA_ONLY:
        other = "cpu_lion" if name is OptimName.fused_lion else "torch_adamw"
        yield Problem(
            path="optim.name",
            message=f"{name.value} is a CUDA kernel, but this run is on a CPU",
            hint=f"Add optim={other}",
        )


def _validate_nvme(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    zero = run.zero
    if OffloadDevice.nvme not in (zero.offload_optimizer.device, zero.offload_param.device):
        return
    if run.launch.device is Device.cpu:
        yield Problem(
            path="zero",
            message="offload to nvme requires a GPU, but this run is on a CPU",
            hint="Add zero=stage3, or zero=stage3_offload",
        )
    elif not machine.has_libaio:
        yield Problem(
            path="zero",
            message="offload to nvme requires libaio, which is not installed",
            hint="Install libaio-dev, or add zero=stage3_offload",
        )


def _validate_cuda_features(run: ResolvedRun) -> Iterator[Problem]:
    """What a run requests that needs CUDA."""
    zero, deepspeed = run.zero, run.deepspeed
    features = (
        (
            "zero",
            zero.zero_quantized_weights or zero.zero_quantized_gradients,
            "ZeRO++ quantization",
            "Add zero=stage3",
        ),
        (
            "zero.offload_optimizer.super_offload",
            zero.offload_optimizer.super_offload,
            "SuperOffload",
            "Add zero=stage3_offload",
        ),
        # DeepSpeed frees the gradients of such modules through CUDA: a step would fail.
        (
            "zero.stage3_module_granularity_threshold",
            zero.stage3_module_granularity_threshold > 0,
            "fetching modules as one",
            "Remove it",
        ),
        (
            "zero.extra.leaf_module",
            "leaf_module" in zero.extra,
            "fetching modules as one",
            "Remove it",
        ),
        (
            "deepspeed.hybrid_engine.enabled",
            deepspeed.hybrid_engine.enabled,
            "the hybrid engine",
            "Set it to false",
        ),
        (
            "deepspeed.activation_checkpointing.cpu_checkpointing",
            deepspeed.activation_checkpointing.cpu_checkpointing,
            "activation offload",
            "Set it to false",
        ),
    )
    for path, wanted, feature, hint in features:
        if wanted and run.launch.device is Device.cpu:
            message = f"{feature} requires CUDA, but this run is on a CPU"
            yield Problem(path=path, message=message, hint=hint)


def validate_world_size(run: ResolvedRun) -> Iterator[Problem]:
    """Rules that need the number of ranks."""
    world_size = run.num_ranks
    group = run.zero.zero_hpz_partition_size
    if run.zero.stage == 3 and world_size % group:
        yield Problem(
            path="zero.zero_hpz_partition_size",
            message=f"must divide the {world_size} ranks (got {group})",
            hint=f"Set it to {run.launch.num_processes}, the ranks of a node",
        )
    elif run.zero.stage == 3 and run.launch.nodes > 1 and run.launch.num_processes % group:
        yield Problem(
            path="zero.zero_hpz_partition_size",
            message=f"must divide the {run.launch.num_processes} ranks of a node: a second copy of"
            f" the weights that spans nodes saves no traffic between them (got {group})",
            hint=f"Set it to {_divisors(run.launch.num_processes)}",
        )
    size = run.deepspeed.hybrid_engine.inference_tp_size
    if world_size % size:
        yield Problem(
            path="deepspeed.hybrid_engine.inference_tp_size",
            message=f"must divide the {world_size} ranks (got {size})",
            hint=f"Set it to {_divisors(world_size)}",
        )
    if run.launch.sequence_parallel_size > 1 and not run.task.reads_a_run:
        yield from _validate_sequence_parallel(run)


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _validate_sequence_parallel(run: ResolvedRun) -> Iterator[Problem]:
    """Whether ranks can share sequences: their tokens, and the heads of attention."""
    path, size = "launch.sequence_parallel_size", run.launch.sequence_parallel_size
    heads = run.model.num_attention_heads
    key_heads = run.model.num_key_value_heads or heads
    lengths = {stage.sequence_length or run.data.sequence_length for stage in run.data.stages}
    if run.num_ranks % size:
        message = f"must divide the {run.num_ranks} ranks (got {size})"
        yield Problem(path=path, message=message, hint=f"Set it to {_divisors(run.num_ranks)}")
    if heads % size:
        message = f"must divide model.num_attention_heads={heads} (got {size})"
        yield Problem(path=path, message=message, hint=f"Set it to {_divisors(heads)}")
    elif key_heads % size and size % key_heads:
        message = f"must divide model.num_key_value_heads={key_heads}, or be a multiple of it"
        hint = f"Set it to {_divisors(key_heads)}"
        yield Problem(path=path, message=f"{message} (got {size})", hint=hint)
    for length in sorted(lengths | {run.data.sequence_length}):
        if length % size:
            longer = length + size - length % size
            message = f"must divide the sequence length, {length} (got {size})"
            hint = f"Set data.sequence_length={longer}, for example"
            yield Problem(path=path, message=message, hint=hint)
    if run.kernels.compile is not CompiledPart.none:
        message = "is not supported with compiled parts"
        yield Problem(path=path, message=message, hint="Set kernels.compile=none")
