"""The config group `precision`: number formats of forward and backward pass."""

import re
from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING

from llama_pretrain.config.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, schema
from llama_pretrain.config.optim import HOST_OPTIMIZERS
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.zero import OffloadDevice

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class PrecisionName(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class AutocastDtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"


@schema
class TorchAutocast:
    """torch.autocast: fp32 weights, products in 16 bits. With precision=fp32 alone."""

    enabled: bool = False
    """Whether it is on."""
    dtype: AutocastDtype = AutocastDtype.bfloat16
    """Type of the products."""
    lower_precision_safe_modules: list[str] = field(default_factory=list)
    """Classes of modules whose gradients are reduced in 16 bits too; empty = DeepSpeed's list."""


@schema
class Precision:
    """Numbers of the forward and backward pass; master weights are fp32 unless told otherwise."""

    name: PrecisionName = PrecisionName.auto
    """`auto` = bf16 where the device computes in it natively, else fp32."""
    grad_accum_dtype: Dtype | None = None
    """Gradients are accumulated in this type; `null` = the precision's own."""
    communication_data_type: Dtype | None = None
    """Gradients are reduced in this type; `null` = the precision's own."""
    seq_parallel_communication_data_type: Dtype | None = None
    """Gradients are reduced in this type over sequence-parallel ranks; `null` = fp32."""
    buffer_dtype: Dtype | None = None
    """Buffers (rotary frequencies) are cast to this type; `null` = they stay fp32."""
    torch_autocast: TorchAutocast = field(default_factory=TorchAutocast)
    """torch.autocast instead of 16-bit weights."""
    immediate_grad_update: bool = False
    """bf16 with fp32 accumulation: add each gradient as it is made."""
    check_grad_overflow: bool = True
    """bf16: skip a step whose gradient isn't finite."""
    bf16_master_weights_and_grads: bool = False
    """bf16: keep no fp32 master weights (cpu_adam): less memory, other losses."""
    bf16_optimizer_states: bool = False
    """bf16: moments in bf16 too (with bf16_master_weights_and_grads)."""
    loss_scale: NonNegativeFloat = 0.0
    """fp16: a fixed loss scale; 0 = dynamic."""
    initial_scale_power: NonNegativeInt = 16
    """fp16: the dynamic loss scale starts at 2 to this power."""
    loss_scale_window: PositiveInt = 1000
    """fp16: steps without overflow after which the scale doubles."""
    hysteresis: PositiveInt = 2
    """fp16: overflows before the scale halves."""
    consecutive_hysteresis: bool = False
    """fp16: refill hysteresis after a step without overflow."""
    min_loss_scale: PositiveInt = 1
    """fp16: the scale never falls below this."""
    auto_cast: bool = False
    """fp16: cast floating-point inputs too."""
    fp16_master_weights_and_grads: bool = False
    """fp16: keep no fp32 master weights (cpu_adam)."""


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


DYNAMIC_SCALE = (
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)
"""Settings of fp16 that a fixed loss scale leaves unread."""


def validate_precision(run: "Run") -> Iterator[Problem]:
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


def _check_masters(run: "Run") -> Iterator[Problem]:
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
