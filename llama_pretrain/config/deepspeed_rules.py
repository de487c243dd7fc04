"""What a config may not ask of DeepSpeed: rules across its sections, and the keys it knows.

Every rule here needs the config alone. DeepSpeed ignores most of these mistakes, or fails with
them in a rank after the model is built.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from llama_pretrain.config.deepspeed import (
    ActivationCheckpointing,
    Aio,
    Compile,
    OffloadDevice,
    Zero,
    stages_of,
    unread_offload_keys,
)
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.schema import (
    AutocastDtype,
    Dtype,
    OptimName,
    Precision,
    PrecisionName,
    Run,
    Task,
)

HOST_OPTIMIZERS = {
    OptimName.adamw: "cpu_adam",
    OptimName.cpu_adam: "cpu_adam",
    OptimName.lion: "cpu_lion",
    OptimName.cpu_lion: "cpu_lion",
    OptimName.cpu_adagrad: "cpu_adagrad",
}
"""Optimizers that update state in host memory, by what was asked for."""

PRECISION_OF = {
    "immediate_grad_update": PrecisionName.bf16,
    "check_grad_overflow": PrecisionName.bf16,
    "bf16_master_weights_and_grads": PrecisionName.bf16,
    "bf16_optimizer_states": PrecisionName.bf16,
    "loss_scale": PrecisionName.fp16,
    "initial_scale_power": PrecisionName.fp16,
    "loss_scale_window": PrecisionName.fp16,
    "hysteresis": PrecisionName.fp16,
    "consecutive_hysteresis": PrecisionName.fp16,
    "min_loss_scale": PrecisionName.fp16,
    "auto_cast": PrecisionName.fp16,
    "fp16_master_weights_and_grads": PrecisionName.fp16,
}
"""The one precision that reads a setting."""

SWITCHES = {
    "comet": "enabled",
    "comms_logger": "enabled",
    "compile": "deepcompile",
    "csv_monitor": "enabled",
    "flops_profiler": "enabled",
    "hybrid_engine": "enabled",
    "tensor_parallel": "autotp_size",
    "tensorboard": "enabled",
    "wandb": "enabled",
}
"""Sections that are emitted when this field of theirs is changed."""

LEFT_BY_RECIPES: dict[str, tuple[Any, ...]] = {
    "eps": (1e-5, 1e-6, 1e-10),
    "betas": ([0.9, 0.999], [0.95, 0.98]),
}
"""What experiments and other optimizers' YAMLs set: no mistake where this optimizer ignores it."""

DYNAMIC_SCALE = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)
"""Settings of fp16 that a fixed loss scale leaves unread."""

COMPILE_SWITCHES = {
    "free_activation": "free_activation_threshold",
    "offload_activation": "offload_activation_pin_memory",
}
"""Settings of DeepCompile that another of its settings makes it read."""

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


def check_deepspeed(run: Run) -> Iterator[Problem]:
    """Every rule about DeepSpeed."""
    for rule in (
        _check_offload,
        _check_zero,
        _check_optimizer,
        _check_precision,
        _check_sections,
        _check_unused,
        _check_extra,
    ):
        yield from rule(run)


