"""The DeepSpeed JSON: two pure functions from a resolved run to a dict, and the check of it.

DeepSpeed drops unknown top-level keys in silence and takes its default for "auto", so what is
emitted here holds every value, as the type DeepSpeed wants, and nothing that it doesn't know.
"""

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem
from llama_pretrain.config.schema import OffloadDevice, Precision, PrecisionName, Run, Zero
from llama_pretrain.plan.batch import BatchPlan

EXTRA_KEYS = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "keep_in_fp32_modules",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "seq_parallel_communication_data_type",
    "torch_autocast",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
"""Top-level keys of DeepSpeed 0.19 that `deepspeed.extra` may carry: known to it and not ours."""

ZERO_EXTRA_KEYS = (
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "compute_grad_norm",
    "parameter_alignment",
    "save_muon_momentum_buffer_in_memory",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "ignore_unused_parameters",
    "zero_quantized_nontrainable_weights",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "leaf_module",
)
"""Keys of zero_optimization in DeepSpeed 0.19 that `zero.extra` may carry."""

REMOVED_KEYS = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "nebula",
    "progressive_layer_drop",
    "sparse_attention",
    "sparse_gradients",
)
"""Top-level keys that DeepSpeed 0.19 refuses."""

OWNED_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "deepspeed.steps_per_print",
    "wall_clock_breakdown": "deepspeed.wall_clock_breakdown",
    "prescale_gradients": "deepspeed.prescale_gradients",
    "hybrid_engine": "deepspeed.hybrid_engine",
    "tensorboard": "monitor.deepspeed_tensorboard",
    "zero_optimization": "zero",
    "bf16": "precision",
    "fp16": "precision",
    "data_types": "precision.grad_accum_dtype",
    "optimizer": "optim",
    "scheduler": "schedule",
    "dataloader_drop_last": "data",
    "data_efficiency": "data",
    "autotuning": "batch",
}
"""Top-level keys that have a setting of ours."""


def get_train_ds_config(run: Run, batch: BatchPlan, *, run_dir: Path | None) -> dict[str, Any]:
    """DeepSpeed's config of a training engine. `run_dir` is where its own monitor would write."""
    config: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": float(run.train.gradient_clipping),  # left out, it would be 1.0
        "prescale_gradients": run.deepspeed.prescale_gradients,
        "steps_per_print": run.deepspeed.steps_per_print,
        "wall_clock_breakdown": run.deepspeed.wall_clock_breakdown,
        "zero_optimization": _zero_section(run.zero),
        **_precision_sections(run.precision),
    }
    if run.precision.grad_accum_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": run.precision.grad_accum_dtype.value}
    if run.deepspeed.hybrid_engine.enabled:
        config["hybrid_engine"] = asdict(run.deepspeed.hybrid_engine)
    if run.monitor.deepspeed_tensorboard and run_dir is not None:
        config["tensorboard"] = {
            "enabled": True,
            "output_path": str(run_dir / "tensorboard"),
            "job_name": "deepspeed",
        }
    return {**config, **run.deepspeed.extra}


def get_eval_ds_config(run: Run, *, micro_batch_size: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config of an engine that only runs forward: no optimizer, no monitor.

    Parameters stay sharded at stage 3; lower stages shard only what training needs.
    """
    zero: dict[str, Any] = {"stage": 3 if run.zero.stage == 3 else 0}
    if run.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = run.zero.stage3_param_persistence_threshold
        if run.zero.offload_param.device is not OffloadDevice.none:
            zero["offload_param"] = _offload_section(asdict(run.zero.offload_param))
    return {
        "train_batch_size": micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "steps_per_print": run.deepspeed.steps_per_print,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
        **_precision_sections(run.precision),
    }


def _precision_sections(precision: Precision) -> dict[str, Any]:
    if precision.name is PrecisionName.bf16:
        return {"bf16": {"enabled": True}}
    if precision.name is not PrecisionName.fp16:
        return {}
    section = {
        "enabled": True,
        "loss_scale": precision.loss_scale,
        "initial_scale_power": precision.initial_scale_power,
        "loss_scale_window": precision.loss_scale_window,
        "hysteresis": precision.hysteresis,
        "min_loss_scale": precision.min_loss_scale,
    }
    return {"fp16": section}


def _zero_section(zero: Zero) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage >= 1:
        section["contiguous_gradients"] = zero.contiguous_gradients
        section["reduce_bucket_size"] = zero.reduce_bucket_size
        if zero.overlap_comm is not None:
            section["overlap_comm"] = zero.overlap_comm
    if zero.stage in (1, 2):
        section["allgather_bucket_size"] = zero.allgather_bucket_size
        section["round_robin_gradients"] = zero.round_robin_gradients
    if zero.stage == 3:
        section |= {
            "sub_group_size": zero.sub_group_size,
            "stage3_prefetch_bucket_size": zero.stage3_prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.stage3_param_persistence_threshold,
            "stage3_max_live_parameters": zero.stage3_max_live_parameters,
            "stage3_max_reuse_distance": zero.stage3_max_reuse_distance,
            "zero_hpz_partition_size": zero.zero_hpz_partition_size,
            "zero_quantized_weights": zero.zero_quantized_weights,
            "zero_quantized_gradients": zero.zero_quantized_gradients,
        }
    for name, offload in (
        ("offload_optimizer", zero.offload_optimizer),
        ("offload_param", zero.offload_param),
    ):
        if offload.device is not OffloadDevice.none:
            section[name] = _offload_section(asdict(offload))
    return section | zero.extra


def _offload_section(values: dict[str, Any]) -> dict[str, Any]:
    on_disk = values["device"] is OffloadDevice.nvme
    disk_only = {"nvme_path", "buffer_count", "buffer_size", "max_in_cpu"}
    section = {key: value for key, value in values.items() if on_disk or key not in disk_only}
    return section | {"device": values["device"].value}


def check_extra(run: Run) -> Iterator[Problem]:
    """Problems of keys that a user passes through to DeepSpeed."""
    for key, value in run.zero.extra.items():
        path = f"zero.extra.{key}"
        if key not in ZERO_EXTRA_KEYS and key not in {item.name for item in fields(Zero)}:
            hint = f"it knows {', '.join(sorted(ZERO_EXTRA_KEYS))}"
            yield Problem(path=path, message="DeepSpeed doesn't know this key", hint=hint)
        yield from _check_auto(value, path)
    for key, value in run.deepspeed.extra.items():
        path = f"deepspeed.extra.{key}"
        if key in OWNED_KEYS:
            hint = f"use {OWNED_KEYS[key]}"
            yield Problem(path=path, message="this key has a setting of its own", hint=hint)
        elif key in REMOVED_KEYS:
            hint = "leave it out"
            yield Problem(path=path, message="DeepSpeed has removed this feature", hint=hint)
        elif key not in EXTRA_KEYS:
            hint = f"it knows {', '.join(sorted(EXTRA_KEYS))}"
            message = "DeepSpeed doesn't know this key and would drop it in silence"
            yield Problem(path=path, message=message, hint=hint)
        yield from _check_auto(value, path)


def _check_auto(value: Any, path: str) -> Iterator[Problem]:
    if value == "auto":
        message = 'DeepSpeed takes its default for "auto" in silence'
        yield Problem(path=path, message=message, hint="write the value")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _check_auto(item, f"{path}.{key}")
