"""What this machine cannot do of what a config asks: refused in the parent, with a way out."""

import importlib.util
import math
from collections.abc import Iterator

from llama_pretrain.config.launch import Device
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.precision import AutocastDtype, PrecisionName
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.run import Run
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.plan.batch import count_ranks
from llama_pretrain.plan.kernels import check_kernels
from llama_pretrain.plan.machine import Machine

CPU_OPERATORS = (
    OptimName.cpu_adam,
    OptimName.cpu_lion,
    OptimName.cpu_adagrad,
    OptimName.fused_adam,
)
"""Optimizers whose kernel is compiled on a CPU."""

CUDA_OPTIMIZERS = (OptimName.fused_lion, OptimName.lamb)
"""Optimizers that have no kernel for a CPU."""


def check_machine(run: Run, machine: Machine) -> Iterator[Problem]:
    """Problems of a run, its choices resolved, on this machine."""
    for rule in (
        _check_processes,
        _check_numbers,
        validate_optim,
        _check_disk,
        _check_cuda_features,
        _check_packages,
        check_kernels,
    ):
        yield from rule(run, machine)
    if run.task is not Task.plan:
        yield from _check_untrained(run)


def _check_processes(run: Run, machine: Machine) -> Iterator[Problem]:
    launch, gpus = run.launch, machine.num_gpus
    assert launch.num_processes is not None
    if launch.nodes > 1:
        yield Problem(
            path="launch.nodes",
            message=f"several machines can be planned, not yet launched (got {launch.nodes})",
            hint="" if run.task is Task.plan else "add task=plan, or set launch.nodes=1",
        )
    if launch.device is Device.cuda and launch.num_processes > gpus:
        hint = f"set launch.num_processes={gpus}" if gpus else ""
        if not gpus and run.task is not Task.plan:
            hint = "set launch.device=cpu, or task=plan to plan for another machine"
        yield Problem(
            path="launch.num_processes",
            message=f"needs as many GPUs, and torch sees {gpus} here (got {launch.num_processes})",
            hint=hint,
        )


def _check_numbers(run: Run, machine: Machine) -> Iterator[Problem]:
    """Number formats that the device lacks."""
    on_cpu, precision = run.launch.device is Device.cpu, run.precision
    if on_cpu and precision.name is PrecisionName.fp16:
        yield Problem(
            path="precision",
            message="DeepSpeed has no fp16 on a CPU (got fp16)",
            hint="add precision=bf16 or precision=fp32",
        )
    old_gpu = machine.gpu_capability is not None and machine.gpu_capability < (8, 0)
    autocast = precision.torch_autocast
    casts = autocast.enabled and autocast.dtype is AutocastDtype.bfloat16
    if not on_cpu and old_gpu and (precision.name is PrecisionName.bf16 or casts):
        yield Problem(
            path="precision",
            message=f"{machine.gpu_name} has no bf16"
            f" (got bf16{'' if precision.name is PrecisionName.bf16 else ' in autocast'})",
            hint="add precision=fp16",
        )


def validate_optim(run: Run, machine: Machine) -> Iterator[Problem]:
    """Where the optimizer's kernel runs, and whether it can be compiled."""
    on_cpu, name = run.launch.device is Device.cpu, run.optim.name
    offloaded = run.zero.offload_optimizer.device is not OffloadDevice.none
    compiled = name in CPU_OPERATORS and (on_cpu or name is not OptimName.fused_adam)
    if compiled and not machine.has_compiler:
        other = "set zero.offload_optimizer.device=none" if offloaded else "add optim=torch_adamw"
        yield Problem(
            path="optim.name",
            message=f"{name.value} is compiled at its first use, and there is no C++ compiler with"
            " ninja here",
            hint=f"install g++ and ninja, or {other}",
        )
    if not on_cpu and name.value.startswith("cpu_") and not offloaded:
        yield Problem(
            path="optim.name",
            message=f"{name.value} updates state in host memory, and this run keeps it on the GPU",
            hint="add zero=stage2_offload, or optim=adamw",
        )
    if on_cpu and name in CUDA_OPTIMIZERS:
        other = "cpu_lion" if name is OptimName.fused_lion else "torch_adamw"
        yield Problem(
            path="optim.name",
            message=f"{name.value} is a CUDA kernel, and this run is on a CPU",
            hint=f"add optim={other}",
        )


def _check_disk(run: Run, machine: Machine) -> Iterator[Problem]:
    zero = run.zero
    if OffloadDevice.nvme not in (zero.offload_optimizer.device, zero.offload_param.device):
        return
    if run.launch.device is Device.cpu:
        yield Problem(
            path="zero",
            message="offload to nvme moves state off a GPU, and this run has none",
            hint="add zero=stage3, or zero=stage3_offload",
        )
    elif not machine.has_libaio:
        yield Problem(
            path="zero",
            message="offload to nvme needs libaio, which is not here",
            hint="install libaio-dev, or add zero=stage3_offload",
        )


