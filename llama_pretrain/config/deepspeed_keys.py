"""DeepSpeed's own keys: which may be passed through, which have a setting here, which are gone."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


EXTRA_KEYS = ("log_level",)
"""Top-level keys of DeepSpeed that `deepspeed.extra` may carry: known to it and not ours."""


ZERO_EXTRA_KEYS = (
    "load_from_fp32_weights",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "leaf_module",
)
"""Keys of zero_optimization that `zero.extra` may carry."""


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
    "seq_parallel_communication_data_type": "precision.seq_parallel_communication_data_type",
    "optimizer": "optim",
    "scheduler": "schedule",
}
"""Top-level keys that have a setting of ours in another group."""


REFUSED_KEYS = {
    "autotuning": "it would change the batch; plan.fit=80GiB task=plan lists what fits",
    "curriculum_learning": "the order of the data is ours",
    "data_efficiency": "the order of the data is ours",
    "disable_allgather": "nothing in DeepSpeed 0.19.8 reads it",
    "dataloader_drop_last": "batches are ours, and none is dropped",
    "expert_parallel": "a LLaMA has no experts",
    "use_data_before_expert_parallel_": "a LLaMA has no experts",
    "gradient_allreduce_op": "the loss is a mean over the global batch",
    "managed_gradient_accumulation": "accumulation is left to DeepSpeed",
    "pipeline": "pipeline parallelism needs another model; use zero=stage3",
    "zero_allow_untested_optimizer": "each optimizer here says which stages it allows",
}
"""Top-level keys of DeepSpeed that a run here cannot have."""


REFUSED_ZERO_KEYS = {
    "zenflow": "its first loss was wrong when it was tried (DeepSpeed 0.19.8)",
    "compute_grad_norm": "every step reports the norm of its gradient",
    "elastic_checkpoint": "checkpoints are ours",
    "legacy_stage1": "it is gone since DeepSpeed 0.9",
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
"""Other names that DeepSpeed understands, and the settings of `zero` that they are."""


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
"""Keys that DeepSpeed 0.19.8 has removed, and the last release that knows them."""


def validate_extra(run: "Run") -> Iterator[Problem]:
    """Keys that a user passes through to DeepSpeed."""
    own = [item.name for item in fields(run.zero)]
    for key, value in run.zero.extra.items():
        path, setting = f"zero.extra.{key}", FORMER_ZERO_KEYS.get(key, key)
        if setting.partition(".")[0] in own:
            what = "there is a setting of that name" if setting == key else "is an old name"
            yield Problem(path=path, message=what, hint=f"set zero.{setting} instead")
        else:
            known = check_key(key, path, known=ZERO_EXTRA_KEYS, refused=REFUSED_ZERO_KEYS)
            yield from _suggest(known, key, {name: f"zero.{name}" for name in own})
        yield from _check_auto(value, path)
    own = [item.name for item in fields(run.deepspeed)]
    settings = {**OWNED_KEYS, **{name: f"deepspeed.{name}" for name in own}}
    for key, value in run.deepspeed.extra.items():
        path = f"deepspeed.extra.{key}"
        owner = OWNED_KEYS.get(key, f"deepspeed.{key}" if key in own else None)
        if owner is not None:
            hint = f"use {owner}"
            yield Problem(path=path, message="this key has a setting of its own", hint=hint)
        else:
            known = check_key(key, path, known=EXTRA_KEYS, refused=REFUSED_KEYS)
            yield from _suggest(known, key, settings)
        yield from _check_auto(value, path)


def _suggest(
    problems: Iterable[Problem], key: str, settings: Mapping[str, str]
) -> Iterator[Problem]:
    """The problem of a key; where it is a slip of the fingers, with the setting that was meant."""
    close = difflib.get_close_matches(key, settings, n=1, cutoff=0.8)
    for problem in problems:
        slip = close and "doesn't know" in problem.message
        yield replace(problem, hint=f"did you mean {settings[close[0]]}?") if slip else problem


def check_key(
    key: str, path: str, *, known: tuple[str, ...], refused: Mapping[str, str]
) -> Iterator[Problem]:
    """The problem of a key of DeepSpeed that no setting of ours stands for, if it is one."""
    if key in LAST_VERSION_WITH:
        message = f"DeepSpeed 0.19.8 has removed it (the last with it is {LAST_VERSION_WITH[key]})"
        yield Problem(path=path, message=message, hint="leave it out")
    elif key in refused:
        message = f"is not offered here: {refused[key]}"
        yield Problem(path=path, message=message, hint="leave it out")
    elif key not in known:
        silent = "" if path.startswith("zero.") else " and would drop it in silence"
        message = f"DeepSpeed 0.19.8 doesn't know this key{silent}"
        hint = f"what may be added so is {', '.join(sorted(known))}"
        yield Problem(path=path, message=message, hint=hint)


def _check_auto(value: Any, path: str) -> Iterator[Problem]:
    if value == "auto":
        message = 'DeepSpeed takes its default for "auto" in silence'
        yield Problem(path=path, message=message, hint="write the value")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _check_auto(item, f"{path}.{key}")
