"""What this machine cannot do of what a config asks: refused in the parent, with a way out."""

import importlib.util
from collections.abc import Iterator

from llama_pretrain.config.problems import Problem
from llama_pretrain.config.schema import (
    Device,
    OffloadDevice,
    OptimName,
    PrecisionName,
    Run,
    Task,
)
from llama_pretrain.plan.machine import Machine

COMPILED_OPTIMIZERS = (OptimName.cpu_adam, OptimName.fused_adam)


def check_machine(run: Run, machine: Machine) -> Iterator[Problem]:
    """Problems of a run, its choices resolved, on this machine."""
    launch, zero, precision = run.launch, run.zero, run.precision.name
    on_cpu = launch.device is Device.cpu
    assert launch.num_processes is not None
    if launch.nodes > 1:
        yield Problem(
            path="launch.nodes",
            message=f"several machines can be planned, not yet launched (got {launch.nodes})",
            hint="" if run.task is Task.plan else "add task=plan, or set launch.nodes=1",
        )
    if not on_cpu and launch.num_processes > machine.num_gpus:
        yield Problem(
            path="launch.num_processes",
            message=f"needs as many GPUs, and torch sees {machine.num_gpus} here"
            f" (got {launch.num_processes})",
            hint="set launch.device=cpu, or task=plan to plan for another machine"
            if machine.num_gpus == 0 and run.task is not Task.plan
            else f"set launch.num_processes={machine.num_gpus}"
            if machine.num_gpus
            else "",
        )
    if on_cpu and precision is PrecisionName.fp16:
        yield Problem(
            path="precision",
            message="DeepSpeed has no fp16 on a CPU (got fp16)",
            hint="add precision=bf16 or precision=fp32",
        )
    old_gpu = machine.gpu_capability is not None and machine.gpu_capability < (8, 0)
    if not on_cpu and old_gpu and precision is PrecisionName.bf16:
        yield Problem(
            path="precision",
            message=f"{machine.gpu_name} has no bf16 (got bf16)",
            hint="add precision=fp16",
        )
    needs_compiler = run.optim.name is OptimName.cpu_adam or (
        run.optim.name is OptimName.fused_adam and on_cpu
    )
    if needs_compiler and not machine.has_compiler:
        offloaded = zero.offload_optimizer.device is not OffloadDevice.none
        yield Problem(
            path="optim.name",
            message=f"{run.optim.name.value} is compiled at its first use, and there is no C++"
            " compiler with ninja here",
            hint="install g++ and ninja" + ("" if offloaded else ", or add optim=torch_adamw"),
        )
    devices = (zero.offload_optimizer.device, zero.offload_param.device)
    if OffloadDevice.nvme in devices and not machine.has_libaio:
        yield Problem(
            path="zero",
            message="offload to nvme needs libaio, which is not here",
            hint="install libaio-dev, or add zero=stage3_offload",
        )
    if OffloadDevice.nvme in devices and on_cpu:
        yield Problem(
            path="zero",
            message="offload to nvme moves state off a GPU, and this run has none",
            hint="add zero=stage3, or zero=stage3_offload",
        )
    if on_cpu and (zero.zero_quantized_weights or zero.zero_quantized_gradients):
        yield Problem(
            path="zero",
            message="ZeRO++ quantises with CUDA kernels, and this run is on a CPU",
            hint="add zero=stage3",
        )
    if on_cpu and run.deepspeed.hybrid_engine.enabled:
        yield Problem(
            path="deepspeed.hybrid_engine.enabled",
            message="the hybrid engine generates with CUDA kernels, and this run is on a CPU",
            hint="set it to false",
        )
    if run.monitor.wandb and importlib.util.find_spec("wandb") is None:
        yield Problem(
            path="monitor.wandb",
            message="the package wandb is not installed",
            hint="pip install 'llama-pretrain[wandb]', or add monitor=tensorboard",
        )


def check_scale(run: Run) -> Iterator[Problem]:
    """Rules that need the number of ranks."""
    assert run.launch.num_processes is not None
    world_size = run.launch.num_processes * run.launch.nodes
    group = run.zero.zero_hpz_partition_size
    if group is not None and world_size % group:
        yield Problem(
            path="zero.zero_hpz_partition_size",
            message=f"does not divide the {world_size} ranks (got {group})",
            hint="set it to the ranks of a machine",
        )
