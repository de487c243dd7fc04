"""Which kernels a model is computed with: the choice, and what is not supported."""

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
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.plan.machine import Machine

LAYERS = ("rms_norm", "rotary", "swiglu")
"""Settings of what a layer computes between its matrix products."""


def choose_kernels(run: Run, machine: Machine) -> Kernels:
    """The fastest kernels that are sound here, by the measurements of docs/performance.md.

    Args:
        run: with device and precision decided.
    """
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


def validate_kernels(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    """Kernels that this machine or this run does not support."""
    yield from _validate_attention(run)
    yield from _validate_compilation(run, machine)
    kernels, autocast = run.kernels, run.precision.torch_autocast.enabled
    installed = find_spec("liger_kernel") is not None
    for name in ("loss", "matmul", *LAYERS):
        chosen, path = getattr(kernels, name).value, f"kernels.{name}"
        if chosen == "liger" and not (_on_gpu(run) and installed):
            needs = "CUDA" if installed else "the package liger-kernel, which is not installed"
            message = f"liger requires {needs}"
            yield Problem(path=path, message=message, hint=f"Set {path}=auto")
        if autocast and chosen in ("chunked", "fp32", "fused"):
            message = f"{chosen} is not supported with torch.autocast, which cannot see into it"
            yield Problem(path=path, message=message, hint=f"Set {path}=plain")
    if kernels.matmul is Matmul.fp32 and run.precision.name is PrecisionName.fp32 and not autocast:
        message = "fp32 requires a 16-bit precision (got precision=fp32)"
        yield Problem(path="kernels.matmul", message=message, hint="Set kernels.matmul=auto")
    if kernels.loss is LossKernel.chunked and run.precision.name is PrecisionName.fp16:
        message = "chunked is not supported with fp16, whose loss is scaled before the gradient"
        yield Problem(path="kernels.loss", message=message, hint="Set kernels.loss=plain")


def _validate_attention(run: ResolvedRun) -> Iterator[Problem]:
    chosen = run.kernels.attention
    needs, without = [], []
    if chosen is AttentionKernel.flash_attention_2:
        needs += [] if _on_gpu(run) else ["CUDA"]
        needs += [] if find_spec("flash_attn") is not None else ["the package flash-attn"]
        needs += ["16 bits"] if run.precision.name is PrecisionName.fp32 else []
    if chosen is AttentionKernel.flex_attention and not _on_gpu(run):
        needs.append("CUDA for its backward pass")
    own = chosen in (AttentionKernel.blocked, AttentionKernel.flex_attention)
    if own and run.model.attention_dropout:
        without.append(f"model.attention_dropout={run.model.attention_dropout:g}")
    if chosen is AttentionKernel.blocked and run.precision.torch_autocast.enabled:
        without.append("torch.autocast, which cannot see into it")
    messages = [f"{chosen.value} requires {', '.join(needs)}"] if needs else []
    messages += [f"{chosen.value} is not supported with {reason}" for reason in without]
    for message in messages:
        yield Problem(path="kernels.attention", message=message, hint="Set kernels.attention=sdpa")


def _validate_compilation(run: ResolvedRun, machine: Machine) -> Iterator[Problem]:
    chosen, path = run.kernels.compile, "kernels.compile"
    if chosen is CompiledPart.none:
        return
    if run.zero.stage == 3:
        message = f"{chosen.value} is not supported at stage 3, where weights are gathered"
        hint = f"Set {path}=none, or zero.stage to at most 2"
        yield Problem(path=path, message=message, hint=hint)
    if not _on_gpu(run) and not machine.has_compiler:
        message = f"{chosen.value} requires a C++ compiler, but there is none here"
        hint = f"Install g++ and ninja, or set {path}=none"
        yield Problem(path=path, message=message, hint=hint)
    for name in LAYERS:
        if getattr(run.kernels, name) is LayerKernel.fused:
            message = f"{chosen.value} only compiles plain parts (got kernels.{name}=fused)"
            yield Problem(path=path, message=message, hint=f"Set kernels.{name}=plain")
