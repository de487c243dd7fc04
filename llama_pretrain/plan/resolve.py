"""What a config leaves open and the machine decides: device, ranks, precision, optimizer.

The choices are written into the snapshot, so that a run says what it was and not what it would be
elsewhere.
"""

import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.launch import Device, Launch
from llama_pretrain.config.model import Model, RopeParameters, RopeType
from llama_pretrain.config.optim import BatchScaling, Optim, OptimName
from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.train import Train
from llama_pretrain.config.validate import flatten
from llama_pretrain.config.zero import OffloadDevice, Zero
from llama_pretrain.plan.batch import BatchPlan, count_ranks, count_replicas, solve_batch
from llama_pretrain.plan.kernels import choose_kernels
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.memory import estimate_memory
from llama_pretrain.plan.model_size import count_parameters

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


DEFAULT_ROWS = 16
"""Rows of a step where nothing is said of the batch."""


GPU_BYTES = 80 << 30
"""Memory of a GPU that isn't here, where nothing is said of it."""


LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
"""What transformers' LlamaConfig takes where config.json is silent, and our Model does not."""


CHOSEN = {
    "launch.device": "chosen: cuda where torch and a GPU are there, or a cluster is planned",
    "launch.num_processes": "chosen: one a GPU, two on a CPU",
    "launch.threads_per_process": "chosen: cores / ranks",
    "launch.bind_cores": "chosen: where ranks take all cores",
    "launch.device_memory": "chosen: the GPU's, or a rank's share of the host's",
    "batch.global_batch_size": "chosen: 16 rows, or the next number that the ranks divide",
    "precision.name": "chosen: bf16 where the device computes in it natively",
    "checkpoint.asynchronous": "chosen: where there are saves in between, and room for the copy",
    "optim.name": "chosen: for the offload, and for lion the device",
    "kernels.attention": "chosen: for the device, the precision and the row",
    "kernels.loss": "chosen: chunked, but for fp16 and autocast",
    "kernels.rms_norm": "chosen: for the device",
    "kernels.rotary": "chosen: for the device",
    "kernels.swiglu": "chosen: for the device",
    "kernels.matmul": "chosen: for the device and the precision",
    "kernels.allocator": "chosen: keep on a CPU",
    "train.gradient_clipping": "chosen: 1.0, but 0 with Muon",
    "zero.reduce_scatter": "chosen: true, but for Muon at stage 3",
    "zero.reduce_bucket_size": "derived: hidden_size^2 at stage 3, else 5e8",
    "zero.stage3_prefetch_bucket_size": "derived: 0.9 * hidden_size^2",
    "zero.stage3_param_persistence_threshold": "derived: 10 * hidden_size",
    "zero.zero_hpz_partition_size": "chosen: the ranks of a machine",
}
"""What decides a setting that was left open; the sizes are those of transformers' integration."""


RULED = {
    "optim.learning_rate": "derived: optim.scale_by_batch of the global batch",
    "optim.muon_learning_rate": "derived: optim.scale_by_batch of the global batch",
    "train.max_tokens": "derived: train.tokens_per_parameter * parameters",
}
"""Settings that were given, and that a rule has changed."""


