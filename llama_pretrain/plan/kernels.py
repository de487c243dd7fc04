"""Which kernels a model is computed with: the choice, and what can't be."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from llama_pretrain.config.kernels import (
    Allocator,
    AttentionKernel,
    CompiledPart,
    Kernels,
    LayerKernel,
    LossKernel,
    Matmul,
)
from llama_pretrain.config.launch import Device
from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.run import Run
from llama_pretrain.plan.machine import Machine

LAYERS = ("rms_norm", "rotary", "swiglu")
"""Settings of what a layer computes between its products."""


def choose_kernels(run: Run, machine: Machine) -> Kernels:
    """The fastest kernels that are sound here, by the measurements of docs/performance.md."""
    kernels = run.kernels
    open_ones = [name for name in LAYERS if getattr(kernels, name) is LayerKernel.auto]
    changes: dict[str, Any] = dict.fromkeys(open_ones, _layer(run))
    return replace(
        kernels,
        attention=_attention(run, machine)
        if kernels.attention is AttentionKernel.auto
        else kernels.attention,
        loss=_loss(run) if kernels.loss is LossKernel.auto else kernels.loss,
        matmul=_matmul(run, machine) if kernels.matmul is Matmul.auto else kernels.matmul,
        allocator=_allocator(run) if kernels.allocator is Allocator.auto else kernels.allocator,
        **changes,
    )


def _on_gpu(run: Run) -> bool:
    return run.launch.device is Device.cuda


def _attention(run: Run, machine: Machine) -> AttentionKernel:
    sixteen = run.precision.name is not PrecisionName.fp32
    if _on_gpu(run):
        capable = machine.gpu_capability is None or machine.gpu_capability >= (8, 0)
        if sixteen and capable and find_spec("flash_attn") is not None:
            return AttentionKernel.flash_attention_2
    elif sixteen and not machine.cpu_intel and run.model.attention_dropout == 0:
        return AttentionKernel.blocked
    return AttentionKernel.sdpa


def _loss(run: Run) -> LossKernel:
    fp16 = run.precision.name is PrecisionName.fp16
    plain = fp16 or run.precision.torch_autocast.enabled
    return LossKernel.plain if plain else LossKernel.chunked


def _matmul(run: Run, machine: Machine) -> Matmul:
    sixteen = run.precision.name is not PrecisionName.fp32
    autocast = run.precision.torch_autocast.enabled
    slow = not _on_gpu(run) and not machine.cpu_fast_bf16
    return Matmul.fp32 if sixteen and slow and not autocast else Matmul.plain


def _allocator(run: Run) -> Allocator:
    returns = run.launch.malloc_mmap_threshold is not None
    return Allocator.plain if _on_gpu(run) or returns else Allocator.keep


def _layer(run: Run) -> LayerKernel:
    if run.kernels.compile is not CompiledPart.none or run.precision.torch_autocast.enabled:
        return LayerKernel.plain
    if _on_gpu(run):
        installed = find_spec("liger_kernel") is not None
        return LayerKernel.liger if installed else LayerKernel.plain
    return LayerKernel.fused


def check_kernels(run: Run, machine: Machine) -> Iterator[Problem]:
    """Kernels, their choices made, that this machine or this run can't have."""
    yield from _check_attention(run)
    yield from _check_compilation(run, machine)
    kernels = run.kernels
    installed = find_spec("liger_kernel") is not None
    for name in ("loss", *LAYERS):
        if getattr(kernels, name).value == "liger" and not (_on_gpu(run) and installed):
            needs = (
                "Liger's kernels need CUDA" if installed else "the package liger-kernel isn't here"
            )
            hint = f"set kernels.{name}=auto"
            yield Problem(path=f"kernels.{name}", message=f"{needs} (got liger)", hint=hint)
    autocast = run.precision.torch_autocast.enabled
    for name in ("loss", "matmul", *LAYERS):
        chosen = getattr(kernels, name).value
        if autocast and chosen in ("chunked", "fp32", "fused"):
            message = f"torch.autocast doesn't see into this kernel (got {chosen})"
            hint = f"set kernels.{name}=plain"
            yield Problem(path=f"kernels.{name}", message=message, hint=hint)
    if kernels.matmul is Matmul.fp32 and run.precision.name is PrecisionName.fp32 and not autocast:
        message = "is for 16 bits, and precision is fp32 (got fp32)"
        yield Problem(path="kernels.matmul", message=message, hint="set kernels.matmul=auto")
    if kernels.loss is LossKernel.chunked and run.precision.name is PrecisionName.fp16:
        message = "makes the gradient before the loss is scaled, which fp16 needs (got chunked)"
        yield Problem(path="kernels.loss", message=message, hint="set kernels.loss=plain")


def _check_attention(run: Run) -> Iterator[Problem]:
    chosen, path = run.kernels.attention, "kernels.attention"
    hint = f"set {path}=sdpa"
    if chosen is AttentionKernel.flash_attention_2:
        needs = []
        if not _on_gpu(run):
            needs.append("CUDA")
        if find_spec("flash_attn") is None:
            needs.append("the package flash-attn")
        if run.precision.name is PrecisionName.fp32:
            needs.append("16 bits")
        if needs:
            message = f"needs {', '.join(needs)} (got flash_attention_2)"
            yield Problem(path=path, message=message, hint=hint)
    if chosen is AttentionKernel.flex_attention and not _on_gpu(run):
        message = "has no backward pass on a CPU (got flex_attention)"
        yield Problem(path=path, message=message, hint=hint)
    if run.model.attention_dropout and chosen in (
        AttentionKernel.blocked,
        AttentionKernel.flex_attention,
    ):
        message = f"has no dropout, and model.attention_dropout is {run.model.attention_dropout:g}"
        yield Problem(path=path, message=f"{message} (got {chosen.value})", hint=hint)
    if chosen is AttentionKernel.blocked and run.precision.torch_autocast.enabled:
        message = "torch.autocast doesn't see into this kernel (got blocked)"
        yield Problem(path=path, message=message, hint=hint)


def _check_compilation(run: Run, machine: Machine) -> Iterator[Problem]:
    chosen, path = run.kernels.compile, "kernels.compile"
    if chosen is CompiledPart.none:
        return
    hint = f"set {path}=none"
    if run.zero.stage == 3:
        message = f"layers can't be compiled whose weights are gathered (got {chosen.value})"
        yield Problem(path=path, message=message, hint=f"{hint}, or zero.stage to 2 or less")
    if not _on_gpu(run) and not machine.has_compiler:
        message = f"needs a C++ compiler, and there is none here (got {chosen.value})"
        yield Problem(path=path, message=message, hint=f"install g++ and ninja, or {hint}")
    for name in LAYERS:
        if getattr(run.kernels, name) is LayerKernel.fused:
            message = (
                f"torch.compile makes kernels of what is plain (got {run.kernels.compile.value}"
            )
            message += f", and kernels.{name}=fused)"
            yield Problem(path=path, message=message, hint=f"set kernels.{name}=plain")
