"""The DeepSpeed JSON: pure functions from a resolved run to a dict, and where each value is from.

DeepSpeed drops unknown top-level keys in silence and takes its default for "auto", so what is
emitted here holds every value, as the type DeepSpeed wants, and nothing that it doesn't know.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_pretrain.config.deepspeed import SWITCHES, DeepSpeed
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.precision import Precision, PrecisionName
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import flatten
from llama_pretrain.config.zero import (
    OffloadDevice,
    OffloadOptimizer,
    OffloadParam,
    Zero,
    stages_of,
    unread_offload_keys,
)
from llama_pretrain.plan.batch import BatchPlan

BF16_KEYS = (
    "immediate_grad_update",
    "check_grad_overflow",
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
)
FP16_KEYS = (
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
    "fp16_master_weights_and_grads",
)
"""Settings of Precision that stand in these two sections, under the same names."""

SCALARS = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_python_gc",
)
"""Settings of DeepSpeed that stand at the top level, under the same names."""

MONITOR_FOLDERS = {"tensorboard": "tensorboard", "csv_monitor": "csv"}
"""Where DeepSpeed's own monitors write in the run directory."""

SOURCES = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "bf16.enabled": "precision.name",
    "fp16.enabled": "precision.name",
    "communication_data_type": "precision.communication_data_type",
    "seq_parallel_communication_data_type": "precision.seq_parallel_communication_data_type",
    "zero_force_ds_cpu_optimizer": "optim.name",
}
PREFIXES = {
    "zero_optimization.": "zero.",
    "bf16.": "precision.",
    "fp16.": "precision.",
    "data_types.": "precision.",
    "torch_autocast.": "precision.torch_autocast.",
    "": "deepspeed.",
}
"""The setting of ours that a value of the JSON is from: by its path, or by its section."""


def source_of(path: str) -> str:
    """Our setting behind a dotted path of the JSON."""
    if path in SOURCES:
        return SOURCES[path]
    prefix = next(prefix for prefix in PREFIXES if path.startswith(prefix))
    return PREFIXES[prefix] + path.removeprefix(prefix)


def trace_ds_config(config: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    """Where each value of the JSON comes from, given where each setting of ours does."""
    return {path: _origin(source_of(path), origins) for path, _ in flatten(config)}


def _origin(setting: str, origins: Mapping[str, str]) -> str:
    above = setting
    while above:  # a mapping given whole stands for all that is in it
        if above in origins:
            return origins[above]
        above = above.rpartition(".")[0]
    # A key of `extra` stands in its section under its own name.
    group, _, key = setting.partition(".")
    extra = f"{group}.extra.{key}"
    return next((origins[name] for name in origins if name.startswith(extra)), "default")


def get_train_ds_config(run: Run, batch: BatchPlan, *, run_dir: Path | None) -> dict[str, Any]:
    """DeepSpeed's config of a training engine. `run_dir` is where its own monitors would write."""
    assert run.train.gradient_clipping is not None
    config: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": float(run.train.gradient_clipping),  # left out, it would be 1.0
        **{key: getattr(run.deepspeed, key) for key in SCALARS},
        "zero_optimization": _zero_section(run.zero),
        **_precision_sections(run.precision),
        **_deepspeed_sections(run.deepspeed, run_dir),
    }
    if _on_disk(run.zero):
        config["aio"] = to_plain(run.deepspeed.aio)
    if run.optim.name is OptimName.cpu_adagrad:  # it takes CPUAdam and CPULion alone for its own
        config["zero_force_ds_cpu_optimizer"] = False
    return {**config, **run.deepspeed.extra}


def get_eval_ds_config(run: Run, *, micro_batch_size: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config of an engine that only runs forward: no optimizer, no monitor.

    Parameters stay sharded at stage 3; lower stages shard only what training needs.
    """
    zero: dict[str, Any] = {"stage": 3 if run.zero.stage == 3 else 0}
    if run.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = run.zero.stage3_param_persistence_threshold
        if run.zero.offload_param.device is not OffloadDevice.none:
            zero["offload_param"] = _offload_section(run.zero.offload_param)
    return {
        "train_batch_size": micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": run.deepspeed.steps_per_print,
        "zero_optimization": zero,
        **_precision_sections(run.precision),
    }


def _precision_sections(precision: Precision) -> dict[str, Any]:
    plain = to_plain(precision)
    sections: dict[str, Any] = {}
    if precision.name is PrecisionName.bf16:
        sections["bf16"] = {"enabled": True, **{key: plain[key] for key in BF16_KEYS}}
    if precision.name is PrecisionName.fp16:
        sections["fp16"] = {"enabled": True, **{key: plain[key] for key in FP16_KEYS}}
    if precision.torch_autocast.enabled:
        autocast = plain["torch_autocast"]
        if not autocast["lower_precision_safe_modules"]:
            del autocast["lower_precision_safe_modules"]
        sections["torch_autocast"] = autocast
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        if plain[key] is not None:
            sections[key] = plain[key]
    types = {key: plain[key] for key in ("grad_accum_dtype", "buffer_dtype")}
    types = {key: value for key, value in types.items() if value is not None}
    return sections | ({"data_types": types} if types else {})


def _deepspeed_sections(deepspeed: DeepSpeed, run_dir: Path | None) -> dict[str, Any]:
    """The sections that are on, whole."""
    on = []
    for name, switch in [*SWITCHES.items(), ("activation_checkpointing", ""), ("checkpoint", "")]:
        section = getattr(deepspeed, name)
        off = type(section)()
        changed = getattr(section, switch) != getattr(off, switch) if switch else section != off
        on += [name] if changed else []
    sections: dict[str, Any] = {}
    for name in on:
        plain = to_plain(getattr(deepspeed, name))
        if name in MONITOR_FOLDERS and plain["output_path"] is None and run_dir is not None:
            plain["output_path"] = str(run_dir / MONITOR_FOLDERS[name])
        sections[name] = {key: value for key, value in plain.items() if value is not None}
    if deepspeed.sequence_parallel_size > 1:
        sections["sequence_parallel_size"] = deepspeed.sequence_parallel_size
    return sections


def _zero_section(zero: Zero) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": zero.stage}
    for item in fields(Zero):
        value = getattr(zero, item.name)
        if zero.stage in stages_of(item) and value is not None:
            section[item.name] = value
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name)
        if offload.device is not OffloadDevice.none:
            section[name] = _offload_section(offload)
    return section | zero.extra


def _offload_section(offload: OffloadOptimizer | OffloadParam) -> dict[str, Any]:
    """What its device reads."""
    unread = unread_offload_keys(offload)
    return {key: value for key, value in to_plain(offload).items() if key not in unread}


def _on_disk(zero: Zero) -> bool:
    return OffloadDevice.nvme in (zero.offload_optimizer.device, zero.offload_param.device)