def resolve_choices(run: Run, machine: Machine) -> Run:
    """Replace every choice by what was chosen.

    Raises:
        UserError: if a pretrained model isn't there or contradicts the config.
    """
    run = replace(
        run,
        launch=_resolve_launch(run, machine),
        # Absolute, so that the snapshot means the same files wherever it is read.
        data=replace(run.data, paths=[_absolute(path) for path in run.data.paths]),
        tokenizer=replace(
            run.tokenizer,
            path=None if run.tokenizer.path is None else _absolute(run.tokenizer.path),
        ),
        model=_read_pretrained(run.model) if _starts_from(run) else run.model,
    )
    run = replace(
        run,
        precision=replace(run.precision, name=_choose_precision(run, machine)),
        optim=replace(run.optim, name=_choose_optimizer(run)),
    )
    run = replace(run, kernels=choose_kernels(run, machine))
    clipping = run.train.gradient_clipping
    if clipping is None:
        clipping = 0.0 if run.optim.name is OptimName.muon else 1.0
    train = replace(run.train, gradient_clipping=clipping)
    batch = run.batch
    if batch == Batch():
        replicas = count_replicas(run)  # as many rows each: nobody asked for a size
        batch = replace(batch, global_batch_size=-(-DEFAULT_ROWS // replicas) * replicas)
    run = replace(run, train=train, batch=batch, zero=resolve_zero(run))
    run = replace(run, optim=_scale_rates(run), train=_count_tokens(run))
    if run.checkpoint.asynchronous is not None:
        return run
    return _set_saving(run, asynchronous=_can_save_beside(run, machine))


def _set_saving(run: Run, *, asynchronous: bool) -> Run:
    return replace(run, checkpoint=replace(run.checkpoint, asynchronous=asynchronous))


def _can_save_beside(run: Run, machine: Machine) -> bool:
    """Whether a checkpoint has training to go on beside, and memory for its copy."""
    if not (run.task.trains or run.task is Task.plan):
        return False
    try:
        batch = solve_batch(
            run.batch, sequence_length=run.data.sequence_length, replicas=count_replicas(run)
        )
        room = parse_size(str(run.launch.device_memory))
    except (UserError, ValueError):  # told by the checks
        return False
    if not _saves_before_the_end(run, batch):
        return False
    copied = _set_saving(run, asynchronous=True)
    memory = estimate_memory(copied, batch, world_size=count_ranks(run))
    assert run.launch.num_processes is not None
    if run.launch.device is Device.cuda:  # of a cluster's hosts nothing is known
        elsewhere = machine.num_gpus == 0
        return elsewhere or memory.host <= machine.memory_bytes // run.launch.num_processes
    return memory.total <= room


def _saves_before_the_end(run: Run, batch: BatchPlan) -> bool:
    every = run.checkpoint.every_steps
    if every is None or run.checkpoint.every_minutes is not None:
        return run.checkpoint.every_minutes is not None
    tokens = every * batch.global_batch_size * run.data.sequence_length
    limits = ((run.train.max_steps, every), (run.train.max_tokens, tokens))
    return all(limit is None or saved < limit for limit, saved in limits)


def _scale_rates(run: Run) -> Optim:
    """The optimizer with the learning rates that the batch asks for.

    Raises:
        UserError: if it isn't said which batch they are given for.
    """
    optim = run.optim
    if optim.scale_by_batch is BatchScaling.none:
        return replace(optim, scale_from_rows=None)
    if optim.scale_from_rows is None:
        message = "scale_by_batch needs the batch that learning_rate is for (got null)"
        hint = "set it to rows of a step: optim.scale_from_rows=16, say"
        raise UserError([Problem(path="optim.scale_from_rows", message=message, hint=hint)])
    batch = solve_batch(
        run.batch, sequence_length=run.data.sequence_length, replicas=count_replicas(run)
    )
    factor = optim.scale_by_batch.factor(batch.global_batch_size / optim.scale_from_rows)
    return replace(
        optim,
        learning_rate=optim.learning_rate * factor,
        muon_learning_rate=optim.muon_learning_rate
        * (factor if optim.name is OptimName.muon else 1.0),
        scale_by_batch=BatchScaling.none,
        scale_from_rows=None,
    )


def _count_tokens(run: Run) -> Train:
    """The section `train` with a length in tokens for one in tokens a parameter."""
    train = run.train
    if train.tokens_per_parameter is None:
        return train
    tokens = math.ceil(train.tokens_per_parameter * count_parameters(run.model).total)
    shortest = tokens if train.max_tokens is None else min(tokens, train.max_tokens)
    return replace(train, max_tokens=shortest, tokens_per_parameter=None)


def describe_choices(before: Run, after: Run) -> dict[str, str]:
    """What decided each setting that `resolve_choices` has filled in."""
    were, are = (dict(flatten(to_plain(run))) for run in (before, after))
    described = {path: text for path, text in (CHOSEN | RULED).items() if were[path] != are[path]}
    sizes = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    triangle = "derived: global = micro x accumulation x ranks"
    return {f"batch.{n}": triangle for n in sizes if are[f"batch.{n}"] is None} | described


def resolve_zero(run: Run) -> Zero:
    """The section `zero`, with what follows from the stage and the model's width."""
    zero, width = run.zero, run.model.hidden_size
    if zero.stage == 0:
        return zero
    muon = run.optim.name is OptimName.muon
    changes: dict[str, Any] = {}
    if zero.reduce_scatter is None:
        changes["reduce_scatter"] = not (muon and zero.stage == 3)
    if zero.reduce_bucket_size is None:
        changes["reduce_bucket_size"] = width**2 if zero.stage == 3 else 500_000_000
    if zero.stage == 3:
        if zero.stage3_prefetch_bucket_size is None:
            changes["stage3_prefetch_bucket_size"] = 9 * width**2 // 10
        if zero.stage3_param_persistence_threshold is None:
            changes["stage3_param_persistence_threshold"] = 10 * width
        if zero.zero_hpz_partition_size is None:
            changes["zero_hpz_partition_size"] = run.launch.num_processes
    return replace(zero, **changes)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _resolve_launch(run: Run, machine: Machine) -> Launch:
    launch = run.launch
    device = launch.device
    if device is Device.auto:
        # Several machines, and no GPU here: a cluster is planned from a laptop.
        elsewhere = run.task is Task.plan and launch.nodes > 1
        device = Device.cuda if machine.num_gpus or elsewhere else Device.cpu
    processes = launch.num_processes
    if processes is None:
        # On a CPU two ranks of half the cores beat one rank of all (docs/log.md).
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
        there = machine.memory_bytes // processes
        if device is Device.cuda:
            there = machine.gpu_memory_bytes or GPU_BYTES
        memory = f"{there / (1 << 30):.1f}GiB"
    return replace(
        launch,
        device=device,
        num_processes=processes,
        threads_per_process=threads,
        bind_cores=bind,
        device_memory=memory,
    )


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
        # torch's has a fused kernel too, and needs no compiler: DeepSpeed's has failed to compile
        # on the first machine with a GPU that it was tried on (docs/gpu.md).
        return OptimName.cpu_adam if offloaded else OptimName.torch_adamw
    if run.optim.name is OptimName.lion:
        on_gpu = run.launch.device is Device.cuda
        return OptimName.cpu_lion if offloaded or not on_gpu else OptimName.fused_lion
    return run.optim.name


def _starts_from(run: Run) -> bool:
    """Whether a run reads a pretrained model; a task about a finished one needs it no more."""
    return run.model.path is not None and not run.task.reads_a_run


def _read_pretrained(model: Model) -> Model:
    """The shape of a Hugging Face model or of one of our checkpoints, from its config.json."""
    assert model.path is not None
    folder = Path(model.path).expanduser().resolve()
    config_file = folder / "config.json"
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{config_file} can't be read: {error}"
        raise UserError([Problem(path="model.path", message=message)]) from error
    values = LLAMA_DEFAULTS | values
    if values.get("model_type") != "llama":
        message = f"is not a LLaMA (model_type {values.get('model_type')!r} in {config_file})"
        raise UserError([Problem(path="model.path", message=message)])
    if values["hidden_act"] != "silu":
        message = f"only hidden_act silu is supported (got {values['hidden_act']} in {config_file})"
        raise UserError([Problem(path="model.path", message=message)])
    default = Model()
    given: dict[str, Any] = {name: values[name] for name in SHAPE if values.get(name) is not None}
    problems = [
        Problem(
            path=f"model.{name}",
            message=f"is {value} in {config_file} (got {getattr(model, name)})",
            hint="leave it out: a pretrained model has its own shape",
        )
        for name, value in given.items()
        if getattr(model, name) not in (getattr(default, name), value)
    ]
    if model.rope_parameters != default.rope_parameters:
        message = f"is what {config_file} says"
        hint = "leave it out: a pretrained model has its own"
        problems.append(Problem(path="model.rope_parameters", message=message, hint=hint))
    if problems:
        raise UserError(problems)
    rope_values = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if values.get("rope_theta") is not None:  # as transformers 4 wrote it
        rope_values.setdefault("rope_theta", values["rope_theta"])
    rope_type = rope_values.pop("rope_type", rope_values.pop("type", "default"))
    if rope_type not in [option.value for option in RopeType]:
        message = f"rope_type {rope_type!r} in {config_file} is not supported"
        raise UserError([Problem(path="model.path", message=message)])
    known = {item.name for item in fields(RopeParameters)}
    rope = {key: value for key, value in rope_values.items() if key in known}
    return replace(
        model,
        path=str(folder),
        rope_parameters=RopeParameters(rope_type=RopeType(rope_type), **rope),
        **given,
    )
