"""Decide what a config leaves open, from the machine and the config: `Run` -> `ResolvedRun`.

The decisions are written into the snapshot, so that a run says what it was and not what it would be
elsewhere.
"""

import math
import os
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.fields import IsPath, parse_size, path_mark
from llama_pretrain.config.launch import Device, Launch
from llama_pretrain.config.optim import BatchScaling, Optim, OptimName
from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import (
    ResolvedCheckpoint,
    ResolvedLaunch,
    ResolvedRun,
    ResolvedTrain,
    ResolvedZero,
)
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.train import Train
from llama_pretrain.config.validate import flatten
from llama_pretrain.config.zero import OffloadDevice, Zero
from llama_pretrain.plan.batch import BatchPlan, solve_batch
from llama_pretrain.plan.kernels import choose_kernels
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.memory import estimate_memory
from llama_pretrain.plan.model_size import count_parameters
from llama_pretrain.plan.nodes import count_nodes, list_hosts
from llama_pretrain.plan.pretrained import read_shape

AnySection = TypeVar("AnySection", bound=Any)

DEFAULT_BATCH = 16
"""Sequences of a step when no batch size is given."""

ABSENT_GPU_BYTES = 80 << 30
"""Memory of a planned GPU that is not present, unless launch.device_memory is given."""

REASONS = {
    "launch.device": "chosen: cuda if torch has it and a GPU is present, or a cluster is planned",
    "launch.nodes": "chosen: the hosts, the allocation, or what the platform has set",
    "launch.num_processes": "chosen: one a GPU, two on a CPU",
    "launch.threads_per_process": "chosen: cores / ranks",
    "launch.bind_cores": "chosen: true if ranks use all cores",
    "launch.device_memory": "chosen: the GPU's, or a rank's share of the host's",
    "batch.global_batch_size": "chosen: 16 sequences, or the next multiple of the ranks",
    "precision.name": "chosen: bf16 if the device supports it natively",
    "checkpoint.asynchronous": "chosen: true if there are earlier saves and memory for the copy",
    "optim.name": "chosen: by offload, and for lion by device",
    "kernels.attention": "chosen: by device, precision and sequence length",
    "kernels.loss": "chosen: chunked, except for fp16 and autocast",
    "kernels.rms_norm": "chosen: by device",
    "kernels.rotary": "chosen: by device",
    "kernels.swiglu": "chosen: by device",
    "kernels.matmul": "chosen: by device and precision",
    "kernels.allocator": "chosen: keep on a CPU",
    "train.gradient_clipping": "chosen: 1.0, but 0 with Muon",
    "zero.reduce_scatter": "chosen: true, except for Muon at stage 3",
    "zero.reduce_bucket_size": "derived: hidden_size^2 at stage 3, else 5e8",
    "zero.stage3_prefetch_bucket_size": "derived: 0.9 * hidden_size^2",
    "zero.stage3_param_persistence_threshold": "derived: 10 * hidden_size",
    "zero.zero_hpz_partition_size": "chosen: the ranks of a node",
    "optim.learning_rate": "derived: optim.scale_by_batch of the global batch",
    "optim.muon_learning_rate": "derived: optim.scale_by_batch of the global batch",
    "train.max_tokens": "derived: train.tokens_per_parameter * parameters",
}
"""What decides a setting that was left open, or changes one by a rule; the sizes of `zero` are
those of transformers' integration."""


