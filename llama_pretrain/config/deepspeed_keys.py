"""DeepSpeed's own keys: which may be passed through, which have a setting here, which are gone."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run

EXTRA_KEYS = (
    "checkpoint",
    "comet",
    "compile",
    "csv_monitor",
    "log_level",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "tensor_parallel",
    "wandb",
)
"""DeepSpeed's top-level keys that have no field here: `deepspeed.extra` may hold them."""

ZERO_EXTRA_KEYS = (
    "load_from_fp32_weights",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "leaf_module",
)
"""Keys of zero_optimization that `zero.extra` may hold."""

OWNED_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "zero_optimization": "zero",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision.torch_autocast",
    "data_types": "precision.grad_accum_dtype and precision.buffer_dtype",
    "communication_data_type": "precision.communication_data_type",
    "optimizer": "optim",
    "scheduler": "schedule",
}
"""Top-level keys that are set by other config groups."""

REFUSED_KEYS = {
    "autotuning": "it would change the batch; plan.fit=80GiB task=plan lists what fits",
    "curriculum_learning": "the sample order is fixed by data.*",
    "data_efficiency": "the sample order is fixed by data.*",
    "disable_allgather": "DeepSpeed 0.19.8 never reads it",
    "dataloader_drop_last": "no batch is ever dropped",
    "expert_parallel": "LLaMA has no experts",
    "use_data_before_expert_parallel_": "LLaMA has no experts",
    "gradient_allreduce_op": "the loss is a mean over the global batch",
    "managed_gradient_accumulation": "DeepSpeed always manages accumulation",
    "pipeline": "pipeline parallelism needs another model class; use zero=stage3",
    "zero_allow_untested_optimizer": "each optimizer declares its stages",
}
"""Top-level keys of DeepSpeed that are not supported, and why."""

REFUSED_ZERO_KEYS = {
    "zenflow": "its first loss is wrong (DeepSpeed 0.19.8)",
    "compute_grad_norm": "every step logs its gradient norm",
    "elastic_checkpoint": "checkpoints do not depend on the world size",
    "legacy_stage1": "removed in DeepSpeed 0.9",
}

FORMER_ZERO_KEYS = {
    "cpu_offload": "offload_optimizer.device",
    "cpu_offload_param": "offload_param.device",
    "cpu_offload_params": "offload_param.device",
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Old names that DeepSpeed still accepts, and the setting of `zero` that replaces each."""

LAST_VERSION_WITH = {
    "amp": "0.19.7",
    "compression_training": "0.19.6",
    "curriculum_learning": "0.19.7",
    "eigenvalue": "0.19.7",
    "elasticity": "0.19.7",
    "graph_harvesting": "0.19.7",
    "nebula": "0.19.6",
    "progressive_layer_drop": "0.19.7",
    "quantize_training": "0.19.6",
    "sparse_attention": "0.19.6",
    "sparse_gradients": "0.19.7",
    "mics_shard_size": "0.19.6",
    "mics_hierarchical_params_gather": "0.19.6",
    "zeropp_loco_param": "0.19.7",
}
"""Keys that were removed by DeepSpeed 0.19.8, and the last release that had each."""


def validate_extra(run: "Run") -> Iterator[Problem]:
    """Keys that a user passes through to DeepSpeed, which drops unknown ones silently."""
    own = {item.name: f"zero.{item.name}" for item in fields(run.zero)}
    former = {old: f"zero.{new}" for old, new in FORMER_ZERO_KEYS.items()}
    for key, value in run.zero.extra.items():
        path = f"zero.extra.{key}"
        yield from validate_key(key, path, ZERO_EXTRA_KEYS, REFUSED_ZERO_KEYS, own | former)
        yield from _validate_auto(value, path)
    own = {item.name: f"deepspeed.{item.name}" for item in fields(run.deepspeed)}
    for key, value in run.deepspeed.extra.items():
        path = f"deepspeed.extra.{key}"
        yield from validate_key(key, path, EXTRA_KEYS, REFUSED_KEYS, own | OWNED_KEYS)
        yield from _validate_auto(value, path)


def validate_key(
    key: str,
    path: str,
    known: tuple[str, ...],
    refused: Mapping[str, str],
    owners: Mapping[str, str],
) -> Iterator[Problem]:
    """The problem of passing a key through to DeepSpeed, if there is one.

    Args:
        known: keys that may be passed through.
        refused: keys that are not supported, each with the reason.
        owners: keys that have a setting of their own, each with its path.
    """
    if key in owners:
        yield Problem(path=path, message="has its own setting", hint=f"Set {owners[key]} instead")
    elif key in LAST_VERSION_WITH:
        message = f"was removed from DeepSpeed (last release with it: {LAST_VERSION_WITH[key]})"
        yield Problem(path=path, message=message, hint="Remove it")
    elif key in refused:
        message = f"is not supported: {refused[key]}"
        yield Problem(path=path, message=message, hint="Remove it")
    elif key not in known:
        close = difflib.get_close_matches(key, owners, n=1, cutoff=0.8)
        yield Problem(
            path=path,
            message="unknown key of DeepSpeed 0.19.8, which would ignore it silently",
            hint=f"Did you mean {owners[close[0]]}?"
            if close
            else f"Keys that can be added: {', '.join(sorted(known))}",
        )


def _validate_auto(value: Any, path: str) -> Iterator[Problem]:
    if value == "auto":
        message = 'DeepSpeed silently uses its own default for "auto"'
        yield Problem(path=path, message=message, hint="Write the value")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _validate_auto(item, f"{path}.{key}")
