"""The config group `precision`: number formats of forward and backward pass."""

import re
from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from llama_pretrain.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UsedWhen,
    schema,
)
from llama_pretrain.config.optim import HOST_OPTIMIZERS
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.zero import SHARDED, OffloadDevice

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


BF16 = UsedWhen("precision.name", ("bf16",))
FP16 = UsedWhen("precision.name", ("fp16",))
DYNAMIC = UsedWhen("precision.loss_scale", (0.0,))


@schema
class TorchAutocast:
    """torch.autocast: fp32 weights, 16-bit matrix products. Only with precision=fp32."""

    enabled: bool = False
    """Whether it is on."""
    dtype: AutocastDtype = AutocastDtype.bfloat16
    """Type of the products."""
    lower_precision_safe_modules: list[str] = field(default_factory=list)
    """Classes of modules whose gradients are reduced in 16 bits too; empty = DeepSpeed's list."""


@schema
class Precision:
    """Number formats of the forward and backward pass; master weights are fp32 by default."""

    name: PrecisionName = PrecisionName.auto
    """`auto` = bf16 if the device supports it natively, else fp32."""
    grad_accum_dtype: Annotated[Dtype | None, SHARDED] = None
    """Gradients are accumulated in this type; `null` = the precision's own."""
    communication_data_type: Dtype | None = None
    """Gradients are reduced in this type; `null` = the precision's own."""
    buffer_dtype: Dtype | None = None
    """Buffers (rotary frequencies) are cast to this type; `null` = they stay fp32."""
    torch_autocast: Annotated[
        TorchAutocast, UsedWhen("precision.torch_autocast.enabled", (True,))
    ] = field(default_factory=TorchAutocast)
    """torch.autocast instead of 16-bit weights."""
    immediate_grad_update: Annotated[bool, BF16] = False
    """bf16 with fp32 accumulation: add each gradient as soon as it is computed."""
    check_grad_overflow: Annotated[bool, BF16] = True
    """bf16: skip a step whose gradient is not finite."""
    bf16_master_weights_and_grads: Annotated[bool, BF16] = False
    """bf16: keep no fp32 master weights (cpu_adam): less memory, other losses."""
    bf16_optimizer_states: Annotated[bool, BF16] = False
    """bf16: moments in bf16 too (with bf16_master_weights_and_grads)."""
    loss_scale: Annotated[NonNegativeFloat, FP16] = 0.0
    """fp16: a fixed loss scale; 0 = dynamic."""
    initial_scale_power: Annotated[NonNegativeInt, FP16, DYNAMIC] = 16
    """fp16: the dynamic loss scale starts at 2 to this power."""
    loss_scale_window: Annotated[PositiveInt, FP16, DYNAMIC] = 1000
    """fp16: steps without overflow after which the scale doubles."""
    hysteresis: Annotated[PositiveInt, FP16, DYNAMIC] = 2
    """fp16: overflows before the scale halves."""
    consecutive_hysteresis: Annotated[bool, FP16, DYNAMIC] = False
    """fp16: refill hysteresis after a step without overflow."""
    min_loss_scale: Annotated[PositiveInt, FP16, DYNAMIC] = 1
    """fp16: the scale never falls below this."""
    auto_cast: Annotated[bool, FP16] = False
    """fp16: cast floating-point inputs too."""
    fp16_master_weights_and_grads: Annotated[bool, FP16] = False
    """fp16: keep no fp32 master weights (cpu_adam)."""


def validate_precision(run: "Run") -> Iterator[Problem]:
    """Combinations of number formats that DeepSpeed refuses or ignores silently."""
    precision, stage = run.precision, run.zero.stage
    name, accumulated = precision.name, precision.grad_accum_dtype
    if accumulated is not None and {accumulated.value, name.value} == {"bf16", "fp16"}:
        yield Problem(
            path="precision.grad_accum_dtype",
            message=f"{accumulated.value} is not supported with precision={name.value}",
            hint="Set it to fp32, or remove it",
        )
    offloaded = run.zero.offload_optimizer.device is not OffloadDevice.none
    checked = stage == 2 or (stage == 1 and (accumulated is not Dtype.fp32 or offloaded))
    if name is PrecisionName.bf16 and not precision.check_grad_overflow and not checked:
        yield Problem(
            path="precision.check_grad_overflow",
            message="is read by DeepSpeed at stage 2, and at stage 1 without"
            f" precision.grad_accum_dtype=fp32 (got false at stage {stage})",
            hint="Set zero.stage=2, or remove it",
        )
    if precision.immediate_grad_update and not (accumulated is Dtype.fp32 and stage == 1):
        yield Problem(
            path="precision.immediate_grad_update",
            message="requires stage 1 and precision.grad_accum_dtype=fp32"
            f" (got stage {stage}, {'null' if accumulated is None else accumulated.value})",
            hint="Set zero.stage=1 and precision.grad_accum_dtype=fp32, or remove it",
        )
    yield from _validate_master_weights(run)
    autocast = precision.torch_autocast
    for index, module in enumerate(autocast.lower_precision_safe_modules):
        # Ranks import these: restricted, so that a snapshot cannot name code to run.
        if not re.fullmatch(r"(torch\.nn|transformers)(\.\w+)+", module):
            yield Problem(
                path=f"precision.torch_autocast.lower_precision_safe_modules.{index}",
                message=f"must be the full name of a class in torch.nn or transformers"
                f" (got {module})",
                hint="For example torch.nn.Linear",
            )
    if autocast.enabled and name not in (PrecisionName.fp32, PrecisionName.auto):
        yield Problem(
            path="precision.torch_autocast.enabled",
            message=f"requires fp32 weights (got precision={name.value})",
            hint="Add precision=bf16_autocast, or remove it",
        )
    if autocast.enabled and autocast.dtype is AutocastDtype.float16 and stage > 0:
        yield Problem(
            path="precision.torch_autocast.dtype",
            message="float16 needs a loss scale, which DeepSpeed only has at stage 0"
            f" (got stage {stage})",
            hint="Set it to bfloat16",
        )


def _validate_master_weights(run: "Run") -> Iterator[Problem]:
    """16-bit master weights: DeepSpeed has them in its CPUAdam, or with moments in bf16."""
    precision, zero = run.precision, run.zero
    offloaded = zero.offload_optimizer.device is not OffloadDevice.none
    if precision.bf16_optimizer_states and not precision.bf16_master_weights_and_grads:
        yield Problem(
            path="precision.bf16_optimizer_states",
            message="requires precision.bf16_master_weights_and_grads=true",
            hint="Set precision.bf16_master_weights_and_grads=true, or remove it",
        )
    elif precision.bf16_optimizer_states and offloaded:
        yield Problem(
            path="precision.bf16_optimizer_states",
            message="is not supported with offload, whose moments are fp32",
            hint="Remove it",
        )
    for kind in ("bf16", "fp16"):
        name = f"{kind}_master_weights_and_grads"
        on_device = kind == "bf16" and precision.bf16_optimizer_states
        if not getattr(precision, name):
            continue
        if zero.stage == 0 or not (offloaded or on_device):
            yield Problem(
                path=f"precision.{name}",
                message=f"requires an offloaded optimizer (got stage {zero.stage}"
                f"{'' if offloaded else ' without offload'})",
                hint="Add zero=stage2_offload, or remove it",
            )
        elif offloaded and HOST_OPTIMIZERS.get(run.optim.name, "cpu_adam") != "cpu_adam":
            yield Problem(
                path=f"precision.{name}",
                message=f"requires optim=cpu_adam (got optim={run.optim.name.value})",
                hint="Add optim=cpu_adam, or remove it",
            )