def resolve(run: Run, machine: Machine) -> ResolvedRun:
    """Decide everything that a run leaves open.

    Raises:
        UserError: if a pretrained model contradicts the config, or the batch does not divide.
    """
    launch = _resolve_launch(run, machine)
    run = with_absolute_paths(replace(run, launch=launch))
    if run.model.path is not None and not run.task.reads_a_run:
        run = replace(run, model=read_shape(run.model))
    run = replace(run, precision=replace(run.precision, name=_choose_precision(run, machine)))
    run = replace(run, optim=replace(run.optim, name=_choose_optimizer(run)))
    run = replace(run, kernels=choose_kernels(run, machine))
    if run.batch == Batch():
        groups = max(1, launch.num_processes * launch.nodes // launch.sequence_parallel_size)
        size = -(-DEFAULT_BATCH // groups) * groups
        run = replace(run, batch=replace(run.batch, global_batch_size=size))
    batch = _try_solve(run, launch)
    if batch is not None:
        run = replace(run, batch=Batch(**vars(batch)))
    run = replace(run, optim=_scale_learning_rates(run.optim, batch), train=_count_tokens(run))
    clipping = run.train.gradient_clipping
    if clipping is None:
        clipping = 0.0 if run.optim.name is OptimName.muon else 1.0
    values = {item.name: getattr(run, item.name) for item in fields(run)} | {
        "zero": resolve_zero(run.zero, run, num_processes=launch.num_processes),
        "train": ResolvedTrain(**{**vars(run.train), "gradient_clipping": clipping}),
        "checkpoint": ResolvedCheckpoint(
            **{**vars(run.checkpoint), "asynchronous": run.checkpoint.asynchronous is True}
        ),
    }
    resolved = ResolvedRun(**values)
    if run.checkpoint.asynchronous is None and _can_save_in_background(resolved, batch, machine):
        return _with_background_saves(resolved)
    return resolved


def with_nodes(run: ResolvedRun, nodes: int) -> ResolvedRun:
    """A run on another number of nodes: the same steps, if the global batch divides.

    The micro batch stays, or becomes the largest smaller one that divides.
    """
    launch = replace(run.launch, nodes=nodes)
    groups = nodes * launch.num_processes // launch.sequence_parallel_size
    share = (run.batch.global_batch_size or 0) // groups
    most = min(run.batch.micro_batch_size or 1, share)
    micro = next((size for size in range(most, 0, -1) if share % size == 0), 1)
    batch = replace(run.batch, micro_batch_size=micro, gradient_accumulation_steps=share // micro)
    return replace(run, launch=launch, batch=batch)


def _try_solve(run: Run, launch: ResolvedLaunch) -> BatchPlan | None:
    """The batch sizes; `None` if they do not divide, which the plan's rules report."""
    try:
        return solve_batch(
            run.batch,
            sequence_length=run.data.sequence_length,
            world_size=max(1, launch.num_processes * launch.nodes // launch.sequence_parallel_size),
        )
    except UserError:
        return None


def _with_background_saves(run: ResolvedRun) -> ResolvedRun:
    return replace(run, checkpoint=replace(run.checkpoint, asynchronous=True))


def _can_save_in_background(run: ResolvedRun, batch: BatchPlan | None, machine: Machine) -> bool:
    """Whether training continues after a checkpoint, with memory for a copy of its state."""
    if batch is None or not (run.task.trains or run.task is Task.plan):
        return False
    try:
        room = parse_size(run.launch.device_memory)
    except ValueError:  # the plan's rules report it
        return False
    if not _saves_before_the_end(run, batch):
        return False
    memory = estimate_memory(_with_background_saves(run), batch)
    if run.launch.device is Device.cuda:  # the memory of a cluster's hosts is unknown
        elsewhere = machine.num_gpus == 0
        return elsewhere or memory.host <= machine.memory_bytes // run.launch.num_processes
    return memory.total <= room


def _saves_before_the_end(run: ResolvedRun, batch: BatchPlan) -> bool:
    every = run.checkpoint.every_steps
    if every is None or run.checkpoint.every_minutes is not None:
        return run.checkpoint.every_minutes is not None
    tokens = every * batch.global_batch_size * run.data.sequence_length
    limits = ((run.train.max_steps, every), (run.train.max_tokens, tokens))
    return all(limit is None or saved < limit for limit, saved in limits)


def _scale_learning_rates(optim: Optim, batch: BatchPlan | None) -> Optim:
    """The optimizer with learning rates scaled by the batch.

    Raises:
        UserError: if the batch that they are given for is missing.
    """
    if optim.scale_by_batch is BatchScaling.none or batch is None:
        return optim
    if optim.reference_batch_size is None:
        message = f"is required by scale_by_batch={optim.scale_by_batch.value} (got null)"
        hint = "Set it to the batch that learning_rate is for: optim.reference_batch_size=16"
        raise UserError([Problem(path="optim.reference_batch_size", message=message, hint=hint)])
    factor = optim.scale_by_batch.factor(batch.global_batch_size / optim.reference_batch_size)
    muon = optim.name is OptimName.muon
    return replace(
        optim,
        learning_rate=optim.learning_rate * factor,
        muon_learning_rate=optim.muon_learning_rate * (factor if muon else 1.0),
        scale_by_batch=BatchScaling.none,
        reference_batch_size=None,
    )


def _count_tokens(run: Run) -> Train:
    """The section `train` with tokens_per_parameter turned into max_tokens."""
    train = run.train
    if train.tokens_per_parameter is None:
        return train
    tokens = math.ceil(train.tokens_per_parameter * count_parameters(run.model).total)
    shortest = tokens if train.max_tokens is None else min(tokens, train.max_tokens)
    return replace(train, max_tokens=shortest, tokens_per_parameter=None)


def describe_choices(before: Run, after: ResolvedRun) -> dict[str, str]:
    """What decided each setting that `resolve` has filled in or changed."""
    were, are = (dict(flatten(to_plain(run))) for run in (before, after))
    described = {path: text for path, text in REASONS.items() if were[path] != are[path]}
    sizes = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    rule = "derived: global = micro x accumulation x ranks"
    return {f"batch.{n}": rule for n in sizes if were[f"batch.{n}"] is None} | described


def resolve_zero(zero: Zero, run: Run, *, num_processes: int) -> ResolvedZero:
    """The section `zero` with everything that follows from stage, optimizer and width."""
    width, muon = run.model.hidden_size, run.optim.name is OptimName.muon
    derived = {
        "reduce_scatter": not (muon and zero.stage == 3),
        "reduce_bucket_size": width**2 if zero.stage == 3 else 500_000_000,
        "stage3_prefetch_bucket_size": 9 * width**2 // 10,
        "stage3_param_persistence_threshold": 10 * width,
        "zero_hpz_partition_size": num_processes,
    }
    given = {item.name: getattr(zero, item.name) for item in fields(Zero)}
    return ResolvedZero(**given | {k: v for k, v in derived.items() if given[k] is None})


def with_absolute_paths(section: AnySection) -> AnySection:
    """A run, or a section of one, that means the same files wherever its snapshot is read."""
    changed: dict[str, Any] = {}
    for item in fields(section):
        value, mark = getattr(section, item.name), path_mark(item)
        if is_dataclass(value):
            changed[item.name] = with_absolute_paths(value)
        elif mark is not None and isinstance(value, list):
            changed[item.name] = [_absolute(path, mark) for path in value]
        elif mark is not None and value is not None:
            changed[item.name] = _absolute(value, mark)
        elif isinstance(value, dict):
            changed[item.name] = {
                key: with_absolute_paths(inner) if is_dataclass(inner) else inner
                for key, inner in value.items()
            }
    return replace(section, **changed)


def _absolute(path: str, mark: IsPath) -> str:
    expanded = os.path.expanduser(path)
    if mark.must_exist and not os.path.isdir(expanded):
        return path
    return path if mark.keep_home and path.startswith("~") else os.path.abspath(expanded)


def _resolve_launch(run: Run, machine: Machine) -> ResolvedLaunch:
    launch = run.launch
    device, nodes = launch.device, _count_nodes(launch)
    if device is Device.auto:
        # Several nodes, and no GPU here: a cluster is planned from a laptop.
        elsewhere = run.task is Task.plan and nodes > 1
        device = Device.cuda if machine.num_gpus or elsewhere else Device.cpu
    processes = launch.num_processes
    if processes is None and launch.hostfile is not None and nodes > 1:
        processes = list_hosts(launch)[0].slots
    if processes is None:
        # On a CPU two ranks with half the cores each are faster than one (docs/log.md).
        processes = max(machine.num_gpus, 1) if device is Device.cuda else min(2, machine.cores)
    threads = launch.threads_per_process
    if threads is None:
        threads = max(1, machine.cores // processes)
    bind = launch.bind_cores
    if bind is None:
        whole = processes * threads == machine.cores
        bind = device is Device.cpu and processes > 1 and whole
    memory = launch.device_memory
    if memory is None:
        present = machine.memory_bytes // processes
        if device is Device.cuda:
            present = machine.gpu_memory_bytes or ABSENT_GPU_BYTES
        memory = f"{present / (1 << 30):.1f}GiB"
    given = {item.name: getattr(launch, item.name) for item in fields(Launch)}
    return ResolvedLaunch(
        **given
        | {
            "device": device,
            "nodes": nodes,
            "num_processes": processes,
            "threads_per_process": threads,
            "bind_cores": bind,
            "device_memory": memory,
        }
    )


def _count_nodes(launch: Launch) -> int:
    try:
        return count_nodes(launch)
    except UserError:  # the machine's rules report it
        return 1


def _choose_precision(run: Run, machine: Machine) -> PrecisionName:
    if run.precision.name is not PrecisionName.auto:
        return run.precision.name
    if run.precision.torch_autocast.enabled:
        return PrecisionName.fp32
    if run.launch.device is Device.cuda:
        native = machine.gpu_capability is None or machine.gpu_capability >= (8, 0)
    else:
        native = machine.cpu_bf16
    return PrecisionName.bf16 if native else PrecisionName.fp32


def _choose_optimizer(run: Run) -> OptimName:
    offloaded = run.zero.offload_optimizer.device is not OffloadDevice.none
    if run.optim.name is OptimName.adamw:
        # torch's has a fused kernel too and needs no compiler; DeepSpeed's FusedAdam failed to
        # compile on the first GPU machine that it was tried on (docs/gpu.md).
        return OptimName.cpu_adam if offloaded else OptimName.torch_adamw
    if run.optim.name is OptimName.lion:
        on_gpu = run.launch.device is Device.cuda
        return OptimName.cpu_lion if offloaded or not on_gpu else OptimName.fused_lion
    return run.optim.name