def _check_packages(run: Run, _machine: Machine) -> Iterator[Problem]:
    packages = {
        "monitor.wandb": (run.monitor.wandb, "wandb"),
        "deepspeed.wandb.enabled": (run.deepspeed.wandb.enabled, "wandb"),
        "deepspeed.comet.enabled": (run.deepspeed.comet.enabled, "comet_ml"),
    }
    for path, (wanted, package) in packages.items():
        if wanted and importlib.util.find_spec(package) is None:
            install = "'llama-pretrain[wandb]'" if package == "wandb" else package
            yield Problem(
                path=path,
                message=f"the package {package} is not installed",
                hint=f"pip install {install}, or set {path}=false",
            )


def _check_cuda_features(run: Run, _machine: Machine) -> Iterator[Problem]:
    if run.launch.device is Device.cpu:
        for path, needs, hint in _cuda_features(run):
            yield Problem(path=path, message=f"{needs}, and this run is on a CPU", hint=hint)


def _cuda_features(run: Run) -> Iterator[tuple[str, str, str]]:
    """What a run asks for that needs CUDA: path, need, way out."""
    zero, deepspeed = run.zero, run.deepspeed
    if zero.zero_quantized_weights or zero.zero_quantized_gradients:
        yield "zero", "ZeRO++ quantises with CUDA kernels", "add zero=stage3"
    if zero.offload_optimizer.super_offload:
        yield (
            "zero.offload_optimizer.super_offload",
            "SuperOffload is for superchips with a GPU",
            "add zero=stage3_offload",
        )
    leaves = {
        "zero.stage3_module_granularity_threshold": zero.stage3_module_granularity_threshold > 0,
        "zero.extra.leaf_module": "leaf_module" in zero.extra,
    }
    for path, wanted in leaves.items():
        if wanted:  # a step fails: "unknown parameter type"
            needs = "DeepSpeed frees the gradients of modules that are fetched as one through CUDA"
            yield path, needs, "leave it out"
    if deepspeed.hybrid_engine.enabled:
        yield (
            "deepspeed.hybrid_engine.enabled",
            "the hybrid engine generates with CUDA kernels",
            "set it to false",
        )
    if deepspeed.compile.deepcompile:
        yield "deepspeed.compile.deepcompile", "DeepCompile needs CUDA", "set it to false"
    if deepspeed.activation_checkpointing.cpu_checkpointing:
        yield (
            "deepspeed.activation_checkpointing.cpu_checkpointing",
            "activations are moved off a GPU",
            "set it to false",
        )


def _check_untrained(run: Run) -> Iterator[Problem]:
    """What can be planned and not yet trained."""
    deepspeed = run.deepspeed
    for path, value in (
        ("deepspeed.tensor_parallel.autotp_size", deepspeed.tensor_parallel.autotp_size),
        ("deepspeed.sequence_parallel_size", deepspeed.sequence_parallel_size),
    ):
        if value > 1:
            yield Problem(
                path=path,
                message=f"can be planned, not yet trained (got {value})",
                hint="add task=plan, or set it to 1",
            )
    if deepspeed.compile.deepcompile and run.launch.device is Device.cuda:
        yield Problem(
            path="deepspeed.compile.deepcompile",
            message="can be planned, not yet trained (got true)",
            hint="add task=plan, or leave it out",
        )


def check_scale(run: Run) -> Iterator[Problem]:
    """Rules that need the number of ranks."""
    world_size, model = count_ranks(run), run.model
    assert run.launch.num_processes is not None
    group = run.zero.zero_hpz_partition_size
    if group is not None and run.zero.stage == 3 and world_size % group:
        yield Problem(
            path="zero.zero_hpz_partition_size",
            message=f"does not divide the {world_size} ranks (got {group})",
            hint=f"set it to {run.launch.num_processes}, the ranks of a machine",
        )
    tensor = run.deepspeed.tensor_parallel.autotp_size
    sequence = run.deepspeed.sequence_parallel_size
    keys = model.num_key_value_heads or model.num_attention_heads
    shared: tuple[tuple[str, int, dict[str, int]], ...] = (
        (
            "deepspeed.tensor_parallel.autotp_size",
            tensor,
            {"ranks": world_size, "key and value heads": keys},
        ),
        (
            "deepspeed.sequence_parallel_size",
            sequence,
            {
                "ranks": max(1, world_size // tensor),
                "tokens of a row": run.data.sequence_length,
                "query heads": model.num_attention_heads,
            },
        ),
        (
            "deepspeed.hybrid_engine.inference_tp_size",
            run.deepspeed.hybrid_engine.inference_tp_size,
            {"ranks": world_size},
        ),
    )
    for path, size, numbers in shared:
        undivided = [f"the {number} {what}" for what, number in numbers.items() if number % size]
        if undivided:
            common = math.gcd(*numbers.values())
            fits = [str(n) for n in range(1, common + 1) if common % n == 0]
            yield Problem(
                path=path,
                message=f"does not divide {' or '.join(undivided)} (got {size})",
                hint=f"set it to {' or '.join(fits)}",
            )