def _check_offload(run: Run) -> Iterator[Problem]:
    zero = run.zero
    for name in ("offload_optimizer", "offload_param"):
        section = getattr(zero, name)
        on_disk = section.device is OffloadDevice.nvme
        least = 3 if name == "offload_param" or on_disk else 1
        if section.device is not OffloadDevice.none and zero.stage < least:
            yield Problem(
                path=f"zero.{name}.device",
                message=f"{section.device.value} needs zero.stage={least}"
                f"{'' if least == 3 else ' or higher'} (got stage {zero.stage})",
                hint=f"set zero.stage={max(2, least)}",
            )
        if on_disk and section.nvme_path is None and run.task is not Task.plan:
            yield Problem(
                path=f"zero.{name}.nvme_path",
                message="nvme needs a folder on a local disk",
                hint=f"add zero.{name}.nvme_path=DIR",
            )
    section = zero.offload_optimizer
    if section.device is not OffloadDevice.none and run.optim.name not in HOST_OPTIMIZERS:
        yield Problem(
            path="zero.offload_optimizer.device",
            message=f"{section.device.value} needs optim=cpu_adam, cpu_lion or cpu_adagrad"
            f" (got optim={run.optim.name.value})",
            hint="add optim=cpu_adam, or set zero.offload_optimizer.device=none",
        )
    if section.ratio < 1 and zero.stage != 3 and section.device is not OffloadDevice.none:
        yield Problem(
            path="zero.offload_optimizer.ratio",
            message=f"a part is offloaded at stage 3 alone (got {section.ratio})",
            hint="set zero.stage=3, or leave it out",
        )
    if section.super_offload and (zero.stage != 3 or section.device is not OffloadDevice.cpu):
        yield Problem(
            path="zero.offload_optimizer.super_offload",
            message="SuperOffload needs zero.stage=3 and zero.offload_optimizer.device=cpu"
            f" (got stage {zero.stage}, {section.device.value})",
            hint="set zero.stage=3 and zero.offload_optimizer.device=cpu",
        )
    host = HOST_OPTIMIZERS.get(run.optim.name)
    for key, on in (("ratio", section.ratio < 1), ("super_offload", section.super_offload)):
        if on and zero.stage == 3 and host not in (None, "cpu_adam"):
            yield Problem(
                path=f"zero.offload_optimizer.{key}",
                message="DeepSpeed has it for its CPUAdam alone"
                f" (got optim={run.optim.name.value})",
                hint="add optim=cpu_adam, or leave it out",
            )


def _check_zero(run: Run) -> Iterator[Problem]:
    zero = run.zero
    for name, off in (
        ("zero_hpz_partition_size", 1),
        ("zero_quantized_weights", False),
        ("zero_quantized_gradients", False),
    ):
        if zero.stage < 3 and getattr(zero, name) != off:
            yield Problem(
                path=f"zero.{name}",
                message=f"ZeRO++ needs zero.stage=3 (got stage {zero.stage})",
                hint="set zero.stage=3",
            )
    if zero.zero_quantized_nontrainable_weights:
        yield Problem(
            path="zero.zero_quantized_nontrainable_weights",
            message="here every weight is trained (got true)",
            hint="leave it out",
        )
    muon = run.optim.name is OptimName.muon  # which has neither, and says so
    if zero.zero_quantized_gradients and zero.reduce_scatter is False and not muon:
        yield Problem(
            path="zero.reduce_scatter",
            message="zero.zero_quantized_gradients needs it (got false)",
            hint="leave it out",
        )
    if not zero.allgather_partitions:
        yield Problem(
            path="zero.allgather_partitions",
            message="DeepSpeed 0.19.8 gathers in any case and reads it no more (got false)",
            hint="leave it out",
        )
    if zero.allgather_bucket_size % 2:
        yield Problem(
            path="zero.allgather_bucket_size",
            message=f"should be even (got {zero.allgather_bucket_size})",
            hint=f"set it to {zero.allgather_bucket_size + 1}",
        )
    offloaded = zero.offload_optimizer.device is not OffloadDevice.none
    if not zero.contiguous_gradients and offloaded and zero.stage in (1, 2):
        yield Problem(
            path="zero.contiguous_gradients",
            message="with offload DeepSpeed copies gradients into one buffer always (got false)",
            hint="leave it out",
        )
    if zero.zero_quantized_weights and run.precision.torch_autocast.enabled:
        yield Problem(
            path="zero.zero_quantized_weights",
            message="is refused by DeepSpeed together with precision.torch_autocast (got true)",
            hint="set it to false, or add precision=bf16",
        )
    kept = zero.save_muon_momentum_buffer_in_memory
    if kept and zero.stage == 3 and not muon:
        yield Problem(
            path="zero.save_muon_momentum_buffer_in_memory",
            message=f"is used with optim=muon alone (got optim={run.optim.name.value})",
            hint="add optim=muon, or leave it out",
        )


def _check_optimizer(run: Run) -> Iterator[Problem]:
    optim, stage, name = run.optim, run.zero.stage, run.optim.name.value
    for index, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            yield Problem(
                path=f"optim.betas.{index}",
                message=f"should be at least 0 and less than 1 (got {beta})",
            )
    default = type(optim)()
    unread = {"muon_learning_rate", "muon_momentum"} if "muon" not in name else set()
    unread |= {"eps"} if "lion" in name else {"betas"} if "adagrad" in name else set()
    for key in sorted(unread):
        if getattr(optim, key) not in (getattr(default, key), *LEFT_BY_RECIPES.get(key, ())):
            yield Problem(
                path=f"optim.{key}",
                message=f"is not used with optim={name} (got {getattr(optim, key)})",
                hint="add optim=muon" if key.startswith("muon") else "leave it out",
            )
    if optim.name is OptimName.lamb and stage > 0:
        yield Problem(
            path="optim.name",
            message="lamb scales each weight by its norm, and ZeRO gives it flat shards"
            f" (got stage {stage})",
            hint="set zero.stage=0, or choose another optimizer",
        )
    if optim.name is OptimName.muon:
        yield from _check_muon(run)


