"""What a config leaves open and the machine decides: device, ranks, precision, optimizer.

The choices are written into the snapshot, so that a run says what it was and not what it would be
elsewhere.
"""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.schema import (
    Device,
    Launch,
    Model,
    OffloadDevice,
    OptimName,
    PrecisionName,
    RopeParameters,
    RopeType,
    Run,
)
from llama_pretrain.plan.machine import Machine

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

LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
"""What transformers' LlamaConfig takes where config.json is silent, and our Model does not."""


def resolve_choices(run: Run, machine: Machine) -> Run:
    """Replace every choice by what was chosen.

    Raises:
        UserError: if a pretrained model isn't there or contradicts the config.
    """
    launch = _resolve_launch(run.launch, machine)
    return replace(
        run,
        launch=launch,
        # Absolute, so that the snapshot means the same files wherever it is read.
        data=replace(run.data, paths=[_absolute(path) for path in run.data.paths]),
        tokenizer=replace(
            run.tokenizer,
            path=None if run.tokenizer.path is None else _absolute(run.tokenizer.path),
        ),
        model=_read_pretrained(run.model) if run.model.path is not None else run.model,
        precision=replace(run.precision, name=_choose_precision(run, launch.device, machine)),
        optim=replace(run.optim, name=_choose_optimizer(run, launch.device)),
        zero=replace(
            run.zero,
            zero_hpz_partition_size=run.zero.zero_hpz_partition_size or launch.num_processes,
        ),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _resolve_launch(launch: Launch, machine: Machine) -> Launch:
    device = launch.device
    if device is Device.auto:
        device = Device.cuda if machine.num_gpus else Device.cpu
    processes = launch.num_processes
    if processes is None:
        # On a CPU two ranks of half the cores beat one rank of all (docs/log.md).
        processes = max(machine.num_gpus, 1) if device is Device.cuda else min(2, machine.cores)
    threads = launch.threads_per_process
    if threads is None:
        threads = max(1, machine.cores // processes)
    return replace(launch, device=device, num_processes=processes, threads_per_process=threads)


def _choose_precision(run: Run, device: Device, machine: Machine) -> PrecisionName:
    if run.precision.name is not PrecisionName.auto:
        return run.precision.name
    if device is Device.cuda:
        native = machine.gpu_capability is None or machine.gpu_capability >= (8, 0)
    else:
        native = machine.cpu_bf16
    return PrecisionName.bf16 if native else PrecisionName.fp32


def _choose_optimizer(run: Run, device: Device) -> OptimName:
    if run.optim.name is not OptimName.adamw:
        return run.optim.name
    if run.zero.offload_optimizer.device is not OffloadDevice.none:
        return OptimName.cpu_adam
    return OptimName.fused_adam if device is Device.cuda else OptimName.torch_adamw


def _read_pretrained(model: Model) -> Model:
    """The shape of a Hugging Face checkpoint, from its config.json."""
    assert model.path is not None
    folder = Path(model.path).expanduser().resolve()
    config_file = folder / "config.json"
    if not config_file.is_file():
        hint = "give a directory that save_pretrained wrote"
        raise UserError([Problem(path="model.path", message=f"no {config_file}", hint=hint)])
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{config_file} can't be read: {error}"
        raise UserError([Problem(path="model.path", message=message)]) from error
    values = LLAMA_DEFAULTS | values
    if values.get("model_type") != "llama":
        message = f"is not a LLaMA (model_type {values.get('model_type')!r} in {config_file})"
        raise UserError([Problem(path="model.path", message=message)])
    if values["hidden_act"] != "silu":
        message = f"only hidden_act silu is supported (got {values['hidden_act']} in {config_file})"
        raise UserError([Problem(path="model.path", message=message)])
    if not list(folder.glob("*.safetensors")):
        message = f"no *.safetensors in {folder}"
        hint = "pickled weights are not opened; save it again with save_pretrained"
        raise UserError([Problem(path="model.path", message=message, hint=hint)])
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
