"""The DeepSpeed JSON: pure functions from a resolved run to a dict, and the origin of each value.

DeepSpeed silently drops unknown top-level keys and uses its own default for "auto", so what is
emitted here holds every value, in the type that DeepSpeed expects, and no key that it ignores.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama_pretrain.config.deepspeed import SWITCHED, ActivationCheckpointing, DeepSpeed
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.origins import origin_of
from llama_pretrain.config.precision import Precision, PrecisionName
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import flatten
from llama_pretrain.config.zero import OffloadDevice, Zero, keys_read, stages_of
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
"""Settings of `precision` that these two sections have under the same names."""

SCALARS = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_python_gc",
)
"""Settings of `deepspeed` that are top-level keys under the same names."""

SOURCES = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "bf16.enabled": "precision.name",
    "fp16.enabled": "precision.name",
    "communication_data_type": "precision.communication_data_type",
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
"""The setting that a value of the JSON comes from: by its path, or by its section."""


def setting_of(path: str) -> str:
    """The setting behind a dotted path of the JSON."""
    if path in SOURCES:
        return SOURCES[path]
    prefix = next(prefix for prefix in PREFIXES if path.startswith(prefix))
    return PREFIXES[prefix] + path.removeprefix(prefix)


def trace_ds_config(config: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, str]:
    """Where each value of the JSON comes from, given where each setting does."""
    return {path: _origin(setting_of(path), origins) for path, _ in flatten(config)}


def _origin(setting: str, origins: Mapping[str, str]) -> str:
    found = origin_of(setting, origins)
    if found is not None:
        return found
    # A key of `extra` is in its section under its own name.
    group, _, key = setting.partition(".")
    extra = f"{group}.extra.{key}"
    return next((origins[name] for name in origins if name.startswith(extra)), "default")


def get_train_ds_config(
    run: ResolvedRun, batch: BatchPlan, *, run_dir: Path | None
) -> dict[str, Any]:
    """DeepSpeed's config of a training engine; its own monitors write to `run_dir`."""
    config: dict[str, Any] = {
        # DeepSpeed counts every rank, also those that share a sequence.
        "train_batch_size": batch.global_batch_size * run.launch.sequence_parallel_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": float(run.train.gradient_clipping),  # without it, 1.0
        **{key: getattr(run.deepspeed, key) for key in SCALARS},
        "zero_optimization": _zero_section(run.zero),
        **_precision_sections(run.precision, stage=run.zero.stage),
        **_deepspeed_sections(run.deepspeed, run_dir),
    }
    if OffloadDevice.nvme in (run.zero.offload_optimizer.device, run.zero.offload_param.device):
        config["aio"] = to_plain(run.deepspeed.aio)
    if (
        run.optim.name is OptimName.cpu_adagrad
    ):  # DeepSpeed only knows CPUAdam and CPULion as its own
        config["zero_force_ds_cpu_optimizer"] = False
    return {**config, **run.deepspeed.extra}


def get_eval_ds_config(run: ResolvedRun, *, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's config of a forward-only engine: no optimizer, no monitor.

    Parameters stay sharded at stage 3; lower stages only shard what training needs.
    """
    zero: dict[str, Any] = {"stage": 3 if run.zero.stage == 3 else 0}
    if run.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = run.zero.stage3_param_persistence_threshold
        if run.zero.offload_param.device is not OffloadDevice.none:
            zero["offload_param"] = keys_read(run.zero.offload_param)
    return {
        "train_batch_size": micro_batch_size * run.num_ranks,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": run.deepspeed.steps_per_print,
        "zero_optimization": zero,
        **_precision_sections(run.precision, stage=run.zero.stage),
    }


def _precision_sections(precision: Precision, *, stage: int) -> dict[str, Any]:
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
    if plain["communication_data_type"] is not None:
        sections["communication_data_type"] = plain["communication_data_type"]
    kept = ("grad_accum_dtype", "buffer_dtype") if stage > 0 else ("buffer_dtype",)
    types = {key: plain[key] for key in kept if plain[key] is not None}
    return sections | ({"data_types": types} if types else {})


def _deepspeed_sections(deepspeed: DeepSpeed, run_dir: Path | None) -> dict[str, Any]:
    """The sections that are on, whole."""
    sections = {name: getattr(deepspeed, name) for name in SWITCHED}
    sections = {name: section for name, section in sections.items() if section.enabled}
    if deepspeed.activation_checkpointing != ActivationCheckpointing():
        sections["activation_checkpointing"] = deepspeed.activation_checkpointing
    plain = {name: to_plain(section) for name, section in sections.items()}
    tensorboard = plain.get("tensorboard")
    if tensorboard and tensorboard["output_path"] is None and run_dir is not None:
        tensorboard["output_path"] = str(run_dir / "tensorboard")
    return {
        name: {key: value for key, value in section.items() if value is not None}
        for name, section in plain.items()
    }


def _zero_section(zero: Zero) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": zero.stage}
    for item in fields(Zero):
        value = getattr(zero, item.name)
        if zero.stage in stages_of(item) and value is not None:
            section[item.name] = value
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name)
        if offload.device is not OffloadDevice.none:
            section[name] = keys_read(offload)
    return section | zero.extra