def _check_muon(run: Run) -> Iterator[Problem]:
    zero, clipping = run.zero, run.train.gradient_clipping
    if zero.stage == 0:
        yield Problem(
            path="optim.name",
            message="muon needs a stage that gathers whole gradients for it: 1, 2 or 3"
            " (got stage 0)",
            hint="set zero.stage=1",
        )
    if clipping is not None and clipping > 0:
        yield Problem(
            path="train.gradient_clipping",
            message="with optim=muon DeepSpeed clips the orthogonalised update, which divides it"
            f" by thirty or so (got {clipping})",
            hint="leave it out, or set it to 0",
        )
    if zero.stage == 3 and zero.reduce_scatter:
        yield Problem(
            path="zero.reduce_scatter",
            message="muon at stage 3 needs whole gradients (got true)",
            hint="leave it out, or set it to false",
        )
    if zero.zero_quantized_gradients:
        yield Problem(
            path="zero.zero_quantized_gradients",
            message="muon needs whole gradients (got true)",
            hint="set it to false",
        )


def _check_precision(run: Run) -> Iterator[Problem]:
    precision, stage = run.precision, run.zero.stage
    default, name = Precision(), run.precision.name
    for key, reader in PRECISION_OF.items():
        if getattr(precision, key) == getattr(default, key):
            continue
        if name not in (reader, PrecisionName.auto):
            yield Problem(
                path=f"precision.{key}",
                message=f"is used by {reader.value} alone (got precision={name.value})",
                hint=f"add precision={reader.value}, or leave it out",
            )
        elif key in DYNAMIC_SCALE and precision.loss_scale > 0:
            yield Problem(
                path=f"precision.{key}",
                message="belongs to the dynamic loss scale, and this one is fixed"
                f" (got precision.loss_scale={precision.loss_scale})",
                hint="set precision.loss_scale=0, or leave it out",
            )
    accumulated = precision.grad_accum_dtype
    if accumulated is not None and stage == 0:
        yield Problem(
            path="precision.grad_accum_dtype",
            message="DeepSpeed has it from stage 1 on (got stage 0)",
            hint="set zero.stage=1, or leave it out",
        )
    if accumulated is not None and {accumulated.value, name.value} == {"bf16", "fp16"}:
        yield Problem(
            path="precision.grad_accum_dtype",
            message="bf16 and fp16 exclude each other"
            f" (got {accumulated.value} with precision={name.value})",
            hint="set it to fp32, or leave it out",
        )
    offloaded = run.zero.offload_optimizer.device is not OffloadDevice.none
    checked = stage == 2 or (stage == 1 and (accumulated is not Dtype.fp32 or offloaded))
    if name is PrecisionName.bf16 and not precision.check_grad_overflow and not checked:
        yield Problem(
            path="precision.check_grad_overflow",
            message="DeepSpeed reads it at stages 1 and 2, at stage 1 without"
            f" precision.grad_accum_dtype=fp32 (got false at stage {stage})",
            hint="set zero.stage=2, or leave it out",
        )
    if precision.immediate_grad_update and not (accumulated is Dtype.fp32 and stage == 1):
        yield Problem(
            path="precision.immediate_grad_update",
            message="is used at stage 1 with precision.grad_accum_dtype=fp32 alone",
            hint="set zero.stage=1 and precision.grad_accum_dtype=fp32, or leave it out",
        )
    yield from _check_masters(run)
    autocast = precision.torch_autocast
    yield from _check_safe_modules(autocast.lower_precision_safe_modules)
    if autocast.enabled and name not in (PrecisionName.fp32, PrecisionName.auto):
        yield Problem(
            path="precision.torch_autocast.enabled",
            message="casts fp32 weights, and these are in 16 bits already"
            f" (got precision={name.value})",
            hint="add precision=bf16_autocast, or leave it out",
        )
    if not autocast.enabled and autocast != type(autocast)():
        yield Problem(
            path="precision.torch_autocast",
            message="is set and not enabled",
            hint="add precision.torch_autocast.enabled=true",
        )
    if autocast.enabled and autocast.dtype is AutocastDtype.float16 and stage > 0:
        yield Problem(
            path="precision.torch_autocast.dtype",
            message=f"float16 needs a loss scale, which DeepSpeed has at stage 0 (got {stage})",
            hint="set it to bfloat16",
        )


def _check_safe_modules(names: list[str]) -> Iterator[Problem]:
    """Ranks import these: only what is there anyway, or a snapshot could name code to run."""
    for index, name in enumerate(names):
        if not re.fullmatch(r"(torch\.nn|transformers)(\.\w+)+", name):
            yield Problem(
                path=f"precision.torch_autocast.lower_precision_safe_modules.{index}",
                message="should be the whole name of a class in torch.nn or transformers"
                f" (got {name})",
                hint="write torch.nn.Linear, say",
            )


def _check_masters(run: Run) -> Iterator[Problem]:
    """Master weights in 16 bits: DeepSpeed has them in its CPUAdam, or with moments in bf16."""
    precision, zero = run.precision, run.zero
    offloaded = zero.offload_optimizer.device is not OffloadDevice.none
    if precision.bf16_optimizer_states and not precision.bf16_master_weights_and_grads:
        yield Problem(
            path="precision.bf16_optimizer_states",
            message="needs precision.bf16_master_weights_and_grads=true",
            hint="set precision.bf16_master_weights_and_grads=true, or leave it out",
        )
    elif precision.bf16_optimizer_states and offloaded:
        yield Problem(
            path="precision.bf16_optimizer_states",
            message="is for state on the device: what is offloaded has fp32 moments here",
            hint="leave it out",
        )
    for kind in ("bf16", "fp16"):
        name = f"{kind}_master_weights_and_grads"
        on_device = kind == "bf16" and precision.bf16_optimizer_states
        if not getattr(precision, name):
            continue
        if zero.stage == 0 or not (offloaded or on_device):
            yield Problem(
                path=f"precision.{name}",
                message=f"needs the optimizer in host memory (got stage {zero.stage}"
                f"{'' if offloaded else ' without offload'})",
                hint="add zero=stage2_offload, or leave it out",
            )
        elif offloaded and HOST_OPTIMIZERS.get(run.optim.name, "cpu_adam") != "cpu_adam":
            yield Problem(
                path=f"precision.{name}",
                message=f"needs optim=cpu_adam (got optim={run.optim.name.value})",
                hint="add optim=cpu_adam, or leave it out",
            )


def _check_sections(run: Run) -> Iterator[Problem]:
    deepspeed = run.deepspeed
    kept = deepspeed.activation_checkpointing
    path = "deepspeed.activation_checkpointing"
    if kept != ActivationCheckpointing() and not run.train.gradient_checkpointing:
        yield Problem(
            path=path,
            message="is read with train.gradient_checkpointing=true alone",
            hint="add train.gradient_checkpointing=true, or leave it out",
        )
    if kept.partition_activations and deepspeed.tensor_parallel.autotp_size == 1:
        yield Problem(
            path=f"{path}.partition_activations",
            message="shards over tensor-parallel ranks, and there are none",
            hint="set it to false",
        )
    if kept.contiguous_memory_optimization and not kept.partition_activations:
        yield Problem(
            path=f"{path}.contiguous_memory_optimization",
            message="needs partition_activations",
            hint="set it to false",
        )
    if kept.number_checkpoints is not None and not kept.contiguous_memory_optimization:
        yield Problem(
            path=f"{path}.number_checkpoints",
            message="is the size of the buffer of contiguous_memory_optimization, which is off"
            f" (got {kept.number_checkpoints})",
            hint="leave it out",
        )
    if deepspeed.gradient_predivide_factor != 1 and not deepspeed.prescale_gradients:
        yield Problem(
            path="deepspeed.gradient_predivide_factor",
            message="is used with deepspeed.prescale_gradients=true alone"
            f" (got {deepspeed.gradient_predivide_factor})",
            hint="add deepspeed.prescale_gradients=true, or leave it out",
        )
    if deepspeed.prescale_gradients and run.zero.stage > 0:
        yield Problem(
            path="deepspeed.prescale_gradients",
            message=f"is used at stage 0 alone (got stage {run.zero.stage})",
            hint="set zero.stage=0, or leave it out",
        )
    profiler, steps = deepspeed.flops_profiler, run.train.max_steps
    if profiler.enabled and steps is not None and profiler.profile_step >= steps:
        yield Problem(
            path="deepspeed.flops_profiler.profile_step",
            message=f"no step comes after so many: the run has {steps}"
            f" (got {profiler.profile_step})",
            hint=f"set it to {steps - 1} at most",
        )
    moved = [
        name
        for name in ("offload_activation", "offload_opt_states", "offload_parameters")
        if getattr(deepspeed.compile, name)
    ]
    if len(moved) > 1:
        yield Problem(
            path=f"deepspeed.compile.{moved[1]}",
            message=f"excludes {moved[0]}",
            hint="set it to false",
        )
    if deepspeed.compile.deepcompile and run.zero.stage == 0:
        yield Problem(
            path="deepspeed.compile.deepcompile",
            message="has no passes for stage 0, where DeepSpeed leaves it out",
            hint="set zero.stage=1, or leave it out",
        )
    logger = deepspeed.comms_logger
    if logger.enabled and logger.prof_all is bool(logger.prof_ops):
        yield Problem(
            path="deepspeed.comms_logger.prof_ops",
            message=f"is not used with prof_all=true (got {logger.prof_ops})"
            if logger.prof_all
            else "names no operation, and prof_all is false",
            hint=f"set deepspeed.comms_logger.prof_all={str(not logger.prof_all).lower()}",
        )
    if run.precision.seq_parallel_communication_data_type and deepspeed.sequence_parallel_size == 1:
        yield Problem(
            path="precision.seq_parallel_communication_data_type",
            message="is used with deepspeed.sequence_parallel_size above 1 alone"
            f" (got {run.precision.seq_parallel_communication_data_type.value})",
            hint="leave it out",
        )


def _check_unused(run: Run) -> Iterator[Problem]:
    """Settings that were changed and that nothing would read."""
    for path, value, reader in _unused(run):
        yield Problem(
            path=path, message=f"is used by {reader} alone (got {value})", hint="leave it out"
        )


def _unused(run: Run) -> Iterator[tuple[str, Any, str]]:
    zero, default = run.zero, Zero()
    for item in fields(Zero):
        if item.name.startswith("zero_"):  # ZeRO++ has words of its own
            continue
        stages, value = stages_of(item), getattr(zero, item.name)
        if stages and zero.stage not in stages and value != getattr(default, item.name):
            names = ", ".join(str(stage) for stage in stages)
            yield f"zero.{item.name}", value, f"stage{'s' * (len(stages) > 1)} {names}"
    on_disk = OffloadDevice.nvme in (zero.offload_optimizer.device, zero.offload_param.device)
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name)
        for key, reader in sorted(unread_offload_keys(offload).items()):
            value = getattr(offload, key)
            # Options such as zero=stage3_nvme set these two, whatever device is set beside them.
            left = key == "pin_memory" or (key == "nvme_path" and on_disk)
            if value != getattr(type(offload)(), key) and not left:
                yield f"zero.{name}.{key}", value, f"zero.{name}.{reader}"
    for item in () if on_disk else fields(Aio):
        value = getattr(run.deepspeed.aio, item.name)
        if value != item.default:
            yield f"deepspeed.aio.{item.name}", value, "offload to nvme"
    for name, switch in SWITCHES.items():
        section = getattr(run.deepspeed, name)
        off = type(section)()
        if getattr(section, switch) == getattr(off, switch):
            for item in fields(section):
                value = getattr(section, item.name)
                if value != getattr(off, item.name):
                    path = f"deepspeed.{name}"
                    yield f"{path}.{item.name}", value, f"{path}.{switch}"
    compiled = run.deepspeed.compile
    for switch, key in COMPILE_SWITCHES.items():
        value = getattr(compiled, key)
        off = compiled.deepcompile and not getattr(compiled, switch)
        if off and value != getattr(Compile(), key):
            yield f"deepspeed.compile.{key}", value, f"deepspeed.compile.{switch}"


def _check_extra(run: Run) -> Iterator[Problem]:
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
